"""Trellis-coded levels in Numba: byte for byte `gradq.kernels.reference_trellis`.

Sixteen columns go through the trellis side by side, a row at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gradq.kernels.numba_tools import inline
from gradq.kernels.vector import (
    constant_row,
    constant_words,
    load_bytes,
    load_row,
    minimum,
    select_less,
    store_bytes,
    store_row,
    to_float,
    to_int,
)

__all__ = ["trellis_encode", "trellis_levels"]


@inline
def _row(number: Any) -> Any:
    return constant_row(np.float32(number))


@inline
def _word(number: Any) -> Any:
    return constant_words(np.uint32(number))


@inline
def _super_level(i: Any, offset: Any, to_level: Any) -> Any:
    """Level of i, its subset given by offset = subset - middle."""
    _, a0, a1, a2, a3 = to_level
    m = i * _row(4) + offset
    m2 = m * m
    return m * (a0 + m2 * (a1 + m2 * (a2 + m2 * a3)))


@inline
def _index(y: Any, constants: Any) -> Any:
    bottom, top, k0, k1, k2, k3, half, _ = constants
    y = minimum(y, top)
    y = select_less(y, bottom, bottom, y)
    y2 = y * y
    return y * (k0 + y2 * (k1 + y2 * (k2 + y2 * k3))) + half


@inline
def _distance(y: Any, v: Any, subset: Any, most: Any, middle: Any, to_level: Any) -> Any:
    i = to_float(to_int(minimum((v + _row(1.5 - subset)) * _row(0.25), most)))
    error = y - _super_level(i, _row(subset) - middle, to_level)
    return error * error


@inline
def trellis_encode(
    at: Any, codes_at: Any, rows: Any, num_bits: Any, constants: Any, inverse: Any, choices_at: Any
) -> Any:
    """Codes of z; z becomes the levels. Returns the four accumulators of ⟨level, z⟩ and of ‖level‖²."""
    to_level = constants[7]
    middle = to_level[0]
    most = _row((1 << (num_bits - 1)) - 0.5)
    c0, c1, c2, c3 = _row(0), _row(1e30), _row(1e30), _row(1e30)
    for row in range(rows):
        y = load_row(at + 64 * row) * inverse
        v = _index(y, constants)
        d0 = _distance(y, v, 0, most, middle, to_level)
        d1 = _distance(y, v, 1, most, middle, to_level)
        d2 = _distance(y, v, 2, most, middle, to_level)
        d3 = _distance(y, v, 3, most, middle, to_level)
        # into state 2 last + bit from state last (subset last + 2 bit) or last + 2 (the other of the two)
        p0, q0 = c0 + d0, c2 + d2
        p1, q1 = c0 + d2, c2 + d0
        p2, q2 = c1 + d1, c3 + d3
        p3, q3 = c1 + d3, c3 + d1
        zero = _row(0)
        choice = (select_less(q0, p0, _row(1), zero) + select_less(q1, p1, _row(2), zero)) + (
            select_less(q2, p2, _row(4), zero) + select_less(q3, p3, _row(8), zero)
        )
        store_bytes(choices_at + 16 * row, to_int(choice))
        c0, c1 = select_less(q0, p0, q0, p0), select_less(q1, p1, q1, p1)
        c2, c3 = select_less(q2, p2, q2, p2), select_less(q3, p3, q3, p3)
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
        z = load_row(at + 64 * row)
        v = _index(z * inverse, constants)
        before = (load_bytes(choices_at + 16 * row) >> n) & one
        last, bit = n >> one, n & one
        subset = to_float(last + ((bit ^ before) << one))
        i = to_int(minimum((v + (_row(1.5) - subset)) * _row(0.25), most))
        store_bytes(codes_at + 16 * row, (i << one) | bit)
        n = last + (before << one)
        level = _super_level(to_float(i), subset - middle, to_level)
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


@inline
def trellis_levels(codes_at: Any, at: Any, rows: Any, constants: Any) -> None:
    """Levels of codes."""
    to_level = constants[7]
    middle = to_level[0]
    one = _word(1)
    last, before = _word(0), _word(0)
    for row in range(rows):
        code = load_bytes(codes_at + 16 * row)
        bit = code & one
        subset = to_float(last + ((bit ^ before) << one))
        store_row(at + 64 * row, _super_level(to_float(code >> one), subset - middle, to_level))
        last, before = bit, last
