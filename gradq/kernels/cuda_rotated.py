"""The rotated codecs in Triton: byte for byte what `gradq.kernels.reference_rotated` writes.

A program takes one tile of 256 rows of 16 columns; this module has the full ones, `cuda_rotated_tail` the
last of a segment. With row 16 h + l, a tile is a tensor in one of two forms: [h, column, l], or [l, column,
h]. A thread holds all 16 of the last index, so in the first form the low stages of the transform (distances
1, 2, 4, 8) need no exchange between threads, in the second the high ones (16, 32, 64, 128) and the packing of
codes. `swap` goes from one form to the other, through shared memory.

There is no trellis: its search is one long chain of decisions. Not run on a GPU.
"""

# Triton unrolls loops over tuples, and a tuple grows by a sum.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gradq.errors import KernelError
from gradq.kernels.cuda_rotated_tail import decode_tail, encode_tail, window
from gradq.kernels.cuda_rotated_tools import (
    bf16_scales,
    column_sums,
    constants,
    index,
    join,
    level,
    negated,
    stages,
    swap,
    unit,
)
from gradq.kernels.cuda_tools import (
    aligned,
    as_float,
    check,
    check_rows,
    jit,
    launch,
    load_number,
    mix32,
    move,
    signed32,
    store_number,
)
from gradq.kernels.rotated import TILE, payload_bytes

__all__ = ["rotated_decode", "rotated_decode_mean", "rotated_encode"]


@jit
def _encode(
    x: tl.tensor,
    residual: tl.tensor,
    new_residual: tl.tensor,
    payload: tl.tensor,
    base: tl.tensor,
    codes_at: tl.tensor,
    loss_scale: tl.tensor,
    inverse_loss_scale: tl.tensor,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    UNBIASED: tl.constexpr,
    READ: tl.constexpr,
    WRITE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    tile = tl.program_id(0).to(tl.int64)
    if tile == 0:
        store_number(payload, base.to(tl.uint32), None, 4)
    x = move(x, tile * 4096, 16 if ALIGNED else 4)
    residual = move(residual, tile * 4096, 16 if ALIGNED else 4)
    new_residual = move(new_residual, tile * 4096, 16 if ALIGNED else 4)
    tile_key = mix32(base.to(tl.uint32) + tile.to(tl.uint32))

    # 1. values; absmax through the bit pattern, which has no NaN to lose
    value = _load_tile(x)
    if READ:
        value = value + _load_tile(residual) * loss_scale
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    exponent = tl.max(tl.max(tl.max(bits, axis=2), axis=1), axis=0) >> 23

    # 2. signs, unit, energy, transform
    to_unit = unit(exponent)
    usable = (exponent > 0) & (exponent < 255)
    z = tl.where(usable, negated(value, tile_key) * to_unit, 0.0)
    energy = column_sums(z * z)
    z = stages(swap(stages(z)))

    # 3. codes and levels
    full = tl.full([16], 256.0, tl.float32)
    sigma = tl.sqrt_rn(tl.div_rn(energy * 256.0, full))
    coded = energy >= 2.0**-120
    inverse = tl.where(coded, tl.div_rn(tl.full([16], 1.0, tl.float32), sigma), 0.0)
    codes = index(z * inverse[None, :, None], BITS, LEVELS)
    levels = level(codes, BITS, LEVELS)
    inner = column_sums(levels * z)
    packed = move(payload, codes_at + tile * (512 * BITS), 4 if ALIGNED else 1)
    if BITS & 4:
        tl.store(packed + _run(8), _plane(codes, 4, 0).to(tl.uint8))
    if BITS & 2:
        tl.store(packed + 512 * (BITS & 4) + _run(4), _plane(codes, 2, BITS & 4).to(tl.uint8))
    if BITS & 1:
        tl.store(packed + 512 * (BITS & 6) + _run(2), _plane(codes, 1, BITS & 6).to(tl.uint8))

    # 4. scales
    if UNBIASED:
        scale = tl.div_rn(energy, inner)
        word = mix32(tile_key + (128 + tl.arange(0, 16)).to(tl.uint32)) & 0xFFFF
    else:
        scale = tl.div_rn(tl.div_rn(inner, column_sums(levels * levels)), full)
        word = tl.full([16], 0x8000, tl.uint32)
    scale = tl.where(coded, tl.div_rn(scale, tl.zeros([16], tl.float32) + to_unit), 0.0)
    bits, scale, lost = bf16_scales(scale, word, exponent)
    store_number(payload + 4 + tile * 32 + 2 * tl.arange(0, 16), bits, None, 2)

    # 5. what is lost; x and the residual are read again, from the cache
    if WRITE:
        decoded = negated(stages(swap(stages(levels))) * scale[None, :, None], tile_key)
        at = _places()
        old = tl.load(residual + at)
        error = (tl.load(x + at) + old * loss_scale - decoded) * inverse_loss_scale
        tl.store(new_residual + at, tl.where(lost, old, error))


@jit
def _places() -> tl.tensor:
    """Where the elements of [h, column, l] stand."""
    i = tl.arange(0, 16)
    return i[:, None, None] * 256 + i[None, :, None] + i[None, None, :] * 16


@jit
def _run(COUNT: tl.constexpr) -> tl.tensor:
    """Where the first COUNT of the last index of [l, column, h] stand."""
    i = tl.arange(0, 16)
    return i[:, None, None] * 16 + i[None, :, None] + tl.arange(0, COUNT)[None, None, :] * 256


@jit
def _load_tile(at: tl.tensor) -> tl.tensor:
    """A tile as [h, column, l]: one l after another, so that a thread has them all at once."""
    place = tl.arange(0, 16)[:, None] * 256 + tl.arange(0, 16)[None, :]
    rows = ()
    for k in tl.static_range(16):
        rows = rows + (tl.reshape(tl.load(at + (place + 16 * k)), [256]),)
    return join(rows)


@jit
def _fold(digits: tl.tensor, M: tl.constexpr, UP: tl.constexpr) -> tl.tensor:
    """[16, 16, M] to [16, 16, M / 2]: the upper half goes UP bits higher."""
    low, high = tl.split(tl.permute(tl.reshape(digits, [16, 16, 2, M // 2]), [0, 1, 3, 2]))
    return low | (high << UP)


@jit
def _unfold(digits: tl.tensor, M: tl.constexpr, UP: tl.constexpr) -> tl.tensor:
    """[16, 16, M / 2] to [16, 16, M], the inverse of `_fold` but for what stands above the digits."""
    return tl.reshape(tl.permute(tl.join(digits, digits >> UP), [0, 1, 3, 2]), [16, 16, M])


@jit
def _plane(codes: tl.tensor, W: tl.constexpr, DONE: tl.constexpr) -> tl.tensor:
    """Bytes of a plane of W bits, those above the DONE lowest: [16, 16, 2 W]."""
    digits = _fold((codes >> DONE) & ((1 << W) - 1), 16, 4)
    if W < 4:
        digits = _fold(digits, 8, 2)
    if W < 2:
        digits = _fold(digits, 4, 1)
    return digits


@jit
def _digits(plane: tl.tensor, W: tl.constexpr, DONE: tl.constexpr) -> tl.tensor:
    """What a plane adds to the codes [16, 16, 16]."""
    digits = plane.to(tl.int32)
    if W < 2:
        digits = _unfold(digits, 4, 1)
    if W < 4:
        digits = _unfold(digits, 8, 2)
    return (_unfold(digits, 16, 4) & ((1 << W) - 1)) << DONE


@jit
def _decode_mean(
    payloads: tl.tensor,
    out: tl.tensor,
    codes_at: tl.tensor,
    num_rows: tl.tensor,
    stride: tl.tensor,
    reciprocal: tl.tensor,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EXACT_RECIPROCAL: tl.constexpr,
) -> None:
    tile = tl.program_id(0).to(tl.int64)
    out = move(out, tile * 4096, 16 if ALIGNED else 4)
    codes_at = codes_at + tile * (512 * BITS)
    total = tl.full([16, 16, 16], -0.0, tl.float32)  # -0 + v is v, for every v
    for _ in range(num_rows):
        tile_key = mix32(load_number(payloads, None, 4) + tile.to(tl.uint32))
        scale = as_float(load_number(payloads + 4 + tile * 32 + 2 * tl.arange(0, 16), None, 2) << 16)
        packed = move(payloads, codes_at, 4 if ALIGNED else 1)
        codes = tl.zeros([16, 16, 16], tl.int32)
        if BITS & 4:
            codes = codes | _digits(tl.load(packed + _run(8)), 4, 0)
        if BITS & 2:
            codes = codes | _digits(tl.load(packed + 512 * (BITS & 4) + _run(4)), 2, BITS & 4)
        if BITS & 1:
            codes = codes | _digits(tl.load(packed + 512 * (BITS & 6) + _run(2)), 1, BITS & 6)
        z = stages(swap(stages(level(codes, BITS, LEVELS)))) * scale[None, :, None]
        total = total + tl.where(z != z, z, negated(z, tile_key))  # one NaN: not a negative one
        payloads = payloads + stride.to(tl.int64)
    if EXACT_RECIPROCAL:  # of a power of two: a product with it equals the quotient
        mean = total * reciprocal
    else:
        mean = tl.div_rn(total, tl.zeros([16, 16, 16], tl.float32) + num_rows.to(tl.float32))
    tl.store(out + _places(), mean)


def rotated_encode(
    x: Tensor,
    payload: Tensor,
    *,
    num_bits: int,
    trellis: bool,
    unbiased: bool,
    base: int,
    residual: Tensor | None,
    new_residual: Tensor | None,
    loss_scale: float,
) -> None:
    """Encode x + loss_scale * residual in one pass; the format is the reference's.

    Raises:
        KernelError: a trellis was asked for, or see `cuda_tools.check`.
    """
    assert new_residual is None or residual is not None
    _refuse(num_bits, trellis)
    if (n := x.numel()) == 0:
        return
    device = x.device
    check(x, torch.float32, n, device)
    check(payload, torch.uint8, payload_bytes(n, num_bits), device)
    old = x if residual is None else check(residual, torch.float32, n, device)
    new = x if new_residual is None else check(new_residual, torch.float32, n, device)
    scales = float(loss_scale), 1.0 / loss_scale
    how: dict[str, Any] = {
        "BITS": num_bits,
        "LEVELS": constants(num_bits),
        "UNBIASED": unbiased,
        "READ": residual is not None,
        "WRITE": new_residual is not None,
    }
    args = (x, old, new, payload, signed32(base), _codes_at(n), *scales)
    if full := n // TILE:
        at_16 = aligned(x, old, new) and _codes_aligned(payload, 0, n)
        launch(_encode, full, x, *args, ALIGNED=at_16, **how)
    if n % TILE:
        launch(encode_tail, 1, x, *args, n, *window(n), **how)


def rotated_decode(payload: Tensor, out: Tensor, *, num_bits: int, trellis: bool) -> None:
    """Decode one segment into out; see `rotated_encode`."""
    rotated_decode_mean(payload[None], out, num_bits=num_bits, trellis=trellis)


def rotated_decode_mean(payloads: Tensor, out: Tensor, *, num_bits: int, trellis: bool) -> None:
    """Mean over the W rows of payloads, added in row order in fp32, divided once; see `rotated_encode`."""
    _refuse(num_bits, trellis)
    if (n := out.numel()) == 0:
        return
    check(out, torch.float32, n, out.device)
    num_rows, stride = check_rows(payloads, payload_bytes(n, num_bits), out.device)
    how: dict[str, Any] = {
        "BITS": num_bits,
        "LEVELS": constants(num_bits),
        "EXACT_RECIPROCAL": num_rows & (num_rows - 1) == 0,
    }
    args = (payloads, out, _codes_at(n), num_rows, stride, 1.0 / num_rows)
    if full := n // TILE:
        at_16 = aligned(out) and _codes_aligned(payloads, stride, n)
        launch(_decode_mean, full, out, *args, ALIGNED=at_16, **how)
    if n % TILE:
        launch(decode_tail, 1, out, *args, n, *window(n), **how)


def _codes_at(n: int) -> int:
    """Where the codes of a segment start."""
    return payload_bytes(n, 1) - 2 * -(-n // 16)


def _codes_aligned(payload: Tensor, stride: int, n: int) -> bool:
    """Whether the codes of every row start at a multiple of 4."""
    return (payload.data_ptr() + _codes_at(n)) % 4 == 0 and stride % 4 == 0


def _refuse(num_bits: int, trellis: bool) -> None:
    if trellis:
        raise KernelError(
            f"gradq has no CUDA kernels for a trellis (the codecs rot1, rot2 and trellis1 to trellis4): use "
            f"'rot{num_bits}(levels=scalar)' on CUDA tensors instead"
        )
