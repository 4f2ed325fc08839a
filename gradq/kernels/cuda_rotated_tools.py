"""What the Triton kernels of the rotated codecs share; for the forms of a tile see `cuda_rotated`."""

# Triton unrolls loops over tuples, and a tuple grows by a sum.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

import torch
import triton.language as tl

from gradq.kernels.cuda_tools import as_bits, as_float, fused, jit, mix32
from gradq.kernels.rotated import POLYNOMIALS

__all__ = [
    "TWICE",
    "add",
    "bf16_scales",
    "column_sums",
    "constants",
    "index",
    "inverse_unit",
    "level",
    "negated",
    "sign_words",
    "signed_unit",
    "split",
    "swap",
    "to_columns",
    "transform",
    "unit",
]


TWICE = tl.constexpr(0x4A800000)  # the bits of 2**22, whose last bit is a half: a conversion would cost more


def constants(num_bits: int) -> tuple[float, ...]:
    """The polynomials of a width: top, k0 to k3, a0 to a3; see `gradq.kernels.rotated.Polynomials`."""
    p = POLYNOMIALS[num_bits]
    return tuple(torch.tensor((p.top, *p.to_index, *p.to_level), dtype=torch.float32).tolist())


# --- the transform -------------------------------------------------------------------------------------


@jit
def _stage(z: tl.tensor, DISTANCE: tl.constexpr) -> tl.tensor:
    """Sums and differences at a distance."""
    after = ()
    for k in tl.static_range(16):
        after = after + (z[k - DISTANCE] - z[k] if k & DISTANCE else z[k] + z[k + DISTANCE],)
    return after


@jit
def transform(z: tl.tensor) -> tl.tensor:
    """Four stages of the transform, over the sixteen."""
    return _stage(_stage(_stage(_stage(z, 1), 2), 4), 8)


@jit
def _joined(parts: tl.tensor) -> tl.tensor:
    """Sixteen [256] to [256, 16]."""
    for step in tl.static_range(4):
        joined = ()
        for k in tl.static_range(8 >> step):
            joined = joined + (tl.join(parts[k], parts[k + (8 >> step)]),)
        parts = joined
    return tl.reshape(parts[0], [256, 16])


@jit
def split(whole: tl.tensor, STEPS: tl.constexpr) -> tl.tensor:
    """The 2**STEPS tensors along the last STEPS indices, each of size 2, the last one changing fastest."""
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
def _parted(whole: tl.tensor) -> tl.tensor:
    """[M, 16] to sixteen [M]."""
    return split(tl.reshape(whole, [whole.shape[0], 2, 2, 2, 2]), 4)


@jit
def swap(z: tl.tensor) -> tl.tensor:
    """From one form to the other, through shared memory."""
    whole = tl.reshape(_joined(z), [16, 16, 16])
    return _parted(tl.reshape(tl.permute(whole, [2, 1, 0]), [256, 16]))


@jit
def column_sums(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Sums of products over the rows of each column, [16], in the order of the reference."""
    sums = ()
    for k in tl.static_range(4):
        total = a[k] * b[k]
        for i in tl.static_range(1, 4):
            total = fused(a[k + 4 * i], b[k + 4 * i], total)
        sums = sums + (total,)
    by_sixteen = (sums[0] + sums[1]) + (sums[2] + sums[3])
    parts = _parted(tl.permute(tl.reshape(by_sixteen, [16, 16]), [1, 0]))
    for step in tl.static_range(4):
        halves = ()
        for k in tl.static_range(8 >> step):
            halves = halves + (parts[k] + parts[k + (8 >> step)],)
        parts = halves
    return parts[0]


@jit
def to_columns(values: tl.tensor) -> tl.tensor:
    """[16] to [256]: the value of each one's column."""
    return tl.reshape(tl.broadcast_to(values[None, :], [16, 16]), [256])


@jit
def add(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Sixteen sums."""
    sums = ()
    for k in tl.static_range(16):
        sums = sums + (a[k] + b[k],)
    return sums


# --- elements ------------------------------------------------------------------------------------------


@jit
def sign_words(tile_key: tl.tensor) -> tl.tensor:
    """The signs of row 16 h + k and each column, in bit k, [256]."""
    i = tl.arange(0, 256)
    word = mix32(tile_key + ((i >> 5) * 16 + (i & 15)).to(tl.uint32))
    return word >> (i & 16).to(tl.uint32)


@jit
def negated(z: tl.tensor, words: tl.tensor, K: tl.constexpr) -> tl.tensor:
    """Z with the signs of bit K."""
    return as_float(as_bits(z) ^ ((words << (31 - K)) & 0x80000000))


@jit
def signed_unit(values: tl.tensor, words: tl.tensor, exponent: tl.tensor, to_unit: tl.tensor) -> tl.tensor:
    """Sixteen values with their signs, times to_unit; zeros with NaN, Inf or denormals."""
    z = ()
    for k in tl.static_range(16):
        z = z + (negated(values[k], words, k),)
    if (exponent < 87) | (exponent >= 167):
        usable = (exponent > 0) & (exponent < 255)
        scaled = ()
        for k in tl.static_range(16):
            scaled = scaled + (tl.where(usable, z[k] * to_unit, 0.0),)
        z = scaled
    return z


@jit
def inverse_unit(to_unit: tl.tensor) -> tl.tensor:
    """1 / to_unit, a power of two: a product with it is the quotient."""
    return as_float((254 << 23) - as_bits(to_unit))


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
    slope = fused(y2, fused(y2, fused(y2, LEVELS[4], LEVELS[3]), LEVELS[2]), LEVELS[1])
    return fused(y, slope, 1.0 * (1 << (BITS - 1))).to(tl.int32)


@jit
def level(twice: tl.tensor, BITS: tl.constexpr, LEVELS: tl.constexpr) -> tl.tensor:
    """Levels of codes, given twice the codes plus TWICE."""
    m = as_float(twice.to(tl.uint32)) - (4194304.0 + ((1 << BITS) - 1) / 2)
    m2 = m * m
    return m * fused(m2, fused(m2, fused(m2, LEVELS[8], LEVELS[7]), LEVELS[6]), LEVELS[5])


@jit
def bf16_scales(scale: tl.tensor, word: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    """Scales rounded by 16-bit words: their bits and values [G], and whether the tile is lost."""
    bits = tl.where(scale < 2.0**-126, 0, (as_bits(scale) + word) >> 16).to(tl.uint32)
    value = as_float(bits << 16)
    overflow = (as_bits(value * 4096.0) & 0x7FFFFFFF) >= 0x7F800000
    lost = (tl.max(overflow.to(tl.int32), axis=0) > 0) | (exponent == 255)
    return tl.where(lost, 0x7FC0, bits).to(tl.uint32), value, lost
