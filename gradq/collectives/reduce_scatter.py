"""Reduce-scatter: every rank gets the mean of its own shard of every parameter; one phase, one error.

For trainers that shard parameters (FSDP2). The flat tensor has W rows, one an owner; a row holds the owner's
chunk of every parameter, one after another. Chunks of one parameter have equal sizes, so the last ones may
end with padding, which is never sent. Sends (W - 1) / W n of phase 1, as a ring reduce-scatter does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradq import wire
from gradq.collectives.base import Collective, Scratch, Segment, Setting, Step
from gradq.transport.contract import Pending

__all__ = ["ReduceScatter", "ShardSegment"]


@dataclass(frozen=True)
class ShardSegment(Segment):
    """A parameter that is sharded in equal chunks.

    Attributes:
        start: the first element of its chunk in a row.
        chunk: elements of it in a row, padding included.
    """

    chunk: int = 0

    def piece(self, world_size: int, owner: int) -> tuple[int, int]:
        """The elements [start, stop) of this parameter in the chunk of a rank, padding left out."""
        return min(owner * self.chunk, self.numel), min((owner + 1) * self.chunk, self.numel)


class ReduceScatter(Collective):
    """Each rank receives its chunks from all, encoded, and takes their mean.

    Collectives of one `Setting.scratch` share their messages' memory; they must run one after another.
    """

    num_channels = 1

    def __init__(self, segments: Sequence[ShardSegment], dtype: torch.dtype, setting: Setting) -> None:
        super().__init__(segments, dtype, setting)
        world_size, rank = setting.world_size, setting.rank
        self.row_numel = sum(segment.chunk for segment in segments)
        self._scratch = setting.scratch if setting.scratch is not None else Scratch(setting.device)
        # by owner: (segment, its piece, where it stands in flat, where in the message)
        self._pieces: list[list[tuple[Segment, int, int, slice, slice]]] = []
        self._message_bytes: list[int] = []
        for owner in range(world_size):
            row = owner * self.row_numel
            pieces: list[tuple[Segment, int, int, slice, slice]] = []
            sized = [(segment, *segment.piece(world_size, owner)) for segment in segments]
            sizes = [segment.phase1.nbytes(stop - start) for segment, start, stop in sized]
            offsets, total = wire.message_offsets(sizes)
            for (segment, start, stop), at, nbytes in zip(sized, offsets, sizes, strict=True):
                if start < stop:
                    flat = slice(row + segment.start, row + segment.start + stop - start)
                    pieces.append((segment, start, stop, flat, slice(at, at + nbytes)))
            self._pieces.append(pieces)
            self._message_bytes.append(total)
        self._first_blocks = {  # every piece starts with a block of its own
            (segment.name, owner): owner * -(-segment.chunk // segment.phase1.block_size)
            for segment in segments
            for owner in range(world_size)
        }
        self._own_bytes = self._message_bytes[rank]

    def average(self, flat: Tensor, step: Step) -> Iterator[Pending]:
        """Replace this rank's row of flat [W * row_numel] by its mean over ranks; the others stay.

        1. Encode every chunk into the message for its owner; one's own stays here, encoded all the same.
        2. Exchange.
        3. Of the own row: decode W payloads in rank order, sum in fp32, divide once.
        """
        rank, world_size = self.setting.rank, self.setting.world_size
        gathered_WN = self._scratch.take("received", world_size * self._own_bytes).view(world_size, -1)
        outgoing = torch.split(self._scratch.take("sent", sum(self._message_bytes)), self._message_bytes)
        messages = [gathered_WN[rank] if owner == rank else outgoing[owner] for owner in range(world_size)]
        with self.timed("encode_ms", step, 1):
            for owner, (pieces, message) in enumerate(zip(self._pieces, messages, strict=True)):
                for segment, start, stop, here, there in pieces:
                    first_block = self._first_blocks[segment.name, owner]
                    self.encode1(segment, start, stop, flat[here], message[there], step, first_block)
        yield self.post(1, messages, list(gathered_WN), step)
        with self.timed("decode_ms", step, 1):
            for segment, _, _, here, there in self._pieces[rank]:
                segment.phase1.decode_mean(gathered_WN[:, there], flat[here])
