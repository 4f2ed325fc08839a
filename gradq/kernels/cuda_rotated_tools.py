"""What the Triton kernels of the rotated codecs share; for the forms of a tile see `cuda_rotated`."""

# Triton unrolls loops over tuples, and a tuple grows by a sum.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

import triton.language as tl

from gradq.kernels.cuda_tools import as_bits, as_float, jit, mix32
from gradq.kernels.rotated import POLYNOMIALS

__all__ = [
    "add_up",
    "bf16_scales",
    "column_sums",
    "constants",
    "index",
    "join",
    "level",
    "negated",
    "stages",
    "swap",
    "unit",
]


def constants(num_bits: int) -> tuple[float, ...]:
    """The polynomials of a width: top, k0 to k3, a0 to a3; see `gradq.kernels.rotated.Polynomials`."""
    p = POLYNOMIALS[num_bits]
    return (float(p.top), *map(float, p.to_index), *map(float, p.to_level))


# --- the transform -------------------------------------------------------------------------------------


@jit
def join(parts: tl.tensor) -> tl.tensor:
    """Sixteen [256] to [16, 16, 16], their number the last index."""
    for step in tl.static_range(4):
        joined = ()
        for k in tl.static_range(8 >> step):
            joined = joined + (tl.join(parts[k], parts[k + (8 >> step)]),)
        parts = joined
    return tl.reshape(parts[0], [16, 16, 16])


@jit
def _stage(z: tl.tensor) -> tl.tensor:
    """Sums and differences of neighbours along the last index, whose lowest bit becomes its highest."""
    a, b = tl.split(tl.reshape(z, [256, 8, 2]))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [256, 16])


@jit
def stages(z: tl.tensor) -> tl.tensor:
    """Four stages of the transform, over the last index."""
    return tl.reshape(_stage(_stage(_stage(_stage(z)))), [16, 16, 16])


@jit
def swap(z: tl.tensor) -> tl.tensor:
    """From one form to the other."""
    return tl.permute(z, [2, 1, 0])


@jit
def column_sums(z: tl.tensor) -> tl.tensor:
    """Sums over the rows of each column, [16], in the order of the reference.

    Four accumulators, by the last index modulo 4; each takes the first index from 0 to 15, and at each its
    four of the last index in order.
    """
    return add_up(tl.permute(tl.reshape(z, [16, 16, 4, 4]), [3, 1, 0, 2]))


@jit
def _split(whole: tl.tensor, STEPS: tl.constexpr) -> tl.tensor:
    """The 2**STEPS tensors along the last STEPS indices, each of size 2."""
    parts = (whole,)
    for step in tl.static_range(STEPS):
        first = ()
        second = ()
        for k in tl.static_range(1 << step):
            a, b = tl.split(parts[k])
            first = first + (a,)
            second = second + (b,)
        parts = first + second
    return parts


@jit
def add_up(terms: tl.tensor) -> tl.tensor:
    """[4 accumulators, 16 columns, ... 64 steps] to [16]: step after step, then (0 + 1) + (2 + 3)."""
    parts = _split(tl.reshape(terms, [64, 2, 2, 2, 2, 2, 2]), 6)
    total = tl.zeros([64], tl.float32)
    for step in tl.static_range(64):
        total = total + parts[step]
    by_column = tl.permute(tl.reshape(total, [4, 16]), [1, 0])
    even, odd = tl.split(tl.reshape(by_column, [16, 2, 2]))
    low, high = tl.split(even + odd)
    return low + high


# --- elements ------------------------------------------------------------------------------------------


@jit
def negated(z: tl.tensor, tile_key: tl.tensor) -> tl.tensor:
    """Z [h, column, l] with its signs."""
    h = tl.arange(0, 16)[:, None, None]
    word = mix32(tile_key + ((h >> 1) * 16 + tl.arange(0, 16)[None, :, None]).to(tl.uint32))
    left = 31 - ((h & 1) * 16 + tl.arange(0, 16)[None, None, :])
    return as_float(as_bits(z) ^ ((word << left.to(tl.uint32)) & 0x80000000))


@jit
def unit(exponent: tl.tensor) -> tl.tensor:
    """What brings the largest magnitude, of this exponent field, into [1, 2); 1 where it is moderate."""
    moderate = (exponent >= 87) & (exponent < 167)
    bits = tl.minimum(tl.maximum(254 - exponent, 1), 253) << 23
    return tl.where(moderate, 0x3F800000, bits).to(tl.float32, bitcast=True)


@jit
def index(y: tl.tensor, BITS: tl.constexpr, LEVELS: tl.constexpr) -> tl.tensor:
    """Codes of normalized values."""
    y = tl.minimum(tl.maximum(y, -LEVELS[0]), LEVELS[0])
    y2 = y * y
    u = y * (LEVELS[1] + y2 * (LEVELS[2] + y2 * (LEVELS[3] + y2 * LEVELS[4])))
    return (u + (1 << (BITS - 1))).to(tl.int32)


@jit
def level(code: tl.tensor, BITS: tl.constexpr, LEVELS: tl.constexpr) -> tl.tensor:
    """Levels of codes."""
    m = code.to(tl.float32) - ((1 << BITS) - 1) / 2
    m2 = m * m
    return m * (LEVELS[5] + m2 * (LEVELS[6] + m2 * (LEVELS[7] + m2 * LEVELS[8])))


@jit
def bf16_scales(scale: tl.tensor, word: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    """Scales rounded by 16-bit words: their bits and values [G], and whether the tile is lost."""
    bits = tl.where(scale < 2.0**-126, 0, (as_bits(scale) + word) >> 16).to(tl.uint32)
    value = as_float(bits << 16)
    overflow = (as_bits(value * 4096.0) & 0x7FFFFFFF) >= 0x7F800000
    lost = (tl.max(overflow.to(tl.int32), axis=0) > 0) | (exponent == 255)
    return tl.where(lost, 0x7FC0, bits).to(tl.uint32), value, lost
