"""The rotated codecs in Triton: byte for byte what `gradq.codecs.rotated.reference` writes.

A program takes one tile of 256 rows of 16 columns; this module has those of 256 rows, `cuda_tail` a
last one of fewer. With row 16 h + l, a tile is sixteen tensors [256] in one of two forms: one for each l, of
the elements [h, column]; or one for each h, of [l, column]. In the first the low stages of the transform
(distances 1, 2, 4, 8) are sums of whole tensors, in the second the high ones (16, 32, 64, 128) and the
packing of codes. `swap` goes from one form to the other, through shared memory; nothing else does.

There is no trellis: its search is one long chain of decisions.
"""

# Triton unrolls loops over tuples, and a tuple grows by a sum.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gradq.codecs.rotated.cuda_rotation import (
    TWICE,
    add,
    bf16_scales,
    column_sums,
    constants,
    index,
    inverse_unit,
    level,
    load,
    negated,
    places,
    sign_words,
    signed_unit,
    store,
    swap,
    to_columns,
    transform,
)
from gradq.codecs.rotated.cuda_tail import encode_tail, unrotated_tail, window
from gradq.codecs.rotated.format import COLUMNS, TILE, RotatedFormat, rotation_base
from gradq.errors import KernelError
from gradq.kernels.triton_tools import (
    aligned,
    as_float,
    check,
    check_rows,
    jit,
    launch,
    load_number,
    mix32,
    move,
    quotient,
    root,
    signed32,
    store_number,
)
from gradq.rng import EncodeContext

__all__ = ["decode", "decode_mean", "encode"]

_NUM_WARPS = 8  # a thread holds one element of [256], and has `swap` move the data once
# registers of a thread: of one that encodes, by whether it writes a residual, and of one that decodes, by
# whether there is only one payload; a last tile would take more, and give full ones fewer threads
_ENCODE_REGISTERS = {False: 48, True: 64}
_DECODE_REGISTERS = {False: 64, True: 32}
_FULL, _SHORT, _TAIL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # a last tile of 256 rows; of fewer


@jit
def _tile(LAST: tl.constexpr) -> tl.tensor:
    """The program's tile: the last goes to the first program, if it is not a full one."""
    tile = tl.program_id(0).to(tl.int64)
    if LAST != _FULL:
        tile = (tile + tl.num_programs(0) - 1) % tl.num_programs(0)
    return tile


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
    left: tl.tensor,
    rows: tl.tensor,
    size: tl.tensor,
    factor: tl.tensor,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    UNBIASED: tl.constexpr,
    READ: tl.constexpr,
    WRITE: tl.constexpr,
    ALIGNED: tl.constexpr,
    LAST: tl.constexpr,
) -> None:
    """Encode a tile; the LAST may have only `left` elements.

    left, rows, size, factor: of the last tile; other functions take them together.
    """
    last = left, rows, size, factor
    tile = _tile(LAST)
    if tile == 0:
        store_number(payload, base.to(tl.uint32), None, 4)
    x = move(x, tile * 4096, 16 if ALIGNED else 4)
    residual = move(residual, tile * 4096, 16 if ALIGNED else 4)
    new_residual = move(new_residual, tile * 4096, 16 if ALIGNED else 4)
    tile_key = mix32(base.to(tl.uint32) + tile.to(tl.uint32))
    if LAST != _FULL and tl.program_id(0) == 0:
        _encode_last(
            x, residual, payload, codes_at, tile, tile_key, loss_scale, last,
            BITS, LEVELS, UNBIASED, READ, ALIGNED, LAST,
        )  # fmt: skip
        if WRITE:
            tl.debug_barrier()
            _write_residual_of_last(
                x, residual, new_residual, payload, codes_at, tile, tile_key, loss_scale, inverse_loss_scale,
                last, BITS, LEVELS, ALIGNED, LAST,
            )  # fmt: skip
    else:
        _encode_tile(
            x, residual, payload, codes_at, tile, tile_key, loss_scale, left,
            BITS, LEVELS, UNBIASED, READ, ALIGNED, False,
        )  # fmt: skip
        if WRITE:
            tl.debug_barrier()
            _write_residual(
                x, residual, new_residual, payload, codes_at, tile, tile_key, loss_scale, inverse_loss_scale,
                last, BITS, LEVELS, ALIGNED, _FULL,
            )  # fmt: skip


@jit
def _encode_tile(
    x: tl.tensor,
    residual: tl.tensor,
    payload: tl.tensor,
    codes_at: tl.tensor,
    tile: tl.tensor,
    tile_key: tl.tensor,
    loss_scale: tl.tensor,
    left: tl.tensor,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    UNBIASED: tl.constexpr,
    READ: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHORT: tl.constexpr,
) -> None:
    """Encode the tile of 256 rows that x and residual point to; SHORT: only `left` elements of it."""
    # 1. values with their signs, unit, energy, transform
    at = places()
    word = sign_words(tile_key)
    z = ()
    for k in tl.static_range(16):
        value = load(x, at + 16 * k, left, SHORT)
        if READ:
            value = value + load(residual, at + 16 * k, left, SHORT) * loss_scale
        z = z + (negated(value, word, k),)
    z, energy, exponent, to_unit = signed_unit(z)
    z = transform(swap(transform(z)))

    # 2. codes and levels
    coded = energy >= 2.0**-120
    inverse = tl.where(coded, quotient(tl.full([16], 1.0, tl.float32), root(energy)), 0.0)
    inverse = to_columns(inverse)
    codes = ()
    levels = ()
    for k in tl.static_range(16):
        code = index(z[k] * inverse, BITS, LEVELS)
        codes = codes + (code,)
        levels = levels + (level((code + code) + TWICE, BITS, LEVELS),)
    inner = column_sums(levels, z)
    packed = move(payload, codes_at + tile * (512 * BITS), 4 if ALIGNED else 1) + tl.arange(0, 256)
    if BITS & 4:
        _store_plane(packed, codes, 4, 0)
    if BITS & 2:
        _store_plane(packed, codes, 2, BITS & 4)
    if BITS & 1:
        _store_plane(packed, codes, 1, BITS & 6)

    # 3. scales
    if UNBIASED:
        scale = quotient(energy, inner)
        word16 = mix32(tile_key + (128 + tl.arange(0, 16)).to(tl.uint32)) & 0xFFFF
    else:
        scale = quotient(inner, column_sums(levels, levels)) * 0.00390625
        word16 = tl.full([16], 0x8000, tl.uint32)
    scale = tl.where(coded, scale * inverse_unit(to_unit), 0.0)
    bits = bf16_scales(scale, word16, exponent)
    store_number(payload + 4 + tile * 32 + 2 * tl.arange(0, 16), bits, None, 2)


@partial(jit, inline=False)
def _encode_last(
    x: tl.tensor,
    residual: tl.tensor,
    payload: tl.tensor,
    codes_at: tl.tensor,
    tile: tl.tensor,
    tile_key: tl.tensor,
    loss_scale: tl.tensor,
    last: tl.tensor,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    UNBIASED: tl.constexpr,
    READ: tl.constexpr,
    ALIGNED: tl.constexpr,
    KIND: tl.constexpr,
) -> None:
    if KIND == _TAIL:
        encode_tail(
            x, residual, payload, codes_at, tile, tile_key, loss_scale, last,
            BITS, LEVELS, UNBIASED, READ,
        )  # fmt: skip
    else:
        _encode_tile(
            x, residual, payload, codes_at, tile, tile_key, loss_scale, last[0],
            BITS, LEVELS, UNBIASED, READ, ALIGNED, True,
        )  # fmt: skip


@jit
def _write_residual(
    x: tl.tensor,
    residual: tl.tensor,
    new_residual: tl.tensor,
    payload: tl.tensor,
    codes_at: tl.tensor,
    tile: tl.tensor,
    tile_key: tl.tensor,
    loss_scale: tl.tensor,
    inverse_loss_scale: tl.tensor,
    last: tl.tensor,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    KIND: tl.constexpr,
) -> None:
    """What an encoded tile has lost.

    Codes, x and the residual are read again, from the cache: it costs less than to keep them in registers.
    """
    at = places()
    decoded, scale = _decode(payload, codes_at, tile, tile_key, last, BITS, LEVELS, ALIGNED, KIND)
    for k in tl.static_range(16):
        old = load(residual, at + 16 * k, last[0], KIND != _FULL)
        value = load(x, at + 16 * k, last[0], KIND != _FULL) + old * loss_scale
        error = (value - decoded[k]) * inverse_loss_scale
        error = tl.where(scale != scale, old, error)  # nothing was sent
        store(new_residual, at + 16 * k, error, last[0], KIND != _FULL)


_write_residual_of_last = jit(_write_residual.fn, inline=False)


@jit
def _store_plane(packed: tl.tensor, codes: tl.tensor, W: tl.constexpr, DONE: tl.constexpr) -> None:
    """A plane of W bits, those above the DONE lowest."""
    for b in tl.static_range(2 * W):
        byte = (codes[b] >> DONE) & ((1 << W) - 1)
        for i in tl.static_range(1, 8 // W):
            byte = byte | (((codes[b + 2 * W * i] >> DONE) & ((1 << W) - 1)) << (W * i))
        tl.store(packed + (512 * DONE + 256 * b), byte.to(tl.uint8))


@jit
def _load_plane(packed: tl.tensor, W: tl.constexpr, DONE: tl.constexpr) -> tl.tensor:
    """The 2 W bytes of a plane of W bits above the DONE lowest."""
    plane = ()
    for b in tl.static_range(2 * W):
        plane = plane + (tl.load(packed + (512 * DONE + 256 * b)).to(tl.int32),)
    return plane


@jit
def _digit(plane: tl.tensor, W: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr) -> tl.tensor:
    """The W bits from one place at another."""
    moved = plane >> (FROM - TO) if FROM >= TO else plane << (TO - FROM)
    return moved & (((1 << W) - 1) << TO)


@jit
def _levels(packed: tl.tensor, BITS: tl.constexpr, LEVELS: tl.constexpr) -> tl.tensor:
    """The levels of the codes at packed."""
    plane4 = ()
    plane2 = ()
    plane1 = ()
    if BITS & 4:
        plane4 = _load_plane(packed, 4, 0)
    if BITS & 2:
        plane2 = _load_plane(packed, 2, BITS & 4)
    if BITS & 1:
        plane1 = _load_plane(packed, 1, BITS & 6)
    levels = ()
    for k in tl.static_range(16):
        twice = tl.zeros([256], tl.int32)
        if BITS & 4:
            twice = _digit(plane4[k % 8], 4, 4 * (k // 8), 1)
        if BITS & 2:
            twice = twice | _digit(plane2[k % 4], 2, 2 * (k // 4), 1 + (BITS & 4))
        if BITS & 1:
            twice = twice | _digit(plane1[k % 2], 1, k // 2, 1 + (BITS & 6))
        levels = levels + (level(twice | TWICE, BITS, LEVELS),)
    return levels


@jit
def _decode_mean(
    payloads: tl.tensor,
    out: tl.tensor,
    codes_at: tl.tensor,
    num_rows: tl.tensor,
    stride: tl.tensor,
    reciprocal: tl.tensor,
    left: tl.tensor,
    rows: tl.tensor,
    size: tl.tensor,
    factor: tl.tensor,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SINGLE: tl.constexpr,
    EXACT_RECIPROCAL: tl.constexpr,
    LAST: tl.constexpr,
) -> None:
    """Decode a tile; see `_encode`."""
    last = left, rows, size, factor
    tile = _tile(LAST)
    out = move(out, tile * 4096, 16 if ALIGNED else 4)
    if LAST != _FULL and tl.program_id(0) == 0:
        _mean_of_tile(
            payloads, out, codes_at, num_rows, stride, reciprocal, tile, last,
            BITS, LEVELS, ALIGNED, SINGLE, EXACT_RECIPROCAL, LAST,
        )  # fmt: skip
    else:
        _mean_of_tile(
            payloads, out, codes_at, num_rows, stride, reciprocal, tile, last,
            BITS, LEVELS, ALIGNED, SINGLE, EXACT_RECIPROCAL, _FULL,
        )  # fmt: skip


@jit
def _mean_of_tile(
    payloads: tl.tensor,
    out: tl.tensor,
    codes_at: tl.tensor,
    num_rows: tl.tensor,
    stride: tl.tensor,
    reciprocal: tl.tensor,
    tile: tl.tensor,
    last: tl.tensor,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SINGLE: tl.constexpr,
    EXACT_RECIPROCAL: tl.constexpr,
    KIND: tl.constexpr,
) -> None:
    if SINGLE:
        tile_key = mix32(load_number(payloads, None, 4) + tile.to(tl.uint32))
        total, _ = _decode(payloads, codes_at, tile, tile_key, last, BITS, LEVELS, ALIGNED, KIND)
    else:
        zero = tl.full([256], -1.0, tl.float32) * 0.0  # -0, which Triton knows no constant of: -0 + v is v
        total = (zero, zero, zero, zero) * 4
        for _rank in range(num_rows):
            tile_key = mix32(load_number(payloads, None, 4) + tile.to(tl.uint32))
            values, _ = _decode(payloads, codes_at, tile, tile_key, last, BITS, LEVELS, ALIGNED, KIND)
            total = add(total, values)
            payloads = payloads + stride.to(tl.int64)
    at = places()
    for k in tl.static_range(16):
        mean = total[k]
        if not SINGLE:
            if EXACT_RECIPROCAL:  # of a power of two: a product with it equals the quotient
                mean = mean * reciprocal
            else:
                mean = quotient(mean, tl.zeros([256], tl.float32) + num_rows.to(tl.float32))
        store(out, at + 16 * k, mean, last[0], KIND != _FULL)


@jit
def _decode(
    payload: tl.tensor,
    codes_at: tl.tensor,
    tile: tl.tensor,
    tile_key: tl.tensor,
    last: tl.tensor,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    KIND: tl.constexpr,
) -> tl.tensor:
    """The values of a tile, [h, column], and their scales, [256]."""
    column = tl.arange(0, 256) & 15
    if KIND == _TAIL:
        column = column * ((last[0] + 255) // 256) // 16
    scale = as_float(load_number(payload + 4 + tile * 32 + 2 * column, None, 2) << 16)
    if KIND == _TAIL:
        z = unrotated_tail(payload + codes_at + tile * (512 * BITS), tile_key, last, BITS, LEVELS)
    else:
        packed = move(payload, codes_at + tile * (512 * BITS), 4 if ALIGNED else 1) + tl.arange(0, 256)
        z = transform(swap(transform(_levels(packed, BITS, LEVELS))))
    word = sign_words(tile_key)
    values = ()
    for k in tl.static_range(16):
        values = values + (negated(z[k] * scale, word, k),)
    return values, scale


def encode(
    x: Tensor,
    payload: Tensor,
    form: RotatedFormat,
    context: EncodeContext,
    residual: Tensor | None = None,
    new_residual: Tensor | None = None,
) -> None:
    """Encode x + loss_scale * residual in one pass; the format is the reference's.

    Raises:
        KernelError: the format has a trellis, or see `triton_tools.check`.
    """
    assert new_residual is None or residual is not None
    _refuse(form)
    if (n := x.numel()) == 0:
        return
    device, scale = x.device, float(context.loss_scale)
    check(x, torch.float32, n, device)
    check(payload, torch.uint8, form.nbytes(n), device)
    old = x if residual is None else check(residual, torch.float32, n, device)
    new = x if new_residual is None else check(new_residual, torch.float32, n, device)
    how: dict[str, Any] = {
        "BITS": form.num_bits,
        "LEVELS": constants(form.num_bits),
        "UNBIASED": form.unbiased,
        "READ": residual is not None,
        "WRITE": new_residual is not None,
        "ALIGNED": aligned(x, old, new) and _codes_aligned(payload, 0, n, form),
        "LAST": _last(n),
    }
    registers = _ENCODE_REGISTERS[new_residual is not None]
    args = (x, old, new, payload, signed32(rotation_base(context)), form.codes_at(n), scale, 1.0 / scale)
    launch(
        _encode, -(-n // TILE), x, *args, n % TILE, *window(n), num_warps=_NUM_WARPS, maxnreg=registers, **how
    )


def decode(payload: Tensor, out: Tensor, form: RotatedFormat) -> None:
    """Decode one segment into out; see `encode`."""
    decode_mean(payload[None], out, form)


def decode_mean(payloads: Tensor, out: Tensor, form: RotatedFormat) -> None:
    """Mean over the W rows of payloads, added in row order in fp32, divided once; see `encode`."""
    _refuse(form)
    if (n := out.numel()) == 0:
        return
    check(out, torch.float32, n, out.device)
    num_rows, stride = check_rows(payloads, form.nbytes(n), out.device)
    how: dict[str, Any] = {
        "BITS": form.num_bits,
        "LEVELS": constants(form.num_bits),
        "EXACT_RECIPROCAL": num_rows & (num_rows - 1) == 0,
        "SINGLE": num_rows == 1,
        "ALIGNED": aligned(out) and _codes_aligned(payloads, stride, n, form),
        "LAST": _last(n),
    }
    registers = _DECODE_REGISTERS[num_rows == 1]
    args = (payloads, out, form.codes_at(n), num_rows, stride, 1.0 / num_rows)
    launch(
        _decode_mean, -(-n // TILE), out, *args, n % TILE, *window(n),
        num_warps=_NUM_WARPS, maxnreg=registers, **how,
    )  # fmt: skip


def _last(n: int) -> int:
    """What the last tile is."""
    if n % TILE == 0:
        return int(_FULL.value)
    return int((_SHORT if n % TILE > TILE - COLUMNS else _TAIL).value)


def _codes_aligned(payload: Tensor, stride: int, n: int, form: RotatedFormat) -> bool:
    """Whether the codes of every row start at a multiple of 4."""
    return (payload.data_ptr() + form.codes_at(n)) % 4 == 0 and stride % 4 == 0


def _refuse(form: RotatedFormat) -> None:
    if form.trellis:
        raise KernelError(
            "gradq has no CUDA kernels for a trellis (levels=trellis, the default of rot1 and rot2): use "
            f"'rot{form.num_bits}(levels=scalar)' on CUDA tensors instead"
        )
