"""Two phases: a compressed reduce-scatter, then a compressed all-gather.

Sends (W - 1) / W n of phase 1 and as much of phase 2, like a ring all-reduce. The errors of phase 1 are
averaged over ranks; that of phase 2 is not, so it deserves more bits.

Reference:
    The scheme of 1-bit Adam's compressed all-reduce (Tang et al., ICML 2021) and of ZeRO++'s qgZ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradq.collectives.base import Collective, Segment, Setting, Step
from gradq.collectives.message_layout import MessageLayout
from gradq.transport.contract import Pending

__all__ = ["TwoPhase"]


class TwoPhase(Collective):
    """Each rank averages the shards it owns and hands them back to all."""

    num_channels = 2
    cuts_segments = True

    def __init__(self, segments: Sequence[Segment], dtype: torch.dtype, setting: Setting) -> None:
        super().__init__(segments, dtype, setting)
        rank, world_size, device = setting.rank, setting.world_size, setting.device
        self._layouts = [MessageLayout(segments, world_size, owner) for owner in range(world_size)]
        for layout in self._layouts:
            layout.coalesce(dtype, device, world_size)
        # phase 1: what this rank receives, and what it sends; phase 2: the means, by owner
        self._gathered_WN = self.buffer(world_size, self._layouts[rank].nbytes1)
        self._scattered = [
            self._gathered_WN[rank] if owner == rank else self.buffer(layout.nbytes1)
            for owner, layout in enumerate(self._layouts)
        ]
        self._means = [self.buffer(layout.nbytes2) for layout in self._layouts]
        largest = max((slot.numel for slot in self._layouts[rank].slots), default=0)
        self._mean = torch.zeros(largest, dtype=dtype, device=device)

    def average(self, flat: Tensor, step: Step) -> Iterator[Pending]:
        """See `Collective.average`.

        1. Encode every shard into the message for its owner; one's own stays here, encoded all the same.
        2. Exchange (phase 1).
        3. Of the shards this rank owns: decode W payloads in rank order, sum in fp32, divide once, encode.
        4. Exchange (phase 2): the same message to every peer.
        5. Everyone, the owner too, decodes the same bytes into the chunk.
        """
        rank, world_size = self.setting.rank, self.setting.world_size
        owners = [layout.split(step.sample) for layout in self._layouts]
        with self.timed("encode_ms", step, 1):
            for (slots, coalesced), message in zip(owners, self._scattered, strict=True):
                for slot in slots:
                    self.encode1(slot, flat[slot.flat], message[slot.payload1], step)
                for group in coalesced:
                    group.encode(flat, message)
        yield self.post(1, self._scattered, list(self._gathered_WN), step)
        own = self._means[rank]
        for slot in owners[rank][0]:
            mean = self._mean[: slot.numel]
            with self.timed("decode_ms", step, 1):
                slot.segment.phase1.decode_mean(self._gathered_WN[:, slot.payload1], mean)
            with self.timed("encode_ms", step, 2):
                self.encode2(slot, mean, own[slot.payload2], step)
        with self.timed("decode_ms", step, 1):
            for group in owners[rank][1]:
                group.average(self._gathered_WN, own)
        yield self.post(2, [own] * world_size, self._means, step)
        with self.timed("decode_ms", step, 2):
            for (slots, coalesced), message in zip(owners, self._means, strict=True):
                for slot in slots:
                    slot.segment.phase2.decode(message[slot.payload2], flat[slot.flat])
                for group in coalesced:
                    group.decode(message, flat)
