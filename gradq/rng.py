"""Counter-based random bits: a pure function of (seed, step, parameter, purpose, block, element).

Nothing is drawn from a stream, so results do not depend on thread timing, on the bucket layout or on the
device. Ranks share the bits and differ by a shift of the dither (`dither_shift`): rank-stratified dither
spreads the W roundings of one element evenly over [0, 1), which leaves each rank unbiased and makes the
errors of the ranks cancel in the mean.

References:
    SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    The 32-bit mixing function is "lowbias32" of C. Wellons' hash-prospector (public domain).
    Correlated rounding: Suresh et al., "Correlated quantization for distributed mean estimation", ICML 2022.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

__all__ = [
    "BASIS",
    "CANDIDATE",
    "GRADIENT",
    "MEAN",
    "WEIGHT",
    "EncodeContext",
    "dither_key",
    "dither_shift",
    "name_id",
]

# What random bits are for, as a number in `dither_key`.
GRADIENT, MEAN = 1, 2  # phase 1: a rank's own gradient; phase 2: the mean that a shard's owner sends
# Of one parameter no two of these are compared with each other, so they may share their bits:
BASIS = 3  # the random vectors of `collectives.low_rank`
WEIGHT = 3  # a parameter that `collectives.all_gather` sends
CANDIDATE = 3  # a codec that `sync.learner` tries

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class EncodeContext:
    """Where in the run an encoding stands; with the input it decides every byte.

    Attributes:
        key: result of `dither_key`.
        shift: result of `dither_shift`.
        first_block: index, within the parameter, of the segment's first block.
        loss_scale: factor that residuals are multiplied by when added and divided by when stored.
    """

    key: int
    shift: int = 0
    first_block: int = 0
    loss_scale: float = 1.0


def name_id(name: str) -> int:
    """A stable 64-bit number for a parameter name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def dither_key(seed: int, step: int, parameter: int, purpose: int) -> int:
    """The 64-bit key of one encoding.

    Args:
        seed: the run's seed.
        step: optimizer step, from 0.
        parameter: `name_id` of the parameter.
        purpose: what the bits are for: `GRADIENT`, `MEAN`, `BASIS`, `WEIGHT` or `CANDIDATE`.

    Returns:
        An integer in [0, 2**64). The kernels use its two 32-bit halves.
    """
    key = 0
    for part in (seed, step, parameter, purpose):
        key = _splitmix64(key ^ (part & _MASK64))
    return key


def dither_shift(rank: int, world_size: int) -> int:
    """The shift of a rank's 16-bit dither, rank/world_size of its range: an integer in [0, 65536)."""
    return (rank << 16) // world_size
