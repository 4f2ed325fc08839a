"""Rows of a rotated tile in Numba: signs, levels, sums over groups; tiles of any size.

A tile stands in memory as R rows of 16 numbers. A vector holds `LANES` of a row's columns, its *part*; loops
over parts stand inside those over rows, or around them where a part is worked on for long.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gradq.kernels.cpu_hadamard import sign_bits
from gradq.kernels.numba_tools import as_bits, f32_at, inline, u32_at
from gradq.kernels.vector import (
    HAS_LOOKUP,
    LANES,
    as_row,
    as_words,
    constant_row,
    constant_words,
    load_row,
    load_words,
    lookup,
    maximum,
    maximum_words,
    minimum,
    store_bytes,
    store_row,
    store_words,
    to_float,
    to_int,
)

__all__ = [
    "LARGEST",
    "MAGNITUDE",
    "NORM",
    "PARTS",
    "SUMS_BYTES",
    "clear_sums",
    "fold",
    "largest_of",
    "level_of",
    "quantize_rows",
    "quantize_value",
    "quantizer_of",
    "start_rows",
]

PARTS = range(0, 16, LANES)  # the first column of each part
# Sums over rows, as rows of 16 columns at an address: four accumulators, and after them the bits of the largest
# magnitude (LARGEST) or four more (NORM).
SUMS_BYTES, LARGEST, NORM = 512, 256, 256
MAGNITUDE = np.uint32(0x7FFFFFFF)


@inline
def clear_sums(sums_at: Any) -> None:
    """Set all of them to 0."""
    for at in range(0, SUMS_BYTES, 4 * LANES):
        store_row(sums_at + at, constant_row(np.float32(0)))


@inline
def fold(sums_at: Any, groups: Any, folded_at: Any) -> None:
    """The four accumulators of each column to the sum over its group, 16 numbers."""
    for part in range(0, 16, LANES):
        at = sums_at + 4 * part
        low, high = load_row(at) + load_row(at + 64), load_row(at + 128) + load_row(at + 192)
        store_row(folded_at + 4 * part, low + high)
    if groups != 16:
        folded, sums = f32_at(folded_at, 16), f32_at(sums_at, 16)
        for g in range(16):
            sums[g] = np.float32(0)
        for c in range(16):
            sums[c * groups // 16] += folded[c]
        for c in range(16):
            folded[c] = sums[c * groups // 16]


@inline
def largest_of(sums_at: Any) -> Any:
    """The bits of the largest magnitude."""
    bits, largest = u32_at(sums_at + LARGEST, 16), np.uint32(0)
    for c in range(16):
        largest = max(largest, bits[c])
    return largest


@inline
def start_rows(
    x_at: Any,
    residual_at: Any,
    z_at: Any,
    words_at: Any,
    rows: Any,
    unscale: Any,
    to_unit: Any,
    sums_at: Any,
) -> None:
    """Steps 1 and 2 of the reference but for the transform: x + residual with its signs, in units of the tile."""
    clear_sums(sums_at)
    loss, unit = constant_row(unscale), constant_row(to_unit)
    for row in range(rows):
        for part in range(0, 16, LANES):
            at, to = 64 * row + 4 * part, sums_at + 4 * part
            value = load_row(x_at + at)
            if residual_at != 0:
                value = value + load_row(residual_at + at) * loss
            z = as_row(as_words(value) ^ sign_bits(words_at + 4 * part, row)) * unit
            store_row(z_at + at, z)
            _add(to + 64 * (row & 3), z * z)
            bits = as_words(value) & constant_words(MAGNITUDE)
            store_words(to + LARGEST, maximum_words(load_words(to + LARGEST), bits))


@inline
def _add(at: Any, term: Any) -> None:
    store_row(at, load_row(at) + term)


# --- levels --------------------------------------------------------------------------------------------


@inline
def quantizer_of(constants: Any, table_at: Any) -> Any:
    """Constants as rows, for `quantize_value` and `level_of`; outside of loops, or they are loaded each time.

    Args:
        constants: top, four of `to_index`, four of `to_level`, half the number of codes (levels, in a trellis).
        table_at: scratch of 16 rows.
    """
    middle = constant_row(np.float32(constants[9] - np.float32(0.5)))
    to_level = (
        middle,
        constant_row(constants[5]),
        constant_row(constants[6]),
        constant_row(constants[7]),
        constant_row(constants[8]),
    )
    table = f32_at(table_at, 16 * LANES)
    for code in range(16):
        store_row(table_at + 4 * LANES * code, _polynomial(constant_words(np.uint32(code)), to_level))
    for code in range(16):
        table[code] = table[LANES * code]
    return (
        constant_row(-constants[0]),
        constant_row(constants[0]),
        constant_row(constants[1]),
        constant_row(constants[2]),
        constant_row(constants[3]),
        constant_row(constants[4]),
        constant_row(constants[9]),
        (to_level, load_row(table_at), load_row(table_at + 64 - 4 * LANES)),
    )


@inline
def _polynomial(code: Any, to_level: Any) -> Any:
    middle, a0, a1, a2, a3 = to_level
    m = to_float(code) - middle
    m2 = m * m
    return m * (a0 + m2 * (a1 + m2 * (a2 + m2 * a3)))


@inline
def level_of(code: Any, levels: Any, use_table: Any) -> Any:
    """The levels of a row of codes: looked up where 16 are enough and the machine can, or computed."""
    to_level, low, high = levels
    if HAS_LOOKUP:
        if use_table:
            return lookup(low, high, code)
        return _polynomial(code, to_level)
    return _polynomial(code, to_level)


@inline
def quantize_value(z: Any, inverse: Any, quantizer: Any) -> Any:
    """Codes of a row."""
    bottom, top, k0, k1, k2, k3, half, _ = quantizer
    y = minimum(maximum(z * inverse, bottom), top)
    y2 = y * y
    return to_int(y * (k0 + y2 * (k1 + y2 * (k2 + y2 * k3))) + half)


@inline
def quantize_rows(
    z_at: Any, codes_at: Any, rows: Any, num_bits: Any, quantizer: Any, inverse_at: Any, sums_at: Any
) -> None:
    """Codes of z, a byte each; z becomes the levels. Sums ⟨level, z⟩ and (at NORM) ‖level‖² of each column."""
    clear_sums(sums_at)
    for row in range(rows):
        for part in range(0, 16, LANES):
            at, to = z_at + 64 * row + 4 * part, sums_at + 64 * (row & 3) + 4 * part
            z = load_row(at)
            code = quantize_value(z, load_row(inverse_at + 4 * part), quantizer)
            level = level_of(code, quantizer[7], num_bits <= 4)
            store_bytes(codes_at + 16 * row + part, code)
            store_row(at, level)
            _add(to, level * z)
            _add(to + NORM, level * level)
