"""Direct: everyone sends everything to everyone, encoded once; one phase, one error.

Sends (W - 1) n of phase 1, so it is the better form at two ranks, where two phases would send as much, wait
twice and round twice, and for models so small that latency decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradq.collectives.base import Collective, Segment, Setting, Step
from gradq.collectives.message_layout import MessageLayout
from gradq.transport.contract import Pending

__all__ = ["Direct"]


class Direct(Collective):
    """All-gather of the encoded gradients; every rank decodes all W and takes the mean."""

    num_channels = 1
    cuts_segments = True

    def __init__(self, segments: Sequence[Segment], dtype: torch.dtype, setting: Setting) -> None:
        super().__init__(segments, dtype, setting)
        self._layout = MessageLayout(segments)
        self._layout.coalesce(dtype, setting.device, setting.world_size)
        self._messages_WN = self.buffer(setting.world_size, self._layout.nbytes1)

    def average(self, flat: Tensor, step: Step) -> Iterator[Pending]:
        """See `Collective.average`.

        1. Encode every segment once, into this rank's own row.
        2. Send the row to all peers; receive theirs.
        3. Decode the W rows in rank order, sum in fp32, divide once.
        """
        messages_WN = self._messages_WN
        rows = list(messages_WN)
        own = rows[self.setting.rank]
        slots, coalesced = self._layout.split(step.sample)
        with self.timed("encode_ms", step, 1):
            for slot in slots:
                self.encode1(slot, flat[slot.flat], own[slot.payload1], step)
            for group in coalesced:
                group.encode(flat, own)
        yield self.post(1, [own] * self.setting.world_size, rows, step)
        with self.timed("decode_ms", step, 1):
            for slot in slots:
                slot.segment.phase1.decode_mean(messages_WN[:, slot.payload1], flat[slot.flat])
            for group in coalesced:
                group.decode_mean(messages_WN, flat)
