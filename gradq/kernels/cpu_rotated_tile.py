"""Full tiles of the rotated codecs in Numba, in as few passes as fit the registers.

A tile of 256 rows is transformed in two passes of 16 rows, in registers: distances 1 to 8 of consecutive rows,
then 16 to 128 of rows 16 apart; the inverse the other way round. The work on either side of a pass is done
with the 16 rows while they are near::

    start      load, add the residual, signs | distances 1 to 8
    quantize   distances 16 to 128 | codes, levels, sums | distances 16 to 128
    finish     distances 1 to 8 | times the scale, signs, what is lost

Scratch: the signed values (`signed_at`) and the tile itself (`z_at`), 16 KiB each, and `near_at`, 16 rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gradq.kernels.cpu_hadamard import sign_bits
from gradq.kernels.cpu_rotated_rows import LARGEST, MAGNITUDE, NORM, clear_sums, level_of, quantize_value
from gradq.kernels.numba_tools import inline
from gradq.kernels.vector import (
    LANES,
    as_row,
    as_words,
    constant_row,
    constant_words,
    hadamard_rows,
    load_bytes,
    load_row,
    load_words,
    maximum_words,
    prefetch,
    store_bytes,
    store_row,
    store_words,
    stream_row,
)

__all__ = ["finish_decoding", "finish_residual", "levels_of_tile", "quantize_tile", "start_tile"]

_NEXT = 4 * LANES  # bytes from row to row in `near_at`


@inline
def start_tile(
    x_at: Any,
    residual_at: Any,
    signed_at: Any,
    z_at: Any,
    words_at: Any,
    unscale: Any,
    sums_at: Any,
    with_residual: Any,
) -> None:
    """x + unscale * residual with signs to signed; its transform at distances 1 to 8 to z; sums, magnitudes."""
    clear_sums(sums_at)
    for block in range(16):
        for part in range(0, 16, LANES):
            at = 1024 * block + 4 * part
            word = load_words(words_at + 64 * (block >> 1) + 4 * part)
            word = word >> constant_words(np.uint32(16 * (block & 1)))
            from_at, add_at = x_at + at, residual_at + at
            _start_block(
                from_at, add_at, signed_at + at, word, unscale, sums_at + 4 * part, with_residual
            )
            hadamard_rows(signed_at + at, 64, z_at + at, 64)


@inline
def _start_block(
    x_at: Any, residual_at: Any, signed_at: Any, word: Any, unscale: Any, sums_at: Any, with_residual: Any
) -> None:
    s0, s1, s2, s3 = _four(sums_at)
    bits, loss = load_words(sums_at + LARGEST), constant_row(unscale)
    one = constant_words(np.uint32(1))
    for at in range(0, 1024, 256):
        z, bits = _start_row(x_at + at, residual_at + at, signed_at + at, word, loss, bits, with_residual)
        s0, word = s0 + z * z, word >> one
        z, bits = _start_row(
            x_at + at + 64, residual_at + at + 64, signed_at + at + 64, word, loss, bits, with_residual
        )
        s1, word = s1 + z * z, word >> one
        z, bits = _start_row(
            x_at + at + 128, residual_at + at + 128, signed_at + at + 128, word, loss, bits, with_residual
        )
        s2, word = s2 + z * z, word >> one
        z, bits = _start_row(
            x_at + at + 192, residual_at + at + 192, signed_at + at + 192, word, loss, bits, with_residual
        )
        s3, word = s3 + z * z, word >> one
    _store_four(sums_at, s0, s1, s2, s3)
    store_words(sums_at + LARGEST, bits)


@inline
def _start_row(
    x_at: Any, residual_at: Any, signed_at: Any, word: Any, loss: Any, bits: Any, with_residual: Any
) -> Any:
    value = load_row(x_at)
    if with_residual:
        value = value + load_row(residual_at) * loss
    z = as_row(as_words(value) ^ (word << constant_words(np.uint32(31))))
    store_row(signed_at, z)
    return z, maximum_words(bits, as_words(value) & constant_words(MAGNITUDE))


@inline
def _four(at: Any) -> Any:
    return load_row(at), load_row(at + 64), load_row(at + 128), load_row(at + 192)


@inline
def _store_four(at: Any, s0: Any, s1: Any, s2: Any, s3: Any) -> None:
    store_row(at, s0)
    store_row(at + 64, s1)
    store_row(at + 128, s2)
    store_row(at + 192, s3)


@inline
def quantize_tile(
    z_at: Any,
    codes_at: Any,
    quantizer: Any,
    scratch: Any,
    with_residual: Any,
    pack_four: Any,
    use_table: Any,
    ahead: Any,
) -> None:
    """Codes of the tile and the sums of `quantize_rows`; with_residual, z becomes the transformed levels.

    With pack_four codes are written as the plane of 4 bits that they have on the wire (rows r and r + 128
    share bytes), else a byte each.
    """
    inverse_at, sums_at, near_at = scratch
    clear_sums(sums_at)
    for first in range(16):
        for line in range(1024 * first, 1024 * first + 1024, 64):
            prefetch(ahead[0] + line)
            prefetch(ahead[1] + line)
        for part in range(0, 16, LANES):
            at, to_at = z_at + 64 * first + 4 * part, codes_at + 16 * first + part
            hadamard_rows(at, 1024, near_at, _NEXT)
            _quantize_block(
                near_at, to_at, quantizer, inverse_at + 4 * part, sums_at + 4 * part, pack_four, use_table
            )
            if with_residual:
                hadamard_rows(near_at, _NEXT, at, 1024)


@inline
def _quantize_block(
    near_at: Any,
    to_at: Any,
    quantizer: Any,
    inverse_at: Any,
    sums_at: Any,
    pack_four: Any,
    use_table: Any,
) -> None:
    i0, i1, i2, i3 = _four(sums_at)
    n0, n1, n2, n3 = _four(sums_at + NORM)
    inverse, codes_at = load_row(inverse_at), near_at + 16 * _NEXT
    for k in range(0, 16, 4):
        at, code_at = near_at + _NEXT * k, codes_at + _NEXT * k
        i, n = _quantize_row(at, code_at, inverse, quantizer, use_table)
        i0, n0 = i0 + i, n0 + n
        i, n = _quantize_row(at + _NEXT, code_at + _NEXT, inverse, quantizer, use_table)
        i1, n1 = i1 + i, n1 + n
        i, n = _quantize_row(at + 2 * _NEXT, code_at + 2 * _NEXT, inverse, quantizer, use_table)
        i2, n2 = i2 + i, n2 + n
        i, n = _quantize_row(at + 3 * _NEXT, code_at + 3 * _NEXT, inverse, quantizer, use_table)
        i3, n3 = i3 + i, n3 + n
    _store_four(sums_at, i0, i1, i2, i3)
    _store_four(sums_at + NORM, n0, n1, n2, n3)
    if pack_four:
        for k in range(8):
            low, high = load_words(codes_at + _NEXT * k), load_words(codes_at + _NEXT * (k + 8))
            store_bytes(to_at + 256 * k, low | (high << constant_words(np.uint32(4))))
    else:
        for k in range(16):
            store_bytes(to_at + 256 * k, load_words(codes_at + _NEXT * k))


@inline
def _quantize_row(at: Any, code_at: Any, inverse: Any, quantizer: Any, use_table: Any) -> Any:
    z = load_row(at)
    code = quantize_value(z, inverse, quantizer)
    level = level_of(code, quantizer[7], use_table)
    store_words(code_at, code)
    store_row(at, level)
    return level * z, level * level


@inline
def finish_residual(
    z_at: Any,
    signed_at: Any,
    scratch: Any,
    factor: Any,
    new_at: Any,
    stream: Any,
) -> None:
    """What is lost of the signed values, times factor, to new: past the cache if asked."""
    words_at, scale_at, near_at = scratch
    for block in range(16):
        for part in range(0, 16, LANES):
            hadamard_rows(z_at + 1024 * block + 4 * part, 64, near_at + 4 * part, 64)
        for k in range(16):
            row = 16 * block + k
            for part in range(0, 16, LANES):
                sign = sign_bits(words_at + 4 * part, row)
                value = as_row(as_words(load_row(signed_at + 64 * row + 4 * part)) ^ sign)
                decoded = load_row(near_at + 64 * k + 4 * part) * load_row(scale_at + 4 * part)
                error = (value - as_row(as_words(decoded) ^ sign)) * constant_row(factor)
                if stream:
                    stream_row(new_at + 64 * row + 4 * part, error)
                else:
                    store_row(new_at + 64 * row + 4 * part, error)


@inline
def levels_of_tile(
    codes_at: Any, z_at: Any, levels: Any, near_at: Any, packed_four: Any, use_table: Any
) -> None:
    """The levels of a tile's codes, transformed at distances 16 to 128; codes as `quantize_tile` wrote them."""
    for first in range(16):
        for part in range(0, 16, LANES):
            at = codes_at + 16 * first + part
            if packed_four:
                for k in range(8):
                    code = load_bytes(at + 256 * k)
                    low = level_of(code & constant_words(np.uint32(15)), levels, use_table)
                    high = level_of(code >> constant_words(np.uint32(4)), levels, use_table)
                    store_row(near_at + _NEXT * k, low)
                    store_row(near_at + _NEXT * (k + 8), high)
            else:
                for k in range(16):
                    store_row(near_at + _NEXT * k, level_of(load_bytes(at + 256 * k), levels, use_table))
            hadamard_rows(near_at, _NEXT, z_at + 64 * first + 4 * part, 1024)


@inline
def finish_decoding(
    z_at: Any,
    scratch: Any,
    out_at: Any,
    add: Any,
    divisor: Any,
    stream: Any,
) -> None:
    """Decoded values to out, or onto it, or onto it and divided (divisor 0: not)."""
    words_at, scale_at, near_at = scratch
    for block in range(16):
        for part in range(0, 16, LANES):
            hadamard_rows(z_at + 1024 * block + 4 * part, 64, near_at + 4 * part, 64)
        for k in range(16):
            row = 16 * block + k
            for part in range(0, 16, LANES):
                at = out_at + 64 * row + 4 * part
                value = load_row(near_at + 64 * k + 4 * part) * load_row(scale_at + 4 * part)
                value = as_row(as_words(value) ^ sign_bits(words_at + 4 * part, row))
                if add:
                    value = load_row(at) + value
                    if divisor != np.float32(0):
                        value = value / constant_row(divisor)
                if stream:
                    stream_row(at, value)
                else:
                    store_row(at, value)
