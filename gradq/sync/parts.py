"""Parts of a bucket: what is sent while the rest of the bucket is still being encoded.

A bucket of DDP's may be as large as its largest parameter. Encoded whole, the network idles until its last
block is encoded, and once more at the end of a step until the last bucket is decoded; and two phases wait
for each other. So a bucket travels in parts of a few MB, each a collective of its own.

Blocks, random bits and residuals belong to elements of parameters, so a cut changes no value: every rank gets
the bits that it would have got from the bucket in one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from gradq.collectives.base import Collective, Segment, Way

__all__ = ["parts_of"]


def parts_of(ways: Sequence[Way], most: int) -> Iterator[list[Way]]:
    """Group what a bucket holds, in order, cutting what is too large and may be cut.

    Args:
        ways: everything in the bucket, one after another.
        most: elements of a part; a segment that may not be cut can be larger.

    Yields:
        Parts, none empty; `Segment.start` counts from the start of the part.
    """
    part: list[Way] = []
    numel = 0
    for collective, whole in ways:
        for segment in _cut(collective, whole, most):
            if part and numel + segment.numel > most:
                yield part
                part, numel = [], 0
            part.append((collective, replace(segment, start=numel)))
            numel += segment.numel
    if part:
        yield part


def _cut(collective: type[Collective], segment: Segment, most: int) -> Iterator[Segment]:
    """Nearly equal pieces of a segment, at multiples of its grain; or the segment.

    A shard residual belongs to the piece that a rank owns, and other cuts would make other pieces.
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
