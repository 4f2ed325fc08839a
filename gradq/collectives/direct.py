"""Direct: everyone sends everything to everyone, encoded once; one phase, one error.

Sends (W - 1) n of phase 1, so it is the better form at two ranks, where two phases would send as much, wait
twice and round twice, and for models so small that latency decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradq import wire
from gradq.collectives.base import Collective, Segment, Setting, Step
from gradq.collectives.runs import Place, Run, runs_of
from gradq.transport.contract import Pending

__all__ = ["Direct"]


class Direct(Collective):
    """All-gather of the encoded gradients; every rank decodes all W and takes the mean."""

    num_channels = 1
    cuts_segments = True

    def __init__(self, segments: Sequence[Segment], dtype: torch.dtype, setting: Setting) -> None:
        super().__init__(segments, dtype, setting)
        sizes = [segment.phase1.nbytes(segment.numel) for segment in self.segments]
        offsets, nbytes = wire.message_offsets(sizes)
        self._messages_WN = torch.zeros(setting.world_size, nbytes, dtype=torch.uint8, device=setting.device)
        places = [
            Place(segment, segment.start, segment.numel, (offset, 0))
            for segment, offset in zip(self.segments, offsets, strict=True)
        ]
        self._runs, alone = runs_of(places, dtype, setting.device, setting.world_size)
        self._alone = [self._row_part(place) for place in alone]
        self._all = [self._row_part(place) for place in places]

    def _row_part(self, place: Place) -> tuple[Segment, slice, Tensor]:
        """A segment, where it stands in the bucket, and its payloads [W, nbytes]."""
        nbytes = place.segment.phase1.nbytes(place.numel)
        payload_WN = self._messages_WN[:, place.at[0] : place.at[0] + nbytes]
        return place.segment, slice(place.start, place.start + place.numel), payload_WN

    def average(self, flat: Tensor, step: Step) -> Iterator[Pending]:
        """See `Collective.average`.

        1. Encode every segment once, into this rank's own row.
        2. Send the row to all peers; receive theirs.
        3. Decode the W rows in rank order, sum in fp32, divide once.
        """
        rank, world_size = self.setting.rank, self.setting.world_size
        runs: list[Run] = [] if step.sample else self._runs
        parts = self._all if step.sample else self._alone
        with self.timed("encode_ms", step, 1):
            for segment, where, payload_WN in parts:
                self.encode1(segment, 0, segment.numel, flat[where], payload_WN[rank], step)
            for run in runs:
                run.encode(flat, self._messages_WN[rank])
        rows = list(self._messages_WN)
        yield self.post(1, [rows[rank]] * world_size, rows, step)
        with self.timed("decode_ms", step, 1):
            for segment, where, payload_WN in parts:
                segment.phase1.decode_mean(payload_WN, flat[where])
            for run in runs:
                run.decode_mean(self._messages_WN, flat)
