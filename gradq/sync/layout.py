"""BucketLayout: where the parameters of a bucket stand, cut into the chunks that are exchanged.

A bucket of DDP's may be as large as its largest parameter. Encoded whole, the network idles until its last
block is encoded, and once more at the end of a step until the last bucket is decoded; and two phases wait
for each other. So a bucket travels in chunks of a few MB, each with a collective of its own.

Blocks, random bits and residuals belong to elements of parameters, so a cut changes no value: every rank gets
the bits that it would have got from the bucket in one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from gradq.collectives import Collective, Segment, Setting, Step, Transfer, compose
from gradq.transport.contract import Pending

__all__ = ["BucketLayout", "Chunk", "chunks_of", "work_dtype"]


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that gradients of a dtype are encoded from and averaged in."""
    return dtype if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Chunk:
    """What one exchange carries of a bucket.

    Attributes:
        where: its elements in the bucket.
        collective: what averages it.
        work: memory for it in the work dtype; None if the bucket has that dtype.
    """

    where: slice
    collective: Collective
    work: Tensor | None

    def average(self, bucket: Tensor, step: Step) -> Iterator[Pending]:
        """Replace these elements of a bucket by their mean; the stages are those of the collective.

        1. Bring the elements into the work dtype.
        2. Average them.
        3. Write the mean in the bucket's dtype; `mean` still has it in the work dtype.
        """
        flat = bucket[self.where]
        if self.work is not None:
            self.work.copy_(flat)
        yield from self.collective.average(self.mean(bucket), step)
        if self.work is not None:
            flat.copy_(self.work)

    def mean(self, bucket: Tensor) -> Tensor:
        """The mean after `average`, in the work dtype."""
        return bucket[self.where] if self.work is None else self.work


class BucketLayout:
    """Buckets with the same parameters in the same order.

    Args:
        flat: one of these buckets.
        names: names of its parameters, in order.
        transfers: how these travel.
        used: the collectives of the whole plan.
        setting: what outlives a bucket; see `Setting`.
        chunk_numel: elements of a chunk.

    Attributes:
        names: the argument.
        chunks: the bucket, in order.
    """

    def __init__(
        self,
        flat: Tensor,
        names: tuple[str, ...],
        transfers: Sequence[Transfer],
        used: Collection[type[Collective]],
        setting: Setting,
        chunk_numel: int,
    ) -> None:
        self.names, self._dtype = names, flat.dtype
        dtype = work_dtype(flat.dtype)
        self.chunks: list[Chunk] = []
        start = 0
        for chunk in chunks_of(transfers, chunk_numel):
            stop = start + sum(segment.numel for _, segment in chunk)
            where = slice(start, stop)
            work = None if flat.dtype == dtype else torch.empty_like(flat[where], dtype=dtype)
            self.chunks.append(Chunk(where, compose(chunk, used, dtype, setting), work))
            start = stop
        assert start == flat.numel(), f"a bucket has {flat.numel()} elements, its parameters {start}"

    def fits(self, flat: Tensor, names: tuple[str, ...]) -> bool:
        """Whether a bucket has this layout."""
        return self.names == names and self._dtype == flat.dtype


def chunks_of(transfers: Sequence[Transfer], chunk_numel: int) -> Iterator[list[Transfer]]:
    """Group what a bucket holds, in order, cutting what is too large and may be cut.

    Args:
        transfers: everything in the bucket, one after another.
        chunk_numel: elements of a chunk; a segment that may not be cut can be larger.

    Yields:
        Chunks, none empty; `Segment.start` counts from the start of the chunk.
    """
    chunk: list[Transfer] = []
    numel = 0
    for collective, whole in transfers:
        for segment in _cut(collective, whole, chunk_numel):
            if chunk and numel + segment.numel > chunk_numel:
                yield chunk
                chunk, numel = [], 0
            chunk.append((collective, replace(segment, start=numel)))
            numel += segment.numel
    if chunk:
        yield chunk


def _cut(collective: type[Collective], segment: Segment, most: int) -> Iterator[Segment]:
    """A segment in nearly equal ones, cut at multiples of its grain; or as it is.

    A shard residual belongs to the shard that a rank owns, and other cuts would make other shards.
    """
    count = -(-segment.numel // most)
    if count <= 1 or not collective.cuts_segments or segment.feedback2:
        yield segment
        return
    num_grains = -(-segment.numel // segment.grain)
    count = min(count, num_grains)
    bounds = [min(k * num_grains // count * segment.grain, segment.numel) for k in range(count + 1)]
    for start, stop in pairwise(bounds):
        yield replace(segment, numel=stop - start, offset=start, whole=segment.numel)
