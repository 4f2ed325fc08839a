"""Rounding in Numba: values of a block to codes, one byte each, and what that loses.

Four functions of the same parameters: to the nearest or at random, with what is lost in the values' place or
without.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gradq.kernels.numba_compile import inline
from gradq.kernels.numba_tools import as_float, f32_at, mix32, u8_at

__all__ = ["ROUND"]


@inline
def _dithers(j: Any, key: Any, shift: Any, offset: Any) -> Any:
    """Two qmax + u: 16 bits in the mantissa of a float are 1 + dither / 65536; adding offset is exact."""
    d = mix32(np.uint32(np.uint32(j) + key))
    low = np.uint32(np.uint32(d << np.uint32(7)) + shift)
    high = np.uint32(np.uint32(d >> np.uint32(9)) + shift)
    u = as_float(np.uint32((low & np.uint32(0x7FFF80)) | np.uint32(0x3F800000))) + offset
    return u, as_float(np.uint32((high & np.uint32(0x7FFF80)) | np.uint32(0x3F800000))) + offset


@inline
def _code(v: Any, inverse: Any, u: Any, top: Any) -> Any:
    return np.int32(min(np.int32(v * inverse + u), top))


@inline
def _lost(v: Any, code: Any, qmax: Any, scale: Any) -> Any:
    return v - np.float32(np.int32(code - qmax)) * scale


@inline
def _round_nearest(value_at: Any, codes_at: Any, scale: Any, qmax: Any, _key_shift: Any, P: Any) -> None:
    """Codes, one byte each."""
    value, codes = f32_at(value_at, P), u8_at(codes_at, P)
    top, half_up = np.int32(qmax + qmax), np.float32(np.float32(qmax) + np.float32(0.5))
    # a scale of 0 means tiny values: 0 * value + qmax + u gives code qmax
    inverse = np.float32(1) / scale if scale > np.float32(0) else np.float32(0)
    for j in range(P):
        codes[j] = np.uint8(_code(value[j], inverse, half_up, top))


@inline
def _round_nearest_feedback(
    value_at: Any, codes_at: Any, scale: Any, qmax: Any, _key_shift: Any, P: Any
) -> None:
    """As `_round_nearest`; what is lost replaces the values."""
    value, codes = f32_at(value_at, P), u8_at(codes_at, P)
    top, half_up = np.int32(qmax + qmax), np.float32(np.float32(qmax) + np.float32(0.5))
    inverse = np.float32(1) / scale if scale > np.float32(0) else np.float32(0)
    for j in range(P):
        v = value[j]
        c = _code(v, inverse, half_up, top)
        codes[j] = np.uint8(c)
        value[j] = _lost(v, c, qmax, scale)


@inline
def _round_stochastic(value_at: Any, codes_at: Any, scale: Any, qmax: Any, key_shift: Any, P: Any) -> None:
    """As `_round_nearest`, elements j and j + P/2 together: they share a hash."""
    h = P // 2
    value, high_value = f32_at(value_at, h), f32_at(value_at + 4 * h, h)
    codes, high_codes = u8_at(codes_at, h), u8_at(codes_at + h, h)
    key, shift = key_shift[0], np.uint32(key_shift[1] << np.uint32(7))
    top, offset = np.int32(qmax + qmax), np.float32(np.float32(qmax - 1) + np.float32(2.0**-17))
    inverse = np.float32(1) / scale if scale > np.float32(0) else np.float32(0)
    for j in range(h):
        u, high_u = _dithers(j, key, shift, offset)
        codes[j] = np.uint8(_code(value[j], inverse, u, top))
        high_codes[j] = np.uint8(_code(high_value[j], inverse, high_u, top))


@inline
def _round_stochastic_feedback(
    value_at: Any, codes_at: Any, scale: Any, qmax: Any, key_shift: Any, P: Any
) -> None:
    """As `_round_stochastic`; what is lost replaces the values."""
    h = P // 2
    value, high_value = f32_at(value_at, h), f32_at(value_at + 4 * h, h)
    codes, high_codes = u8_at(codes_at, h), u8_at(codes_at + h, h)
    key, shift = key_shift[0], np.uint32(key_shift[1] << np.uint32(7))
    top, offset = np.int32(qmax + qmax), np.float32(np.float32(qmax - 1) + np.float32(2.0**-17))
    inverse = np.float32(1) / scale if scale > np.float32(0) else np.float32(0)
    for j in range(h):
        u, high_u = _dithers(j, key, shift, offset)
        v, high_v = value[j], high_value[j]
        c, high_c = _code(v, inverse, u, top), _code(high_v, inverse, high_u, top)
        codes[j], high_codes[j] = np.uint8(c), np.uint8(high_c)
        value[j], high_value[j] = _lost(v, c, qmax, scale), _lost(high_v, high_c, qmax, scale)


ROUND: dict[tuple[bool, bool], Any] = {  # by stochastic, feedback
    (False, False): _round_nearest,
    (False, True): _round_nearest_feedback,
    (True, False): _round_stochastic,
    (True, True): _round_stochastic_feedback,
}
