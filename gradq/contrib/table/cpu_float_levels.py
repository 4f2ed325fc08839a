"""Rounding to levels that are small floats, in Numba, by arithmetic instead of a search in their table.

A level with M bits of mantissa is plus or minus the `small_float` of a number c from 0 to `most`: c itself
below 2**M, else a float whose bits begin with c. Its code is most + c or most - c. Results are those of a
search, bit for bit: see `reference_table`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gradq.contrib.table.format import small_float
from gradq.kernels.numba_compile import inline
from gradq.kernels.numba_tools import (
    as_bits,
    as_float,
    f32_at,
    mix32,
    u8_at,
    unit_dither,
)

__all__ = ["float_nearest", "float_stochastic", "mantissa_bits"]


def mantissa_bits(levels: tuple[float, ...]) -> int:
    """M, if the levels are such floats; else 0."""
    most = len(levels) // 2
    for mantissa in (1, 2, 3):
        positive = [small_float(c, mantissa) for c in range(1, most + 1)]
        if most > 1 << mantissa and levels == (*(-v for v in reversed(positive)), 0.0, *positive):
            return mantissa
    return 0


@inline
def _number(a: Any, M: Any, added: Any, threshold: Any) -> Any:
    """The number c of a >= 0, rounded by what is added to its bits; below 2**M, up from a threshold on."""
    bits = np.uint32(np.uint32(as_bits(a) + added) >> np.uint32(23 - M))
    c = np.int32(np.int32(bits) - np.int32((126 + M) << M))
    low = min(a, np.float32(1 << M))
    whole = np.int32(low)
    more = np.int32(1) if low - np.float32(whole) >= threshold else np.int32(0)
    return c if a >= np.float32(1 << M) else np.int32(whole + more)


@inline
def _value(c: Any, M: Any) -> Any:
    bits = np.uint32(np.uint32(np.int32(c + np.int32((126 + M) << M))) << np.uint32(23 - M))
    return as_float(bits) if c >= np.int32(1 << M) else np.float32(c)


@inline
def float_nearest(value_at: Any, inverse: Any, codes_at: Any, most: Any, M: Any, L: Any) -> None:
    """Codes of the levels next to value * inverse, of L elements; halves go up."""
    value, codes = f32_at(value_at, L), u8_at(codes_at, L)
    most = np.int32(most)
    for j in range(L):
        q = value[j] * inverse
        down = np.uint32(1) if q < np.float32(0) else np.uint32(0)  # there a half goes to the smaller one
        threshold = as_float(np.uint32(np.uint32(0x3F000000) + down))
        c = _number(abs(q), M, np.uint32(np.uint32(1 << (22 - M)) - down), threshold)
        c = np.int32(min(c, most))
        codes[j] = np.uint8(np.int32(most - c) if q < np.float32(0) else np.int32(most + c))


@inline
def _neighbour(q: Any, u: Any, most: Any, M: Any) -> Any:
    """The code of the level below q, or of the next one where (q - level) / gap > u."""
    negative = q < np.float32(0)
    up = np.uint32((1 << (23 - M)) - 1) if negative else np.uint32(0)
    threshold = as_float(np.uint32(1) if negative else np.uint32(0x40000000))  # anything above 0; nothing
    c = _number(abs(q), M, up, threshold)
    # the number of the level below, and of that end of its gap which is nearer to zero
    c = np.int32(min(c, most if negative else np.int32(most - 1)))
    inner = np.int32(c - 1) if negative else c
    shift = np.int32(max(np.int32(inner >> np.int32(M)), np.int32(1)))
    size = _value(c, M)
    level = -size if negative else size
    one_over_gap = as_float(np.uint32(np.uint32(np.int32(np.int32(128) - shift)) << np.uint32(23)))
    code = np.int32(most - c) if negative else np.int32(most + c)
    return np.int32(code + (np.int32(1) if (q - level) * one_over_gap > u else np.int32(0)))


@inline
def float_stochastic(
    value_at: Any, inverse: Any, codes_at: Any, most: Any, M: Any, key_shift: Any, P: Any
) -> None:
    """Codes of one of the two levels around value * inverse, of P elements; j and j + P / 2 share a hash."""
    h = P // 2
    value, high_value = f32_at(value_at, h), f32_at(value_at + 4 * h, h)
    codes, high_codes = u8_at(codes_at, h), u8_at(codes_at + h, h)
    key, shift = key_shift
    most = np.int32(most)
    for j in range(h):
        d = mix32(np.uint32(np.uint32(j) + key))
        u, high_u = unit_dither(d, shift), unit_dither(np.uint32(d >> np.uint32(16)), shift)
        codes[j] = np.uint8(_neighbour(value[j] * inverse, u, most, M))
        high_codes[j] = np.uint8(_neighbour(high_value[j] * inverse, high_u, most, M))
