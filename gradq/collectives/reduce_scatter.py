"""Reduce-scatter: every rank gets the mean of its own shard of every parameter; one phase, one error.

For trainers that shard parameters (FSDP2). The flat tensor has W rows, one an owner; a row holds the owner's
shard of every parameter, one after another. Shards of one parameter have equal sizes, so the last ones may
end with padding, which is never sent. Sends (W - 1) / W n of phase 1, as a ring reduce-scatter does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradq.collectives.base import Collective, Segment, Setting, Step
from gradq.collectives.message_layout import MessageLayout
from gradq.transport.contract import Pending

__all__ = ["OfShards", "ReduceScatter", "Scratch", "ShardSegment"]


class Scratch:
    """Buffers of bytes by name, each as large as the largest request so far.

    For collectives that never run at the same time.

    Args:
        device: device of the buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, nbytes: int) -> Tensor:
        """The first nbytes of a buffer, uint8; whatever the last user left is in it."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._buffers[name] = torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
        return buffer[:nbytes]


@dataclass(frozen=True)
class ShardSegment(Segment):
    """A parameter that is sharded in equal sizes; every shard starts with a block of its own.

    Attributes:
        start: the first element of a shard in its row.
        shard_numel: elements of a shard, padding included.
    """

    shard_numel: int = 0

    def shard(self, world_size: int, owner: int) -> tuple[int, int]:
        """The elements [start, stop) of this parameter in the shard of a rank, padding left out."""
        return min(owner * self.shard_numel, self.numel), min((owner + 1) * self.shard_numel, self.numel)

    def position(self, element: int) -> int:
        """Where an element of this parameter stands in its row."""
        return self.start + element % self.shard_numel

    def first_block(self, element: int) -> int:
        """See `Segment.first_block`; element is the first of a shard."""
        return element // self.shard_numel * -(-self.shard_numel // self.phase1.block_size)


class OfShards(Collective):
    """A collective over rows of shards, in one phase; `ReduceScatter` and `AllGather` say what they average.

    Args:
        segments: see `Collective`, like all not named here.
        scratch: memory of the messages.

    Attributes:
        scratch: the argument.
        layouts: the layout of each owner's message.
    """

    num_channels = 1

    def __init__(
        self, segments: Sequence[ShardSegment], dtype: torch.dtype, setting: Setting, scratch: Scratch
    ) -> None:
        super().__init__(segments, dtype, setting)
        self.scratch = scratch
        world_size = setting.world_size
        self.layouts = [MessageLayout(segments, world_size, owner) for owner in range(world_size)]


class ReduceScatter(OfShards):
    """Each rank receives its shards from all, encoded, and takes their mean."""

    def average(self, flat: Tensor, step: Step) -> Iterator[Pending]:
        """Replace this rank's row of flat [W * n] by its mean over ranks; the others stay.

        1. Encode every shard into the message for its owner; one's own stays here, encoded all the same.
        2. Exchange.
        3. Of the own row: decode W payloads in rank order, sum in fp32, divide once.
        """
        rank, world_size = self.setting.rank, self.setting.world_size
        rows = flat.view(world_size, -1)
        sizes = [layout.nbytes1 for layout in self.layouts]
        gathered_WN = self.scratch.take("received", world_size * sizes[rank]).view(world_size, -1)
        messages = list(torch.split(self.scratch.take("sent", sum(sizes)), sizes))
        messages[rank] = gathered_WN[rank]
        with self.timed("encode_ms", step, 1):
            for layout, row, message in zip(self.layouts, rows, messages, strict=True):
                for slot in layout.slots:
                    self.encode1(slot, row[slot.flat], message[slot.payload1], step)
        yield self.post(1, messages, list(gathered_WN), step)
        with self.timed("decode_ms", step, 1):
            for slot in self.layouts[rank].slots:
                slot.segment.phase1.decode_mean(gathered_WN[:, slot.payload1], rows[rank][slot.flat])
