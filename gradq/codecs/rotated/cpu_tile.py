"""Full tiles of the rotated codecs in Numba, in as few passes as fit the registers.

A tile of 256 rows is transformed in two passes of 16 rows, in registers: distances 1 to 8 of rows in turn,
then 16 to 128 of rows 16 apart; the inverse the other way round. The work on either side of a pass is done
with the 16 rows while they are near::

    start      load, add the residual, signs | distances 1 to 8
    quantize   distances 16 to 128 | codes, levels, sums | distances 16 to 128
    finish     distances 1 to 8 | times the scale, signs, what is lost

Scratch is that of `cpu_rows`.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from gradq.codecs.rotated.cpu_rows import (
    CODES,
    INVERSE,
    NEAR,
    NORMS,
    ONES,
    PARTIAL,
    PARTIAL_NORMS,
    QUANTIZER,
    SCALE,
    SUMS,
    WORDS,
    add_sixteens,
    four_sums,
)
from gradq.kernels.numba_compile import called, inline_optimized
from gradq.kernels.vector.blocks import (
    add_block,
    decode_block,
    divide_block,
    finish_block,
    finish_block_streamed,
    hadamard_rows,
    levels_block_of_4,
    levels_block_of_fewer,
    levels_block_of_more,
    quantize_block_of_4,
    quantize_block_of_fewer,
    quantize_block_of_more,
    start_block,
    start_block_with_residual,
    stream_block,
)
from gradq.kernels.vector.operations import (
    LANES,
    constant_row,
    constant_words,
    fused,
    load_row,
    load_words,
    prefetch,
    store_row,
)

__all__ = ["decode_tile", "finish_tile", "levels_of_tile_of", "quantize_tile_of", "start_tile"]

_STEP = 4 * LANES  # bytes from row to row in NEAR


@inline_optimized
def _signs(at: Any, block: Any, part: Any) -> Any:
    """Words whose lowest bits are the signs of a block's first row, the next ones of its second, ..."""
    word = load_words(at + WORDS + 64 * (block >> 1) + 4 * part)
    return word >> constant_words(np.uint32(16 * (block & 1)))


# --- start ---------------------------------------------------------------------------------------------


@called
def start_tile(x_at: int, residual_at: int, at: int, unscale: float) -> None:
    """X + unscale * residual, signed and transformed (distances 1 to 8), to the tile; sums."""
    loss, ones = constant_row(np.float32(unscale)), load_row(at + ONES)
    for block in range(16):
        for part in range(0, 16, LANES):
            offset, word = 1024 * block + 4 * part, _signs(at, block, part)
            from_at, add_at, to_at = x_at + offset, residual_at + offset, at + offset
            sums_at = at + PARTIAL + 64 * block + 4 * part
            if residual_at != 0:
                start_block_with_residual(from_at, add_at, loss, word, sums_at, to_at, ones)
            else:
                start_block(from_at, add_at, loss, word, sums_at, to_at, ones)
    add_sixteens(at + PARTIAL, at + SUMS)


# --- quantize ------------------------------------------------------------------------------------------


@functools.cache
def quantize_tile_of(num_bits: int) -> Any:
    """`quantize_tile` for codes of a width."""
    if num_bits == 4:
        quantize_block: Any = quantize_block_of_4
    else:
        quantize_block = quantize_block_of_fewer if num_bits < 4 else quantize_block_of_more

    @called
    def quantize_tile(
        at: int, codes_at: int, with_residual: bool, next_x_at: int, next_residual_at: int
    ) -> None:
        """Codes of the tile, the sums of `quantize_rows`; with_residual, it becomes the transformed levels.

        Args:
            at: scratch.
            codes_at: for 4 bits codes are written as the plane that they have on the wire, in which rows r
                and r + 128 share bytes; of other widths a byte each, to CODES.
            with_residual: whether the levels are needed.
            next_x_at: where the next tile will be read.
            next_residual_at: and its residual.
        """
        ones, near_at, quantizer_at = load_row(at + ONES), at + NEAR, at + QUANTIZER
        for first in range(16):
            for part in range(0, 16, LANES):
                z_at, inverse = at + 64 * first + 4 * part, load_row(at + INVERSE + 4 * part)
                offset = 16 * first + part
                to_at = (codes_at if num_bits == 4 else at + CODES) + offset
                quantize_block(z_at, near_at, inverse, quantizer_at, to_at, ones)
                _sum_block(near_at, at + PARTIAL + 64 * first + 4 * part)
                if part == 0:
                    _prefetch(next_x_at + 1024 * first)
                if part == 16 - LANES:
                    _prefetch(next_residual_at + 1024 * first)
                if with_residual:
                    hadamard_rows(near_at + 16 * _STEP, _STEP, z_at, 1024, ones)
        add_sixteens(at + PARTIAL, at + SUMS)
        add_sixteens(at + PARTIAL_NORMS, at + NORMS)

    return quantize_tile


@inline_optimized
def _prefetch(at: Any) -> None:
    for line in range(0, 1024, 64):
        prefetch(at + line)


@inline_optimized
def _sum_block(near_at: Any, sums_at: Any) -> None:
    i0 = i1 = i2 = i3 = n0 = n1 = n2 = n3 = constant_row(np.float32(0))
    for z_at in range(near_at, near_at + 16 * _STEP, 4 * _STEP):
        i0, n0 = _sum_row(z_at, i0, n0)
        i1, n1 = _sum_row(z_at + _STEP, i1, n1)
        i2, n2 = _sum_row(z_at + 2 * _STEP, i2, n2)
        i3, n3 = _sum_row(z_at + 3 * _STEP, i3, n3)
    store_row(sums_at, four_sums(i0, i1, i2, i3))
    store_row(sums_at + PARTIAL_NORMS - PARTIAL, four_sums(n0, n1, n2, n3))


@inline_optimized
def _sum_row(z_at: Any, inner: Any, norm: Any) -> Any:
    level = load_row(z_at + 16 * _STEP)
    return fused(level, load_row(z_at), inner), fused(level, level, norm)


@functools.cache
def levels_of_tile_of(num_bits: int) -> Any:
    """`levels_of_tile` for codes of a width."""
    if num_bits == 4:
        levels_block: Any = levels_block_of_4
    else:
        levels_block = levels_block_of_fewer if num_bits < 4 else levels_block_of_more

    @called
    def levels_of_tile(at: int, packed_at: int) -> None:
        """The levels of codes as `quantize_tile` wrote them, transformed at distances 16 to 128."""
        ones, quantizer_at = load_row(at + ONES), at + QUANTIZER
        from_at = packed_at if num_bits == 4 else at + CODES
        for first in range(16):
            for part in range(0, 16, LANES):
                to_at, offset = at + 64 * first + 4 * part, 16 * first + part
                levels_block(from_at + offset, quantizer_at, to_at, ones)

    return levels_of_tile


# --- finish --------------------------------------------------------------------------------------------


@called
def finish_tile(
    x_at: int, residual_at: int, at: int, unscale: float, factor: float, new_at: int, stream: bool
) -> None:
    """What is lost of x + unscale * residual, times factor, to new: past the cache if asked."""
    loss, times, ones = (
        constant_row(np.float32(unscale)),
        constant_row(np.float32(factor)),
        load_row(at + ONES),
    )
    for block in range(16):
        for part in range(0, 16, LANES):
            offset, word, scale = (
                1024 * block + 4 * part,
                _signs(at, block, part),
                load_row(at + SCALE + 4 * part),
            )
            z_at, from_at, add_at, to_at = at + offset, x_at + offset, residual_at + offset, new_at + offset
            if stream:
                finish_block_streamed(z_at, from_at, add_at, loss, scale, word, times, to_at, ones)
            else:
                finish_block(z_at, from_at, add_at, loss, scale, word, times, to_at, ones)


@called
def decode_tile(at: int, out_at: int, add: bool, divisor: float, stream: bool) -> None:
    """Decoded values to out, or onto it and divided (unless divisor is 0)."""
    by, ones = constant_row(np.float32(divisor)), load_row(at + ONES)
    for block in range(16):
        for part in range(0, 16, LANES):
            offset, word, scale = (
                1024 * block + 4 * part,
                _signs(at, block, part),
                load_row(at + SCALE + 4 * part),
            )
            if not add and stream:
                stream_block(at + offset, scale, word, by, out_at + offset, ones)
            elif not add:
                decode_block(at + offset, scale, word, by, out_at + offset, ones)
            elif divisor == 0:
                add_block(at + offset, scale, word, by, out_at + offset, ones)
            else:
                divide_block(at + offset, scale, word, by, out_at + offset, ones)
