"""The encoder of the rotated codecs in Triton; see `gradq.codecs.rotated.cuda` for the forms of a tile."""

# Triton unrolls loops over tuples, and a tuple grows by a sum.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

from functools import partial

import triton.language as tl

from gradq.codecs.rotated.cuda_decode import FULL, TAIL, decode_tile, tile_of
from gradq.codecs.rotated.cuda_rotation import (
    TWICE,
    bf16_scales,
    column_sums,
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
from gradq.codecs.rotated.cuda_tail import encode_tail
from gradq.kernels.triton_tools import jit, mix32, move, quotient, root, store_number

__all__ = ["encode_program"]


@jit
def encode_program(
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
    tile = tile_of(LAST)
    if tile == 0:
        store_number(payload, base.to(tl.uint32), None, 4)
    x = move(x, tile * 4096, 16 if ALIGNED else 4)
    residual = move(residual, tile * 4096, 16 if ALIGNED else 4)
    new_residual = move(new_residual, tile * 4096, 16 if ALIGNED else 4)
    tile_key = mix32(base.to(tl.uint32) + tile.to(tl.uint32))
    if LAST != FULL and tl.program_id(0) == 0:
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
                last, BITS, LEVELS, ALIGNED, FULL,
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
    if KIND == TAIL:
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
    decoded, scale = decode_tile(payload, codes_at, tile, tile_key, last, BITS, LEVELS, ALIGNED, KIND)
    for k in tl.static_range(16):
        old = load(residual, at + 16 * k, last[0], KIND != FULL)
        value = load(x, at + 16 * k, last[0], KIND != FULL) + old * loss_scale
        error = (value - decoded[k]) * inverse_loss_scale
        error = tl.where(scale != scale, old, error)  # nothing was sent
        store(new_residual, at + 16 * k, error, last[0], KIND != FULL)


_write_residual_of_last = jit(_write_residual.fn, inline=False)


@jit
def _store_plane(packed: tl.tensor, codes: tl.tensor, W: tl.constexpr, DONE: tl.constexpr) -> None:
    """A plane of W bits, those above the DONE lowest."""
    for b in tl.static_range(2 * W):
        byte = (codes[b] >> DONE) & ((1 << W) - 1)
        for i in tl.static_range(1, 8 // W):
            byte = byte | (((codes[b + 2 * W * i] >> DONE) & ((1 << W) - 1)) << (W * i))
        tl.store(packed + (512 * DONE + 256 * b), byte.to(tl.uint8))
