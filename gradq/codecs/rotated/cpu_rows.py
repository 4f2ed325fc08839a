"""Rows of a rotated tile in Numba: scratch, levels, sums over groups; the steps of tiles that are not full.

A tile stands in memory as R rows of 16 numbers. A vector holds `LANES` of a row's columns, its *part*, which
`part` names by its first column. Kernels share one piece of scratch, `at`, laid out by the offsets below.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from gradq.codecs.rotated.cpu_hadamard import low_stages, sign_bits, unrotate
from gradq.kernels.numba_compile import called, inline_optimized
from gradq.kernels.numba_tools import (
    as_float,
    f32_at,
    u32_at,
)
from gradq.kernels.vector.blocks import code_of, level_computed, level_looked_up
from gradq.kernels.vector.operations import (
    LANES,
    as_row,
    as_words,
    constant_row,
    constant_words,
    fused,
    load_bytes,
    load_row,
    load_words,
    maximum_words,
    store_bytes,
    store_row,
    store_words,
)

__all__ = [
    "CHOICES",
    "CODES",
    "COUNT",
    "ENERGY",
    "GROUP",
    "INVERSE",
    "NEAR",
    "NORMS",
    "ONES",
    "PADDED",
    "PARTIAL",
    "PARTIAL_NORMS",
    "POSITIONS",
    "QUANTIZER",
    "SCALE",
    "SCRATCH_BYTES",
    "SUMS",
    "TABLES",
    "WORDS",
    "add_sixteens",
    "clear_sums",
    "finish_rows",
    "fold",
    "four_sums",
    "is_ordinary",
    "largest_of",
    "levels_of_rows_of",
    "quantize_rows_of",
    "quantizer_of",
    "start_rows",
    "store_quantizer",
]

# Offsets in scratch, in bytes, after the tile itself: codes, choices of the trellis, words of signs, 32 rows.
CODES, CHOICES, WORDS, NEAR = 16384, 20480, 24576, 25600
# Sums over rows: four accumulators of 16 columns, then the bits of the largest magnitude or four more.
SUMS, _LARGEST, NORMS = 27648, 27648 + 256, 27648 + 256
# The sums of sixteen rows at a time of a full tile, sixteen of them, and those of `NORMS`.
PARTIAL, PARTIAL_NORMS = CHOICES, CHOICES + 1024
# 16 numbers each: energies, 1 / σ, scales, ones; then the constants of `store_quantizer` as rows.
ENERGY, INVERSE, SCALE, ONES, QUANTIZER = 28160, 28224, 28288, 28352, 28416
GROUP, COUNT = QUANTIZER + 14 * 64, QUANTIZER + 15 * 64  # of each column; see `cpu`
PADDED = QUANTIZER + 16 * 64  # the values of a last tile whose end is no whole row
# What the trellis keeps between its passes, 64 bytes before a multiple of 4096: what is written there must
# not look like the rows that are read next. Then its tables.
POSITIONS = PADDED + 16384 + 3264
TABLES = POSITIONS + 16384
SCRATCH_BYTES = TABLES + 384
_MAGNITUDE = np.uint32(0x7FFFFFFF)


# --- sums ----------------------------------------------------------------------------------------------


@inline_optimized
def clear_sums(at: Any) -> None:
    """Set all of them to 0."""
    for offset in range(0, 512, 4 * LANES):
        store_row(at + SUMS + offset, constant_row(np.float32(0)))


@inline_optimized
def fold(sums_at: Any, groups: Any, folded_at: Any) -> None:
    """The four accumulators of each column to the sum over its group, 16 numbers."""
    for part in range(0, 16, LANES):
        at = sums_at + 4 * part
        store_row(folded_at + 4 * part, four_sums(*_load_four(at)))
    if groups != 16:
        folded, sums = f32_at(folded_at, 16), f32_at(sums_at, 16)
        for g in range(16):
            sums[g] = np.float32(0)
        for c in range(16):
            sums[c * groups // 16] += folded[c]
        for c in range(16):
            folded[c] = sums[c * groups // 16]


@inline_optimized
def _close_sixteen(at: Any, which: Any) -> None:
    """The sums of sixteen rows are complete: keep them, and begin again."""
    for offset in range(0, 64, 4 * LANES):
        sums_at = at + SUMS + offset
        store_row(at + PARTIAL + 64 * which + offset, four_sums(*_load_four(sums_at)))
        zero = constant_row(np.float32(0))
        _store_four(sums_at, zero, zero, zero, zero)


@inline_optimized
def add_sixteens(partial_at: Any, sums_at: Any) -> None:
    """The sum of sixteen sums to the first accumulator."""
    for count in (8, 4, 2, 1):
        for offset in range(0, 64 * count, 4 * LANES):
            a_at = partial_at + offset
            store_row(a_at, load_row(a_at) + load_row(a_at + 64 * count))
    zero = constant_row(np.float32(0))
    for offset in range(0, 64, 4 * LANES):
        _store_four(sums_at + offset, load_row(partial_at + offset), zero, zero, zero)


@inline_optimized
def _load_four(at: Any) -> Any:
    """Four rows of scratch."""
    return load_row(at), load_row(at + 64), load_row(at + 128), load_row(at + 192)


@inline_optimized
def _store_four(at: Any, s0: Any, s1: Any, s2: Any, s3: Any) -> None:
    """Four rows to scratch."""
    store_row(at, s0)
    store_row(at + 64, s1)
    store_row(at + 128, s2)
    store_row(at + 192, s3)


@inline_optimized
def four_sums(s0: Any, s1: Any, s2: Any, s3: Any) -> Any:
    """The four accumulators together."""
    return (s0 + s1) + (s2 + s3)


@inline_optimized
def _largest_word(words_at: Any) -> Any:
    """Of 16; numbers that are not negative are ordered as their bits are."""
    words, largest = u32_at(words_at, 16), np.uint32(0)
    for c in range(16):
        largest = max(largest, words[c])
    return largest


@inline_optimized
def largest_of(at: Any) -> Any:
    """The bits of the largest magnitude that `start_rows` met."""
    return _largest_word(at + _LARGEST)


@inline_optimized
def is_ordinary(at: Any) -> Any:
    """Whether the sums of squares show that the largest magnitude is within 2**-40 ... 2**40."""
    return np.float32(2.0**-60) < as_float(_largest_word(at + SUMS)) < np.float32(2.0**72)


@inline_optimized
def _add(at: Any, term: Any) -> None:
    store_row(at, load_row(at) + term)


# --- levels --------------------------------------------------------------------------------------------


@inline_optimized
def _store_constant(at: Any, k: Any, value: Any) -> None:
    store_row(at + QUANTIZER + 64 * k, constant_row(np.float32(value)))


@called
def store_quantizer(at: int, constants: Any) -> None:
    """Constants as rows: -top, top, `to_index`, half the codes; middle, `to_level`; table.

    `quantizer_of` and `vector.blocks` read them.

    Args:
        at: scratch.
        constants: top, four of `to_index`, four of `to_level`, half the number of codes (of levels).
    """
    _store_constant(at, 0, -constants[0])
    for k in range(5):
        _store_constant(at, 1 + k, constants[k])
    store_row(at + ONES, constant_row(np.float32(1)))
    store_row(at + ONES + 64 - 4 * LANES, constant_row(np.float32(1)))
    _store_constant(at, 6, constants[9])
    _store_constant(at, 7, constants[9] - np.float32(0.5))
    for k in range(4):
        _store_constant(at, 8 + k, constants[5 + k])
    table, level = f32_at(at + QUANTIZER + 64 * 12, 16), f32_at(at + NEAR, LANES)
    for code in range(16):
        store_row(at + NEAR, level_computed(constant_words(np.uint32(code)), at + QUANTIZER))
        table[code] = level[0]


@inline_optimized
def _constant(at: Any, k: Any) -> Any:
    return load_row(at + QUANTIZER + 64 * k)


@inline_optimized
def quantizer_of(at: Any) -> Any:
    """What the trellis needs of `store_quantizer`: -top, top, `to_index`, half; then middle, `to_level`."""
    return (
        _constant(at, 0),
        _constant(at, 1),
        _constant(at, 2),
        _constant(at, 3),
        _constant(at, 4),
        _constant(at, 5),
        _constant(at, 6),
        (_constant(at, 7), _constant(at, 8), _constant(at, 9), _constant(at, 10), _constant(at, 11)),
    )


def _level_of(num_bits: int) -> Any:
    """What makes levels of a row of codes of a width."""
    return level_looked_up if num_bits <= 4 else level_computed


# --- tiles of any size ---------------------------------------------------------------------------------


@called
def start_rows(x_at: int, residual_at: int, at: int, rows: int, unscale: float, to_unit: float) -> None:
    """X + residual with its signs, times to_unit, to the tile; sums of squares, the largest magnitude."""
    clear_sums(at)
    loss, unit = constant_row(np.float32(unscale)), constant_row(np.float32(to_unit))
    for row in range(rows):
        for part in range(0, 16, LANES):
            offset, to = 64 * row + 4 * part, at + 4 * part
            value = load_row(x_at + offset)
            if residual_at != 0:
                value = value + load_row(residual_at + offset) * loss
            z = as_row(as_words(value) ^ sign_bits(at + WORDS + 4 * part, row)) * unit
            store_row(at + offset, z)
            sums_at = to + SUMS + 64 * (row & 3)
            if rows == 256:
                store_row(sums_at, fused(z, z, load_row(sums_at)))
            else:
                _add(sums_at, z * z)
            bits = as_words(value) & constant_words(_MAGNITUDE)
            store_words(to + _LARGEST, maximum_words(load_words(to + _LARGEST), bits))
        if rows == 256 and row & 15 == 15:
            _close_sixteen(at, row >> 4)
    if rows == 256:
        add_sixteens(at + PARTIAL, at + SUMS)


@functools.cache
def quantize_rows_of(num_bits: int) -> Any:
    """`quantize_rows` for codes of a width."""
    level_of = _level_of(num_bits)

    @called
    def quantize_rows(at: int, rows: int) -> None:
        """Codes of the tile, a byte each; it becomes the levels. Sums ⟨level, z⟩ and (at NORMS) ‖level‖²."""
        clear_sums(at)
        for row in range(rows):
            for part in range(0, 16, LANES):
                z_at, to = at + 64 * row + 4 * part, at + 64 * (row & 3) + 4 * part
                z = load_row(z_at)
                code = code_of(z, load_row(at + INVERSE + 4 * part), at + QUANTIZER)
                level = level_of(code, at + QUANTIZER)
                store_bytes(at + CODES + 16 * row + part, code)
                store_row(z_at, level)
                _add(to + SUMS, level * z)
                _add(to + NORMS, level * level)

    return quantize_rows


@functools.cache
def levels_of_rows_of(num_bits: int) -> Any:
    """`levels_of_rows` for codes of a width."""
    level_of = _level_of(num_bits)

    @called
    def levels_of_rows(at: int, rows: int) -> None:
        """The codes' levels to the tile."""
        for row in range(rows):
            for part in range(0, 16, LANES):
                code = load_bytes(at + CODES + 16 * row + part)
                store_row(at + 64 * row + 4 * part, level_of(code, at + QUANTIZER))

    return levels_of_rows


@called
def finish_rows(at: int, rows: int) -> None:
    """Transform the levels back (a full tile is through the high stages), times the scale, with signs."""
    if rows == 256:
        low_stages(at, 256)
    else:
        unrotate(at, rows, at + WORDS)
    for row in range(rows):
        for part in range(0, 16, LANES):
            z_at = at + 64 * row + 4 * part
            decoded = as_words(load_row(z_at) * load_row(at + SCALE + 4 * part))
            store_words(z_at, decoded ^ sign_bits(at + WORDS + 4 * part, row))
