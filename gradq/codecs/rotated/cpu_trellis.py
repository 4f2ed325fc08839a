"""Trellis-coded levels in Numba: byte for byte `gradq.codecs.rotated.reference_trellis`.

Sixteen columns go through the trellis side by side, a row at a time. Where a register holds sixteen numbers,
levels are looked up instead of computed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gradq.kernels.numba_compile import inline_optimized
from gradq.kernels.numba_tools import (
    f32_at,
)
from gradq.kernels.vector.operations import (
    LANES,
    as_row,
    as_words,
    constant_row,
    constant_words,
    load_bytes,
    load_row,
    lookup,
    lookup_pair,
    minimum,
    select_less,
    store_bytes,
    store_row,
    to_float,
    to_int,
)

__all__ = ["store_trellis", "trellis_encode", "trellis_levels"]


@inline_optimized
def _row(number: Any) -> Any:
    return constant_row(np.float32(number))


@inline_optimized
def _word(number: Any) -> Any:
    return constant_words(np.uint32(number))


@inline_optimized
def _super_level(i: Any, offset: Any, to_level: Any) -> Any:
    """Level of i, its subset given by offset = subset - middle."""
    _, a0, a1, a2, a3 = to_level
    m = i * _row(4) + offset
    m2 = m * m
    return m * (a0 + m2 * (a1 + m2 * (a2 + m2 * a3)))


@inline_optimized
def _position(y: Any, quarters: Any) -> Any:
    """A quarter of v of the reference, exactly: its constants are quarters."""
    bottom, top, k0, k1, k2, k3, half = quarters
    y = minimum(y, top)
    y = select_less(y, bottom, bottom, y)
    y2 = y * y
    return y * (k0 + y2 * (k1 + y2 * (k2 + y2 * k3))) + half


@inline_optimized
def store_trellis(tables_at: Any, to_level: Any, num_bits: Any) -> None:
    """Tables: the levels of the four subsets, 16 numbers each, the last one repeated; of all, 32 numbers."""
    levels, level = f32_at(tables_at, 96), f32_at(tables_at + 256, LANES)
    last = (1 << (num_bits - 1)) - 1
    for number in range(64):
        i, j = min(number >> 2, last), number & 3
        store_row(tables_at + 256, _super_level(_row(i), _row(j) - to_level[0], to_level))
        levels[16 * j + (number >> 2)] = level[0]
    for number in range(32):
        levels[64 + number] = levels[16 * (number & 3) + (number >> 2)]


if LANES == 16:

    @inline_optimized
    def _tables(tables_at: Any, to_level: Any) -> Any:
        return (
            load_row(tables_at),
            load_row(tables_at + 64),
            load_row(tables_at + 128),
            load_row(tables_at + 192),
            load_row(tables_at + 256),
            load_row(tables_at + 320),
        )

    @inline_optimized
    def _level(i: Any, subset: Any, tables: Any) -> Any:
        """The level of a number and a subset."""
        return lookup_pair(tables[4], tables[5], (i << _word(2)) | subset)

    @inline_optimized
    def _nearest(position: Any, subset: Any, tables: Any, most: Any) -> Any:
        """The level of a subset at a position, which may be past the last one."""
        return lookup(tables[subset], tables[subset], to_int(position))

else:

    @inline_optimized
    def _tables(tables_at: Any, to_level: Any) -> Any:
        return to_level

    @inline_optimized
    def _level(i: Any, subset: Any, tables: Any) -> Any:
        return _super_level(to_float(i), to_float(subset) - tables[0], tables)

    @inline_optimized
    def _nearest(position: Any, subset: Any, tables: Any, most: Any) -> Any:
        i = to_float(to_int(minimum(position, most)))
        return _super_level(i, _row(subset) - tables[0], tables)


@inline_optimized
def _squared(error: Any) -> Any:
    return error * error


@inline_optimized
def _marked(q: Any, p: Any, choice: Any, bit: Any) -> Any:
    """The choice with this bit where q < p."""
    return as_words(select_less(q, p, as_row(choice | _word(bit)), as_row(choice)))


@inline_optimized
def trellis_encode(
    at: Any, codes_at: Any, rows: Any, num_bits: Any, constants: Any, inverse: Any, scratch_at: Any
) -> Any:
    """Codes of z; z becomes the levels. Returns the four accumulators of ⟨level, z⟩ and of ‖level‖²."""
    choices_at, positions_at, tables_at = scratch_at
    tables = _tables(tables_at, constants[7])
    quarter = _row(0.25)
    bottom, top, k0, k1, k2, k3, half, _ = constants
    quarters = (bottom, top, k0 * quarter, k1 * quarter, k2 * quarter, k3 * quarter, half * quarter)
    most = _row((1 << (num_bits - 1)) - 0.5)
    c0, c1, c2, c3 = _row(0), _row(1e30), _row(1e30), _row(1e30)
    for row in range(rows):
        y = load_row(at + 64 * row) * inverse
        w = _position(y, quarters)
        store_row(positions_at + 64 * row, w)
        d0 = _squared(y - _nearest(w + _row(0.375), 0, tables, most))
        d1 = _squared(y - _nearest(w + _row(0.125), 1, tables, most))
        d2 = _squared(y - _nearest(w + _row(-0.125), 2, tables, most))
        d3 = _squared(y - _nearest(w + _row(-0.375), 3, tables, most))
        # into state 2 last + bit from state last (subset last + 2 bit) or last + 2 (the other of the two)
        p0, q0 = c0 + d0, c2 + d2
        p1, q1 = c0 + d2, c2 + d0
        p2, q2 = c1 + d1, c3 + d3
        p3, q3 = c1 + d3, c3 + d1
        choice = _marked(q1, p1, _marked(q0, p0, _word(0), 1), 2)
        choice = _marked(q3, p3, _marked(q2, p2, choice, 4), 8)
        store_bytes(choices_at + 16 * row, choice)
        c0, c1, c2, c3 = minimum(q0, p0), minimum(q1, p1), minimum(q2, p2), minimum(q3, p3)
    state = select_less(c1, c0, _row(1), _row(0))
    best = select_less(c1, c0, c1, c0)
    state = select_less(c2, best, _row(2), state)
    best = select_less(c2, best, c2, best)
    state = select_less(c3, best, _row(3), state)
    n = to_int(state)
    i0, i1, i2, i3 = _row(0), _row(0), _row(0), _row(0)
    n0, n1, n2, n3 = _row(0), _row(0), _row(0), _row(0)
    one = _word(1)
    for k in range(rows):
        row = rows - 1 - k
        z, w = load_row(at + 64 * row), load_row(positions_at + 64 * row)
        before = (load_bytes(choices_at + 16 * row) >> n) & one
        last, bit = n >> one, n & one
        subset = last + ((bit ^ before) << one)
        i = to_int(minimum(w + (_row(0.375) - to_float(subset) * quarter), most))
        store_bytes(codes_at + 16 * row, (i << one) | bit)
        n = last + (before << one)
        level = _level(i, subset, tables)
        store_row(at + 64 * row, level)
        inner, norm = level * z, level * level
        if k & 3 == 0:
            i0, n0 = i0 + inner, n0 + norm
        elif k & 3 == 1:
            i1, n1 = i1 + inner, n1 + norm
        elif k & 3 == 2:
            i2, n2 = i2 + inner, n2 + norm
        else:
            i3, n3 = i3 + inner, n3 + norm
    return (i0, i1, i2, i3), (n0, n1, n2, n3)


@inline_optimized
def trellis_levels(codes_at: Any, at: Any, rows: Any, to_level: Any, tables_at: Any) -> None:
    """Levels of codes."""
    tables = _tables(tables_at, to_level)
    one = _word(1)
    last, before = _word(0), _word(0)
    for row in range(rows):
        code = load_bytes(codes_at + 16 * row)
        bit = code & one
        store_row(at + 64 * row, _level(code >> one, last + ((bit ^ before) << one), tables))
        last, before = bit, last
