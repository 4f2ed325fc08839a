"""The randomized Hadamard transform of a tile in Numba, as in `gradq.codecs.rotated.reference`.

Rows of 16 numbers at addresses; signs are bits of hash words, 128 words for the first transform and 128 more
for the second that tiles of an odd number of rows have.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gradq.kernels.numba_compile import called, inline_optimized
from gradq.kernels.vector.blocks import hadamard_rows
from gradq.kernels.vector.operations import (
    LANES,
    as_words,
    constant_row,
    constant_words,
    lane_numbers,
    load_row,
    load_words,
    store_row,
    store_words,
)

__all__ = [
    "flip_signs",
    "high_stages",
    "low_stages",
    "mix_words",
    "rotate",
    "sign_bits",
    "sign_words",
    "unrotate",
    "window",
]


@inline_optimized
def sign_words(tile_key: Any, rows: Any, words_at: Any) -> None:
    """128 words for the first signs; for the second, which full tiles do without, 128 more."""
    for w in range(0, 128, LANES):
        store_words(words_at + 4 * w, mix_words(lane_numbers(np.uint32(tile_key + np.uint32(w)))))
    if rows != 256:
        for w in range(0, 128, LANES):
            store_words(
                words_at + 512 + 4 * w, mix_words(lane_numbers(np.uint32(tile_key + np.uint32(256 + w))))
            )


@inline_optimized
def mix_words(h: Any) -> Any:
    """`numba_tools.mix32` of a row."""
    h = h ^ (h >> constant_words(np.uint32(16)))
    h = h * constant_words(np.uint32(0x7FEB352D))
    h = h ^ (h >> constant_words(np.uint32(15)))
    h = h * constant_words(np.uint32(0x846CA68B))
    return h ^ (h >> constant_words(np.uint32(16)))


@inline_optimized
def flip_signs(at: Any, words_at: Any, first_row: Any, rows: Any) -> None:
    """The second signs."""
    for row in range(first_row, rows):
        for part in range(0, 64, 4 * LANES):
            flipped = as_words(load_row(at + 64 * row + part)) ^ sign_bits(words_at + 512 + part, row)
            store_words(at + 64 * row + part, flipped)


@inline_optimized
def sign_bits(words_at: Any, row: Any) -> Any:
    """The signs of a row from one of its columns on, whose first word is at `words_at`, in the sign bits."""
    left = constant_words(np.uint32(31 - (row & 31)))
    return (load_words(words_at + 64 * (row >> 5)) << left) & constant_words(np.uint32(0x80000000))


@called
def low_stages(at: int, size: int) -> None:
    """Distances 1, 2, 4, 8 of `size` rows, a power of two, in place."""
    if size >= 16:
        for row in range(0, size, 16):
            for part in range(0, 64, 4 * LANES):
                hadamard_rows(at + 64 * row + part, 64, at + 64 * row + part, 64, constant_row(np.float32(1)))
    else:
        distance = 1
        while distance < size:
            _stage(at, size, distance)
            distance *= 2


@called
def high_stages(at: int, size: int) -> None:
    """Distances 16, 32, ... of `size` rows, a power of two, in place."""
    if size == 256:
        for first in range(at, at + 1024, 4 * LANES):
            hadamard_rows(first, 1024, first, 1024, constant_row(np.float32(1)))
    else:
        distance = 16
        while distance < size:
            _stage(at, size, distance)
            distance *= 2


@inline_optimized
def _stage(at: Any, size: Any, distance: Any) -> None:
    for row in range(size):
        if row & distance == 0:
            for first in range(at + 64 * row, at + 64 * row + 64, 4 * LANES):
                second = first + 64 * distance
                a, b = load_row(first), load_row(second)
                store_row(first, a + b)
                store_row(second, a - b)


@inline_optimized
def _multiply(at: Any, rows: Any, factor: Any) -> None:
    for first in range(at, at + 64 * rows, 4 * LANES):
        store_row(first, load_row(first) * constant_row(factor))


@inline_optimized
def window(rows: Any) -> Any:
    """The largest power of two <= rows."""
    size = 1
    while 2 * size <= rows:
        size *= 2
    return size


@called
def rotate(at: int, rows: int, words_at: int) -> None:
    """See `reference_rotated.rotate`."""
    size = window(rows)
    low_stages(at, size)
    high_stages(at, size)
    if size != rows:
        factor = np.float32(1.0 / np.sqrt(float(size)))
        last = at + 64 * (rows - size)
        _multiply(at, size, factor)
        flip_signs(at, words_at, rows - size, rows)
        low_stages(last, size)
        high_stages(last, size)
        _multiply(last, size, factor)


@called
def unrotate(at: int, rows: int, words_at: int) -> None:
    """See `reference_rotated.unrotate`."""
    size = window(rows)
    if size != rows:
        factor = np.float32(1.0 / np.sqrt(float(size)))
        last = at + 64 * (rows - size)
        high_stages(last, size)
        low_stages(last, size)
        _multiply(last, size, factor)
        flip_signs(at, words_at, rows - size, rows)
        high_stages(at, size)
        low_stages(at, size)
        _multiply(at, size, factor)
    else:
        high_stages(at, size)
        low_stages(at, size)
