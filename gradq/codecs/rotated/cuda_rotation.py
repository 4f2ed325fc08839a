"""What the Triton kernels of the rotated codecs share; for the forms of a tile see `cuda`."""

# Triton unrolls loops over tuples, and a tuple grows by a sum.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

import torch
import triton.language as tl

from gradq.codecs.rotated.format import POLYNOMIALS
from gradq.kernels.triton_tools import as_bits, as_float, fused, jit, mix32

__all__ = [
    "TWICE",
    "add",
    "bf16_scales",
    "column_sums",
    "constants",
    "index",
    "inverse_unit",
    "joined",
    "level",
    "load",
    "negated",
    "parted",
    "places",
    "scaled_to_unit",
    "sign_words",
    "signed_unit",
    "split",
    "stage",
    "store",
    "swap",
    "to_columns",
    "transform",
]


TWICE = tl.constexpr(0x4A800000)  # the bits of 2**22, whose last bit is a half: a conversion would cost more


def constants(num_bits: int) -> tuple[float, ...]:
    """The polynomials of a width: top, k0 to k3, a0 to a3; see `gradq.codecs.rotated.format.Polynomials`."""
    p = POLYNOMIALS[num_bits]
    return tuple(torch.tensor((p.top, *p.to_index, *p.to_level), dtype=torch.float32).tolist())


# --- the transform -------------------------------------------------------------------------------------


@jit
def stage(z: tl.tensor, DISTANCE: tl.constexpr) -> tl.tensor:
    """Sums and differences at a distance."""
    after = ()
    for k in tl.static_range(16):
        after = after + (z[k - DISTANCE] - z[k] if k & DISTANCE else z[k] + z[k + DISTANCE],)
    return after


@jit
def transform(z: tl.tensor) -> tl.tensor:
    """Four stages of the transform, over the sixteen."""
    return stage(stage(stage(stage(z, 1), 2), 4), 8)


@jit
def joined(parts: tl.tensor) -> tl.tensor:
    """Sixteen [256] to [256, 16]."""
    for step in tl.static_range(4):
        pairs = ()
        for k in tl.static_range(8 >> step):
            pairs = pairs + (tl.join(parts[k], parts[k + (8 >> step)]),)
        parts = pairs
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
def parted(whole: tl.tensor) -> tl.tensor:
    """[M, 16] to sixteen [M]."""
    return split(tl.reshape(whole, [whole.shape[0], 2, 2, 2, 2]), 4)


@jit
def swap(z: tl.tensor) -> tl.tensor:
    """From one form to the other, through shared memory."""
    whole = tl.reshape(joined(z), [16, 16, 16])
    return parted(tl.reshape(tl.permute(whole, [2, 1, 0]), [256, 16]))


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
    by_block = tl.reshape(tl.permute(tl.reshape(by_sixteen, [8, 2, 16]), [1, 2, 0]), [32, 2, 2, 2])
    parts = split(by_block, 3)
    for step in tl.static_range(3):
        halves = ()
        for k in tl.static_range(4 >> step):
            halves = halves + (parts[k] + parts[k + (4 >> step)],)
        parts = halves
    return tl.sum(tl.reshape(parts[0], [2, 16]), axis=0)


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


# --- memory ----------------------------------------------------------------------------------------------


@jit
def places() -> tl.tensor:
    """Where the first rows of the blocks of 16 stand, [256]."""
    i = tl.arange(0, 256)
    return (i >> 4) * 256 + (i & 15)


@jit
def load(numbers: tl.tensor, at: tl.tensor, left: tl.tensor, SHORT: tl.constexpr) -> tl.tensor:
    """Numbers of a tile; SHORT: only the first `left`, then zeros."""
    return tl.load(numbers + at, mask=at < left, other=0.0) if SHORT else tl.load(numbers + at)


@jit
def store(numbers: tl.tensor, at: tl.tensor, value: tl.tensor, left: tl.tensor, SHORT: tl.constexpr) -> None:
    """As `load`."""
    if SHORT:
        tl.store(numbers + at, value, mask=at < left)
    else:
        tl.store(numbers + at, value)


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
def scaled_to_unit(z: tl.tensor) -> tl.tensor:
    """Values times their unit, zeros if all are denormals or one is NaN or Inf; largest exponent; unit."""
    largest = tl.zeros([256], tl.int32)
    for k in tl.static_range(16):
        largest = tl.maximum(largest, (as_bits(z[k]) & 0x7FFFFFFF).to(tl.int32))
    exponent = tl.max(largest, axis=0) >> 23
    to_unit = _unit(exponent)
    usable = (exponent > 0) & (exponent < 255)
    scaled = ()
    for k in tl.static_range(16):
        scaled = scaled + (tl.where(usable, z[k] * to_unit, 0.0),)
    return scaled, exponent, to_unit


@jit
def signed_unit(z: tl.tensor) -> tl.tensor:
    """Values with signs, of moderate size or scaled to it; energies [16]; the largest's exponent; unit.

    The energies show most tiles to be moderate. Others, and those with NaN (exponent 255), are looked at
    element by element; with NaN, Inf or denormals only they are zeros.
    """
    energy = column_sums(z, z)
    most = tl.max((as_bits(energy) & 0x7FFFFFFF).to(tl.int32), axis=0)
    exponent = 127 + tl.zeros_like(most)
    to_unit = 1.0 + tl.zeros_like(most).to(tl.float32)
    if (most < ((127 - 70) << 23)) | (most >= ((127 + 78) << 23)):  # root, over 256 rows: 2**-39 ... 2**39
        z, exponent, to_unit = scaled_to_unit(z)
        energy = column_sums(z, z)
    return z, energy, exponent, to_unit


@jit
def inverse_unit(to_unit: tl.tensor) -> tl.tensor:
    """1 / to_unit, a power of two: a product with it is the quotient."""
    return as_float((254 << 23) - as_bits(to_unit))


@jit
def _unit(exponent: tl.tensor) -> tl.tensor:
    """What brings the largest magnitude, of this exponent field, into [1, 2); 1 where it is moderate."""
    moderate = (exponent >= 87) & (exponent < 167)
    bits = tl.minimum(tl.maximum(254 - exponent, 1), 253) << 23
    return tl.where(moderate, 0x3F800000, bits).to(tl.float32, bitcast=True)


@jit
def _polynomial(
    x: tl.tensor, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr
) -> tl.tensor:
    """c0 + c1 x + c2 x² + c3 x³ of finite x; without last coefficients of 0, which change nothing."""
    value = tl.full(x.shape, C0, tl.float32)
    if C3 != 0:
        value = fused(x, fused(x, fused(x, C3, C2), C1), C0)
    elif C2 != 0:
        value = fused(x, fused(x, C2, C1), C0)
    elif C1 != 0:
        value = fused(x, C1, C0)
    return value


@jit
def index(y: tl.tensor, BITS: tl.constexpr, LEVELS: tl.constexpr) -> tl.tensor:
    """Codes of normalized values."""
    y = tl.minimum(tl.maximum(y, -LEVELS[0]), LEVELS[0])
    slope = _polynomial(y * y, LEVELS[1], LEVELS[2], LEVELS[3], LEVELS[4])
    return fused(y, slope, 1.0 * (1 << (BITS - 1))).to(tl.int32)


@jit
def level(twice: tl.tensor, BITS: tl.constexpr, LEVELS: tl.constexpr) -> tl.tensor:
    """Levels of codes, given twice the codes plus TWICE."""
    m = as_float(twice.to(tl.uint32)) - (4194304.0 + ((1 << BITS) - 1) / 2)
    return m * _polynomial(m * m, LEVELS[5], LEVELS[6], LEVELS[7], LEVELS[8])


@jit
def bf16_scales(scale: tl.tensor, word: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    """The bits of scales rounded by 16-bit words, [G]; NaN if the tile cannot be sent."""
    bits = tl.where(scale < 2.0**-126, 0, (as_bits(scale) + word) >> 16).to(tl.uint32)
    overflow = (as_bits(as_float(bits << 16) * 4096.0) & 0x7FFFFFFF) >= 0x7F800000
    lost = (tl.max(overflow.to(tl.int32), axis=0) > 0) | (exponent == 255)
    return tl.where(lost, 0x7FC0, bits).to(tl.uint32)
