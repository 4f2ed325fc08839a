"""The decoder of the rotated codecs in Triton; the encoder decodes tiles as well, to write what is lost."""

# Triton unrolls loops over tuples, and a tuple grows by a sum.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

import triton.language as tl

from gradq.codecs.rotated.cuda_rotation import (
    TWICE,
    add,
    level,
    negated,
    places,
    sign_words,
    store,
    swap,
    transform,
)
from gradq.codecs.rotated.cuda_tail import unrotated_tail
from gradq.kernels.triton_tools import as_float, jit, load_number, mix32, move, quotient

__all__ = ["FULL", "SHORT_LAST", "TAIL", "decode_program", "decode_tile", "tile_of"]

# a full tile; a last one of 256 rows, whose last row is not whole; a last one of fewer rows
FULL, SHORT_LAST, TAIL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@jit
def tile_of(LAST: tl.constexpr) -> tl.tensor:
    """The program's tile: the last goes to the first program, if it is not a full one."""
    tile = tl.program_id(0).to(tl.int64)
    if LAST != FULL:
        tile = (tile + tl.num_programs(0) - 1) % tl.num_programs(0)
    return tile


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
def decode_tile(
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
    if KIND == TAIL:
        column = column * ((last[0] + 255) // 256) // 16
    scale = as_float(load_number(payload + 4 + tile * 32 + 2 * column, None, 2) << 16)
    if KIND == TAIL:
        z = unrotated_tail(payload + codes_at + tile * (512 * BITS), tile_key, last, BITS, LEVELS)
    else:
        packed = move(payload, codes_at + tile * (512 * BITS), 4 if ALIGNED else 1) + tl.arange(0, 256)
        z = transform(swap(transform(_levels(packed, BITS, LEVELS))))
    word = sign_words(tile_key)
    values = ()
    for k in tl.static_range(16):
        values = values + (negated(z[k] * scale, word, k),)
    return values, scale


@jit
def decode_program(
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
    """Decode a tile; see `encode_program`."""
    last = left, rows, size, factor
    tile = tile_of(LAST)
    out = move(out, tile * 4096, 16 if ALIGNED else 4)
    if LAST != FULL and tl.program_id(0) == 0:
        _mean_of_tile(
            payloads, out, codes_at, num_rows, stride, reciprocal, tile, last,
            BITS, LEVELS, ALIGNED, SINGLE, EXACT_RECIPROCAL, LAST,
        )  # fmt: skip
    else:
        _mean_of_tile(
            payloads, out, codes_at, num_rows, stride, reciprocal, tile, last,
            BITS, LEVELS, ALIGNED, SINGLE, EXACT_RECIPROCAL, FULL,
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
        total, _ = decode_tile(payloads, codes_at, tile, tile_key, last, BITS, LEVELS, ALIGNED, KIND)
    else:
        zero = tl.full([256], -1.0, tl.float32) * 0.0  # -0, which Triton knows no constant of: -0 + v is v
        total = (zero, zero, zero, zero) * 4
        for _rank in range(num_rows):
            tile_key = mix32(load_number(payloads, None, 4) + tile.to(tl.uint32))
            values, _ = decode_tile(payloads, codes_at, tile, tile_key, last, BITS, LEVELS, ALIGNED, KIND)
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
        store(out, at + 16 * k, mean, last[0], KIND != FULL)
