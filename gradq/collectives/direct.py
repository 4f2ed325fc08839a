"""Direct: everyone sends everything to everyone, encoded once; one phase, one error.

Sends (W - 1) n of phase 1, so it is the better form at two ranks, where two phases would send as much, wait
twice and round twice, and for models so small that latency decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradq import wire
from gradq.collectives.base import Collective, Pending, Segment, Setting, Step, merged

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
        self._payloads = [
            self._messages_WN[:, offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)
        ]

    def average(self, flat: Tensor, step: Step) -> Iterator[Pending]:
        """See `Collective.average`.

        1. Encode every segment once, into this rank's own row.
        2. Send the row to all peers; receive theirs.
        3. Decode the W rows in rank order, sum in fp32, divide once.
        """
        rank, world_size = self.setting.rank, self.setting.world_size
        with self.timed("encode_ms", step, 1):
            for segment, payload_WN in zip(self.segments, self._payloads, strict=True):
                x = flat[segment.start : segment.start + segment.numel]
                self.encode1(segment, 0, segment.numel, x, payload_WN[rank], step)
        rows = list(self._messages_WN)
        yield self.post(1, [rows[rank]] * world_size, rows, step)
        with self.timed("decode_ms", step, 1):
            for segment, payload_WN in zip(self.segments, self._payloads, strict=True):
                out = flat[segment.start : segment.start + segment.numel]
                segment.phase1.decode_mean(payload_WN, out)

    def doubtful(self, flat: Tensor) -> list[Tensor]:
        """See `Collective.doubtful`."""
        ranges = [
            (segment.start, segment.start + segment.numel)
            for segment, payload_WN in zip(self.segments, self._payloads, strict=True)
            if not segment.phase1.surely_finite(payload_WN, segment.numel)
        ]
        return [flat[start:stop] for start, stop in merged(ranges)]
