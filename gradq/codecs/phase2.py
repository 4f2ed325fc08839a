"""How many bits the means need: the default codec of phase 2.

Phase 1 errs W times, and the mean over W ranks averages that down; phase 2 errs once, and every rank sees all
of it. For phase 2 to add a given share to the error it needs ½ log2(W) bits more than phase 1, and some more
for the share to be small. Measured on gradients of the example (benchmarks/phase_bits.py, results in
benchmarks/results/phase_bits.md), the fewest bits of a uniform codec that add at most 10 %, without
feedback, early in training (step 30) and, in brackets, over that and step 300 where it differs:

======== ===== ===== ===== ===== =====
phase 1   W=2     4     8    16    64
======== ===== ===== ===== ===== =====
int2         4     4     5  6(5)  7(6)
int3         5     6     6     7     8
int4      7(6)     7  8(7)     8    >8
rot1         5     5  6(5)     6     7
rot2         6     6  7(6)     7     8
rot4         7     8     8    >8    >8
======== ===== ===== ===== ===== =====

That is at most num_bits + 2 + ½ log2(W), rounded up, for uniform codecs, and one bit more for codecs that err
as if they had one more. With feedback the error of phase 1 is larger and one bit less would do. Of the widths
only 6 and 8 are used: 5 and 7 take twice as long to decode. Where 8 are not enough (int4 at 64 ranks: + 13 %;
rot4: + 38 %, + 19 % with feedback) the next is bf16, at twice the bytes: for that the spec must ask.
"""

from __future__ import annotations

import math

__all__ = ["phase2_bits"]


def phase2_bits(num_bits: int, world_size: int | None) -> int:
    """The bits of a uniform codec for the means.

    Args:
        num_bits: bits of the uniform codec whose error is closest to that of phase 1.
        world_size: number of ranks; None if unknown.

    Returns:
        6 or 8; 8 if the number of ranks is unknown.

    Example:
        >>> [phase2_bits(2, world_size) for world_size in (4, 16, 64)]
        [6, 6, 8]
    """
    if world_size is None:
        return 8
    return 6 if num_bits + 2 + math.ceil(math.log2(max(world_size, 2)) / 2) <= 6 else 8
