"""All-gather of sharded parameters, encoded: every rank decodes all shards, its own too, from the same bytes.

The rows are those of `reduce_scatter`. The shards themselves are not touched, so the optimizer keeps exact
weights; what the model computes with is an unbiased rounding of them.

Reference:
    The quantized weight communication of ZeRO++ (Wang et al., 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradq import rng, wire
from gradq.collectives.base import Collective, Scratch, Setting, Step
from gradq.collectives.reduce_scatter import ShardSegment
from gradq.transport.contract import Pending

__all__ = ["AllGather"]

_PHASE = 3  # of the dither: a parameter's gradient uses 1 and 2


class AllGather(Collective):
    """Each rank sends its row, encoded once; phase 1 of a segment is the codec."""

    num_channels = 1

    def __init__(self, segments: Sequence[ShardSegment], dtype: torch.dtype, setting: Setting) -> None:
        super().__init__(segments, dtype, setting)
        self.row_numel = sum(segment.chunk for segment in segments)
        self._scratch = setting.scratch if setting.scratch is not None else Scratch(setting.device)
        # by owner: (segment, first block of the dither, where it stands in the row, where in the message)
        self._pieces: list[list[tuple[ShardSegment, int, slice, slice]]] = []
        self._message_bytes: list[int] = []
        for owner in range(setting.world_size):
            numels = [stop - start for start, stop in (s.piece(setting.world_size, owner) for s in segments)]
            sizes = [segment.phase1.nbytes(numel) for segment, numel in zip(segments, numels, strict=True)]
            offsets, total = wire.message_offsets(sizes)
            self._pieces.append(
                [
                    (
                        segment,
                        owner * -(-segment.chunk // segment.phase1.block_size),
                        slice(segment.start, segment.start + numel),
                        slice(at, at + nbytes),
                    )
                    for segment, numel, at, nbytes in zip(segments, numels, offsets, sizes, strict=True)
                    if numel
                ]
            )
            self._message_bytes.append(total)

    def average(self, flat: Tensor, step: Step) -> Iterator[Pending]:
        """Fill every row of flat [W * row_numel] with the decoded shards; this rank's row holds its own.

        1. Encode the own row.
        2. Send it to all peers; receive theirs.
        3. Decode all rows, the own one too.
        """
        rank, world_size = self.setting.rank, self.setting.world_size
        rows = flat.view(world_size, self.row_numel)
        messages = torch.split(self._scratch.take("weights", sum(self._message_bytes)), self._message_bytes)
        row = rows[rank] if flat.dtype == self.dtype else self._work().copy_(rows[rank])
        with self.timed("encode_ms", step, _PHASE):
            for segment, first_block, here, there in self._pieces[rank]:
                key = rng.dither_key(self.setting.seed, step.index, self.ids[segment.name], _PHASE)
                context = rng.EncodeContext(key=key, first_block=first_block)
                segment.phase1.encode(row[here], messages[rank][there], context=context)
        yield self.post(1, [messages[rank]] * world_size, messages, step)
        with self.timed("decode_ms", step, _PHASE):
            for owner, (pieces, message) in enumerate(zip(self._pieces, messages, strict=True)):
                row = rows[owner] if flat.dtype == self.dtype else self._work()
                for segment, _, here, there in pieces:
                    segment.phase1.decode(message[there], row[here])
                if flat.dtype != self.dtype:
                    rows[owner].copy_(row)

    def _work(self) -> Tensor:
        """A row in the dtype that codecs work in."""
        return self._scratch.take("weights row", self.row_numel * self.dtype.itemsize).view(self.dtype)
