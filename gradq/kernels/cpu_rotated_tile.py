"""Full tiles of the rotated codecs in Numba, in as few passes as fit the registers.

A tile of 256 rows is transformed in two passes of 16 rows, in registers: distances 1 to 8 of rows in turn,
then 16 to 128 of rows 16 apart; the inverse the other way round. The work on either side of a pass is done
with the 16 rows while they are near::

    start      load, add the residual, signs | distances 1 to 8
    quantize   distances 16 to 128 | codes, levels, sums | distances 16 to 128
    finish     distances 1 to 8 | times the scale, signs, what is lost

Scratch is that of `cpu_rotated_rows`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gradq.kernels.cpu_rotated_rows import (
    CODES,
    INVERSE,
    NEAR,
    NORMS,
    ONES,
    PARTIAL,
    PARTIAL_NORMS,
    SCALE,
    SUMS,
    WORDS,
    add_sixteens,
    four_sums,
    level_of,
    quantize_value,
    quantizer_of,
)
from gradq.kernels.numba_tools import inline, jit
from gradq.kernels.vector import (
    LANES,
    as_row,
    as_words,
    constant_row,
    constant_words,
    fused,
    hadamard_rows,
    load_bytes,
    load_row,
    load_words,
    prefetch,
    store_bytes,
    store_row,
    store_words,
    stream_row,
)

__all__ = ["decode_tile", "finish_tile", "levels_of_tile", "quantize_tile", "start_tile"]

_STEP = 4 * LANES  # bytes from row to row in NEAR


@inline
def _signs(at: Any, block: Any, part: Any) -> Any:
    """Words whose lowest bits are the signs of a block's first row, the next ones of its second, ..."""
    word = load_words(at + WORDS + 64 * (block >> 1) + 4 * part)
    return word >> constant_words(np.uint32(16 * (block & 1)))


@inline
def _sign(word: Any) -> Any:
    return word << constant_words(np.uint32(31))


# --- start ---------------------------------------------------------------------------------------------


@jit
def start_tile(x_at: int, residual_at: int, at: int, unscale: float) -> None:
    """X + unscale * residual, signed and transformed (distances 1 to 8), to the tile; sums."""
    if residual_at != 0:
        _start(x_at, residual_at, at, np.float32(unscale), True)
    else:
        _start(x_at, residual_at, at, np.float32(unscale), False)
    add_sixteens(at + PARTIAL, at + SUMS)


@inline
def _start(x_at: Any, residual_at: Any, at: Any, unscale: Any, with_residual: Any) -> None:
    for block in range(16):
        for part in range(0, 16, LANES):
            offset, word = 1024 * block + 4 * part, _signs(at, block, part)
            sums_at = at + PARTIAL + 64 * block + 4 * part
            near_at = at + NEAR
            _start_block(x_at + offset, residual_at + offset, near_at, word, unscale, sums_at, with_residual)
            hadamard_rows(near_at, 64, at + offset, 64, load_row(at + ONES))


@inline
def _start_block(
    x_at: Any, residual_at: Any, near_at: Any, word: Any, unscale: Any, sums_at: Any, with_residual: Any
) -> None:
    s0 = s1 = s2 = s3 = constant_row(np.float32(0))
    loss, one = constant_row(unscale), constant_words(np.uint32(1))
    for offset in range(0, 1024, 256):
        from_at, add_at, to = x_at + offset, residual_at + offset, near_at + offset
        z = _start_row(from_at, add_at, to, word, loss, with_residual)
        s0, word = fused(z, z, s0), word >> one
        z = _start_row(from_at + 64, add_at + 64, to + 64, word, loss, with_residual)
        s1, word = fused(z, z, s1), word >> one
        z = _start_row(from_at + 128, add_at + 128, to + 128, word, loss, with_residual)
        s2, word = fused(z, z, s2), word >> one
        z = _start_row(from_at + 192, add_at + 192, to + 192, word, loss, with_residual)
        s3, word = fused(z, z, s3), word >> one
    store_row(sums_at, four_sums(s0, s1, s2, s3))


@inline
def _start_row(x_at: Any, residual_at: Any, near_at: Any, word: Any, loss: Any, with_residual: Any) -> Any:
    value = load_row(x_at)
    if with_residual:
        value = value + load_row(residual_at) * loss
    z = as_row(as_words(value) ^ _sign(word))
    store_row(near_at, z)
    return z


# --- quantize ------------------------------------------------------------------------------------------


@jit
def quantize_tile(
    at: int, codes_at: int, num_bits: int, with_residual: bool, next_x_at: int, next_residual_at: int
) -> None:
    """Codes of the tile and the sums of `quantize_rows`; with_residual, it becomes the transformed levels.

    Args:
        at: scratch.
        codes_at: for 4 bits codes are written as the plane that they have on the wire, in which rows r and
            r + 128 share bytes; of other widths a byte each, to CODES.
        num_bits: their width.
        with_residual: whether the levels are needed.
        next_x_at: where the next tile will be read.
        next_residual_at: and its residual.
    """
    ahead = next_x_at, next_residual_at
    if num_bits == 4:
        _quantize(at, codes_at, with_residual, True, True, ahead)
    elif num_bits < 4:
        _quantize(at, at + CODES, with_residual, False, True, ahead)
    else:
        _quantize(at, at + CODES, with_residual, False, False, ahead)
    add_sixteens(at + PARTIAL, at + SUMS)
    add_sixteens(at + PARTIAL_NORMS, at + NORMS)


@inline
def _quantize(at: Any, codes_at: Any, with_residual: Any, pack_four: Any, use_table: Any, ahead: Any) -> None:
    for first in range(16):
        for part in range(0, 16, LANES):
            z_at, to_at = at + 64 * first + 4 * part, codes_at + 16 * first + part
            hadamard_rows(z_at, 1024, at + NEAR, _STEP, load_row(at + ONES))
            sums_at = at + PARTIAL + 64 * first + 4 * part
            _quantize_block(at, to_at, part, sums_at, pack_four, use_table, ahead[part // 8] + 1024 * first)
            if LANES == 16:
                for line in range(0, 1024, 64):
                    prefetch(ahead[1] + 1024 * first + line)
            if with_residual:
                hadamard_rows(at + NEAR, _STEP, z_at, 1024, load_row(at + ONES))


@inline
def _quantize_block(
    at: Any, to_at: Any, part: Any, sums_at: Any, pack_four: Any, use_table: Any, ahead_at: Any
) -> None:
    """Two loops: of one the chains of operations are too long for the processor to overlap enough rows."""
    near_at, codes_at = at + NEAR, at + NEAR + 16 * _STEP
    inverse, quantizer = load_row(at + INVERSE + 4 * part), quantizer_of(at)
    for offset in range(0, 16 * _STEP, _STEP):
        prefetch(ahead_at + offset * (64 // _STEP))
        store_words(codes_at + offset, quantize_value(load_row(near_at + offset), inverse, quantizer))
    levels = quantizer[7]
    i0 = i1 = i2 = i3 = n0 = n1 = n2 = n3 = constant_row(np.float32(0))
    for offset in range(0, 16 * _STEP, 4 * _STEP):
        z_at, code_at = near_at + offset, codes_at + offset
        i0, n0 = _level_row(z_at, code_at, levels, use_table, i0, n0)
        i1, n1 = _level_row(z_at + _STEP, code_at + _STEP, levels, use_table, i1, n1)
        i2, n2 = _level_row(z_at + 2 * _STEP, code_at + 2 * _STEP, levels, use_table, i2, n2)
        i3, n3 = _level_row(z_at + 3 * _STEP, code_at + 3 * _STEP, levels, use_table, i3, n3)
    store_row(sums_at, four_sums(i0, i1, i2, i3))
    store_row(sums_at + PARTIAL_NORMS - PARTIAL, four_sums(n0, n1, n2, n3))
    if pack_four:
        for k in range(8):
            low, high = load_words(codes_at + _STEP * k), load_words(codes_at + _STEP * (k + 8))
            store_bytes(to_at + 256 * k, low | (high << constant_words(np.uint32(4))))
    else:
        for k in range(16):
            store_bytes(to_at + 256 * k, load_words(codes_at + _STEP * k))


@inline
def _level_row(z_at: Any, code_at: Any, levels: Any, use_table: Any, inner: Any, norm: Any) -> Any:
    z, level = load_row(z_at), level_of(load_words(code_at), levels, use_table)
    store_row(z_at, level)
    return fused(level, z, inner), fused(level, level, norm)


@jit
def levels_of_tile(at: int, packed_at: int, num_bits: int) -> None:
    """The levels of codes that stand as `quantize_tile` wrote them, transformed at distances 16 to 128."""
    if num_bits == 4:
        _levels(at, packed_at, True, True)
    elif num_bits < 4:
        _levels(at, at + CODES, False, True)
    else:
        _levels(at, at + CODES, False, False)


@inline
def _levels(at: Any, codes_at: Any, packed_four: Any, use_table: Any) -> None:
    near_at, levels = at + NEAR, quantizer_of(at)[7]
    for first in range(16):
        for part in range(0, 16, LANES):
            from_at = codes_at + 16 * first + part
            if packed_four:
                for k in range(8):
                    code = load_bytes(from_at + 256 * k)
                    low = level_of(code & constant_words(np.uint32(15)), levels, use_table)
                    high = level_of(code >> constant_words(np.uint32(4)), levels, use_table)
                    store_row(near_at + _STEP * k, low)
                    store_row(near_at + _STEP * (k + 8), high)
            else:
                for k in range(16):
                    level = level_of(load_bytes(from_at + 256 * k), levels, use_table)
                    store_row(near_at + _STEP * k, level)
            hadamard_rows(near_at, _STEP, at + 64 * first + 4 * part, 1024, load_row(at + ONES))


# --- finish --------------------------------------------------------------------------------------------


@jit
def finish_tile(
    x_at: int, residual_at: int, at: int, unscale: float, factor: float, new_at: int, stream: bool
) -> None:
    """What is lost of x + unscale * residual, times factor, to new: past the cache if asked."""
    if stream:
        _finish(x_at, residual_at, at, np.float32(unscale), np.float32(factor), new_at, True)
    else:
        _finish(x_at, residual_at, at, np.float32(unscale), np.float32(factor), new_at, False)


@inline
def _low_stages_near(at: Any, block: Any) -> None:
    for part in range(0, 64, 4 * LANES):
        hadamard_rows(at + 1024 * block + part, 64, at + NEAR + part, 64, load_row(at + ONES))


@inline
def _finish(
    x_at: Any, residual_at: Any, at: Any, unscale: Any, factor: Any, new_at: Any, stream: Any
) -> None:
    one, loss = constant_words(np.uint32(1)), constant_row(unscale)
    for block in range(16):
        _low_stages_near(at, block)
        left, right = _signs(at, block, 0), _signs(at, block, 16 - LANES)
        for k in range(16):
            offset = 1024 * block + 64 * k
            value = load_row(x_at + offset) + load_row(residual_at + offset) * loss
            _finish_row(value, at, k, 0, left, factor, new_at + offset, stream)
            left = left >> one
            if LANES == 8:
                value = load_row(x_at + offset + 32) + load_row(residual_at + offset + 32) * loss
                _finish_row(value, at, k, 32, right, factor, new_at + offset, stream)
                right = right >> one


@inline
def _finish_row(
    value: Any, at: Any, k: Any, part: Any, word: Any, factor: Any, to_at: Any, stream: Any
) -> None:
    decoded = load_row(at + NEAR + 64 * k + part) * load_row(at + SCALE + part)
    error = (value - as_row(as_words(decoded) ^ _sign(word))) * constant_row(factor)
    if stream:
        stream_row(to_at + part, error)
    else:
        store_row(to_at + part, error)


@jit
def decode_tile(at: int, out_at: int, add: bool, divisor: float, stream: bool) -> None:
    """Decoded values to out, or onto it and divided (unless divisor is 0)."""
    if add:
        _decode(at, out_at, True, np.float32(divisor), False)
    elif stream:
        _decode(at, out_at, False, np.float32(0), True)
    else:
        _decode(at, out_at, False, np.float32(0), False)


@inline
def _decode(at: Any, out_at: Any, add: Any, divisor: Any, stream: Any) -> None:
    one = constant_words(np.uint32(1))
    for block in range(16):
        _low_stages_near(at, block)
        left, right = _signs(at, block, 0), _signs(at, block, 16 - LANES)
        for k in range(16):
            to_at = out_at + 1024 * block + 64 * k
            _decode_row(at, k, 0, left, to_at, add, divisor, stream)
            left = left >> one
            if LANES == 8:
                _decode_row(at, k, 32, right, to_at, add, divisor, stream)
                right = right >> one


@inline
def _decode_row(
    at: Any, k: Any, part: Any, word: Any, to_at: Any, add: Any, divisor: Any, stream: Any
) -> None:
    value = load_row(at + NEAR + 64 * k + part) * load_row(at + SCALE + part)
    value = as_row(as_words(value) ^ _sign(word))
    if add:
        value = load_row(to_at + part) + value
        if divisor != np.float32(0):
            value = value / constant_row(divisor)
    if stream:
        stream_row(to_at + part, value)
    else:
        store_row(to_at + part, value)
