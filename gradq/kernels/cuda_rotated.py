"""The rotated codecs in Triton: byte for byte what `gradq.kernels.reference_rotated` writes.

A program takes one tile of 256 rows of 16 columns; this module has the full ones, `cuda_rotated_tail` the last
of a segment. Row 16 h + l stands in one of two forms, both of 16 tensors [16, 16]: tensor number l holds
(h, column), or tensor number h holds (l, column), a run of memory. In the first the low stages of the transform
(distances 1, 2, 4, 8) need no exchange between threads, in the second the high ones (16, 32, 64, 128), and the
packing of codes. `swap` goes from one form to the other, through shared memory.

There is no trellis: its search is one long chain of decisions. Not run on a GPU.
"""

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
    level,
    sign_bits,
    signed,
    stages,
    swap,
    unit,
)
from gradq.kernels.cuda_tools import (
    aligned,
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

_WARPS = 2


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
    first = tl.arange(0, 16)[:, None]
    column = tl.arange(0, 16)[None, :]
    by_l = first * 256 + column
    by_h = first * 16 + column
    tile_key = mix32(base.to(tl.uint32) + tile.to(tl.uint32))
    signs = sign_bits(tile_key)

    # 1. values; absmax through the bit pattern, which has no NaN to lose
    values = ()
    most = tl.zeros([16, 16], tl.int32)
    for k in tl.static_range(16):
        value = tl.load(x + (by_l + 16 * k))
        if READ:
            value = value + tl.load(residual + (by_l + 16 * k)) * loss_scale
        most = tl.maximum(most, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        values = values + (value,)
    exponent = tl.max(tl.max(most, axis=1), axis=0) >> 23

    # 2. signs, unit, energy, transform
    to_unit = unit(exponent)
    usable = (exponent > 0) & (exponent < 255)
    z = ()
    squares = ()
    for k in tl.static_range(16):
        value = tl.where(usable, signed(values[k], signs, k) * to_unit, 0.0)
        z = z + (value,)
        squares = squares + (value * value,)
    energy = column_sums(squares)
    z = stages(swap(stages(z)))

    # 3. codes and levels
    full = tl.full([16], 256.0, tl.float32)
    sigma = tl.sqrt_rn(tl.div_rn(energy * 256.0, full))
    coded = energy >= 2.0**-120
    inverse = tl.where(coded, tl.div_rn(tl.full([16], 1.0, tl.float32), sigma), 0.0)[None, :]
    codes = ()
    levels = ()
    inner = ()
    norm = ()
    for k in tl.static_range(16):
        code = index(z[k] * inverse, BITS, LEVELS)
        value = level(code, BITS, LEVELS)
        codes = codes + (code,)
        levels = levels + (value,)
        inner = inner + (value * z[k],)
        norm = norm + (value * value,)
    packed = payload + codes_at + tile * (512 * BITS) + by_h
    if BITS & 4:
        _store_plane(packed, codes, 4, 0)
    if BITS & 2:
        _store_plane(packed, codes, 2, BITS & 4)
    if BITS & 1:
        _store_plane(packed, codes, 1, BITS & 6)

    # 4. scales
    if UNBIASED:
        scale = tl.div_rn(energy, column_sums(inner))
    else:
        scale = tl.div_rn(tl.div_rn(column_sums(inner), column_sums(norm)), full)
    scale = tl.where(coded, tl.div_rn(scale, tl.zeros([16], tl.float32) + to_unit), 0.0)
    word = tl.zeros([16], tl.uint32) + 0x8000
    if UNBIASED:
        word = mix32(tile_key + (128 + tl.arange(0, 16)).to(tl.uint32)) & 0xFFFF
    bits, scale, lost = bf16_scales(scale, word, exponent)
    store_number(payload + 4 + tile * 32 + 2 * tl.arange(0, 16), bits, None, 2)

    # 5. what is lost
    if WRITE:
        z = stages(swap(stages(levels)))
        for k in tl.static_range(16):
            value = tl.load(x + (by_l + 16 * k))
            old = tl.load(residual + (by_l + 16 * k))
            error = (value + old * loss_scale) - signed(z[k] * scale[None, :], signs, k)
            tl.store(new_residual + (by_l + 16 * k), tl.where(lost, old, error * inverse_loss_scale))


@jit
def _store_plane(packed: tl.tensor, codes: tl.tensor, W: tl.constexpr, DONE: tl.constexpr) -> None:
    """A plane of W bits, those above the DONE lowest."""
    for b in tl.static_range(2 * W):
        byte = (codes[b] >> DONE) & ((1 << W) - 1)
        for i in tl.static_range(1, 8 // W):
            byte = byte | (((codes[b + 2 * W * i] >> DONE) & ((1 << W) - 1)) << (W * i))
        tl.store(packed + (512 * DONE + 256 * b), byte.to(tl.uint8))


@jit
def _load_plane(packed: tl.tensor, codes: tl.tensor, W: tl.constexpr, DONE: tl.constexpr) -> tl.tensor:
    """The codes with a plane of W bits added, above the DONE lowest."""
    planes = ()
    for b in tl.static_range(2 * W):
        planes = planes + (tl.load(packed + (512 * DONE + 256 * b)).to(tl.int32),)
    more = ()
    for k in tl.static_range(16):
        digit = (planes[k % (2 * W)] >> (W * (k // (2 * W)))) & ((1 << W) - 1)
        more = more + (codes[k] | (digit << DONE),)
    return more


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
    first = tl.arange(0, 16)[:, None]
    column = tl.arange(0, 16)[None, :]
    by_l = first * 256 + column
    by_h = first * 16 + column
    zero = tl.full([16, 16], -0.0, tl.float32)  # -0 + v is v, for every v
    sums = (zero,) * 16
    for _ in range(num_rows):
        tile_key = mix32(load_number(payloads, None, 4) + tile.to(tl.uint32))
        scale = load_number(payloads + 4 + tile * 32 + 2 * tl.arange(0, 16), None, 2) << 16
        scale = scale.to(tl.float32, bitcast=True)[None, :]
        signs = tl.where(scale == scale, sign_bits(tile_key), 0).to(tl.uint32)  # one NaN: not a negative one
        packed = payloads + codes_at + tile * (512 * BITS) + by_h
        codes = (tl.zeros([16, 16], tl.int32),) * 16
        if BITS & 4:
            codes = _load_plane(packed, codes, 4, 0)
        if BITS & 2:
            codes = _load_plane(packed, codes, 2, BITS & 4)
        if BITS & 1:
            codes = _load_plane(packed, codes, 1, BITS & 6)
        z = ()
        for k in tl.static_range(16):
            z = z + (level(codes[k], BITS, LEVELS),)
        z = stages(swap(stages(z)))
        more = ()
        for k in tl.static_range(16):
            more = more + (sums[k] + signed(z[k] * scale, signs, k),)
        sums = more
        payloads = payloads + stride.to(tl.int64)
    for k in tl.static_range(16):
        if EXACT_RECIPROCAL:  # of a power of two: a product with it equals the quotient
            mean = sums[k] * reciprocal
        else:
            mean = tl.div_rn(sums[k], tl.zeros([16, 16], tl.float32) + num_rows.to(tl.float32))
        tl.store(out + (by_l + 16 * k), mean)


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
        launch(_encode, full, x, *args, num_warps=_WARPS, ALIGNED=aligned(x, old, new), **how)
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
        launch(_decode_mean, full, out, *args, num_warps=_WARPS, ALIGNED=aligned(out), **how)
    if n % TILE:
        launch(decode_tail, 1, out, *args, n, *window(n), **how)


def _codes_at(n: int) -> int:
    """Where the codes of a segment start."""
    return payload_bytes(n, 1) - 2 * -(-n // 16)


def _refuse(num_bits: int, trellis: bool) -> None:
    if trellis:
        raise KernelError(
            f"gradq has no CUDA kernels for a trellis (the codecs rot1, rot2 and trellis1 to trellis4): use "
            f"'rot{num_bits}(levels=scalar)' on CUDA tensors instead"
        )
