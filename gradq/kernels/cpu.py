"""The Numba kernels: one pass over memory, byte for byte what `gradq.kernels.reference` writes.

A block is worked on in scratch that stays in the L1 cache: add the residual and find absmax, round to one
byte a code, pack the bytes. Shapes as in the reference: B = block_size, L <= B elements in a block, padded
to P, W ranks. Kernels take addresses, not arrays: unboxing six arrays costs more than a short segment.

What keeps them fast: every operand is cast to 32 bits (Numba widens to 64), absmax works on the bit pattern
(integers have no NaN to lose), no fast-math (NaN, Inf and the reference's rounding must survive).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic
from numba.np.numpy_support import carray
from torch import Tensor

from gradq.kernels import reference

__all__ = [
    "exact_decode",
    "exact_decode_mean",
    "exact_encode",
    "uniform_decode",
    "uniform_decode_mean",
    "uniform_encode",
    "warm_up",
]

_F = TypeVar("_F", bound=Callable[..., Any])
_MASK32 = 0xFFFFFFFF
_SCALE_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_TILE = 1024  # elements of a running sum that stay in L1


def _jit(function: _F) -> _F:
    return cast(_F, numba.njit(nogil=True, cache=True)(function))


def _inline(function: _F) -> _F:
    return cast(_F, numba.njit(nogil=True, cache=True, forceinline=True)(function))


# --- addresses to arrays -------------------------------------------------------------------------------


def _pointer_to(numba_type: Any) -> Any:
    pointer = cast(Any, types.CPointer)(numba_type)

    def typed(_typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(pointer))

        return pointer(types.intp), generate

    return intrinsic(typed)


_u8_pointer, _f32_pointer, _f64_pointer, _u16_pointer = map(
    _pointer_to, (types.uint8, types.float32, types.float64, types.uint16)
)


# --- dither and scales ---------------------------------------------------------------------------------


@_inline
def _as_float(bits: Any) -> Any:
    return np.uint32(bits).view(np.float32)


@_inline
def _one_to_two(bits: Any) -> Any:
    return _as_float((bits & np.uint32(0x7FFF80)) | np.uint32(0x3F800000))


@_inline
def _mix32(h: Any) -> Any:
    h = np.uint32(h ^ (h >> np.uint32(16)))
    h = np.uint32(h * np.uint32(0x7FEB352D))
    h = np.uint32(h ^ (h >> np.uint32(15)))
    h = np.uint32(h * np.uint32(0x846CA68B))
    return np.uint32(h ^ (h >> np.uint32(16)))


@_inline
def _scale_bits(scale: Any, kind: Any) -> Any:
    """As `reference._scale_bits`."""
    bits = np.float32(scale).view(np.uint32)
    if bits >= np.uint32(0x7F800000):
        return np.uint32(0x7FC00000 if kind == 0 else (0x7FC0 if kind == 1 else 0x7E00))
    if bits < np.uint32(0x00800000):
        return np.uint32(0)
    if kind == 0:
        return bits
    if kind == 1:
        up = np.uint32((bits + np.uint32(0xFFFF)) >> np.uint32(16))
        return np.uint32(0x7FC0) if up >= np.uint32(0x7F80) else up
    exponent = np.int32(bits >> np.uint32(23)) - np.int32(112)
    if exponent >= 1:
        up = np.uint32((bits - np.uint32(112 << 23) + np.uint32(0x1FFF)) >> np.uint32(13))
        return np.uint32(0x7E00) if up >= np.uint32(0x7C00) else up
    mantissa = np.uint32((bits & np.uint32(0x7FFFFF)) | np.uint32(0x800000))
    drop = np.uint32(min(14 - exponent, 25))
    return np.uint32((mantissa + (np.uint32(1) << drop) - np.uint32(1)) >> drop)


@_inline
def _is_nan_bits(bits: Any, kind: Any) -> Any:
    if kind == 0:
        return (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return (bits & np.uint32(0x7FFF)) > (np.uint32(0x7F80) if kind == 1 else np.uint32(0x7C00))


@_inline
def _scale_value(bits: Any, kind: Any) -> Any:
    if _is_nan_bits(bits, kind):
        return np.float32(np.nan)
    if kind == 0:
        return np.uint32(bits).view(np.float32)
    if kind == 1:
        return np.uint32(bits << np.uint32(16)).view(np.float32)
    sign = np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))
    exponent = np.uint32((bits >> np.uint32(10)) & np.uint32(31))
    mantissa = np.uint32(bits & np.uint32(0x3FF))
    if exponent == 0:
        small = np.float32(np.int32(mantissa)) * np.float32(2.0**-24)
        return np.uint32(np.float32(small).view(np.uint32) | sign).view(np.float32)
    wide = np.uint32(255) if exponent == np.uint32(31) else np.uint32(exponent + np.uint32(112))
    return np.uint32(sign | (wide << np.uint32(23)) | (mantissa << np.uint32(13))).view(np.float32)


@_inline
def _load_scale(payload: Any, block: Any, kind: Any) -> Any:
    if kind == 0:
        at = payload[4 * block : 4 * block + 4]
        low = np.uint32(at[0]) | np.uint32(at[1]) << np.uint32(8)
        return _scale_value(
            np.uint32(low | np.uint32(at[2]) << np.uint32(16) | np.uint32(at[3]) << np.uint32(24)), kind
        )
    at = payload[2 * block : 2 * block + 2]
    return _scale_value(np.uint32(np.uint32(at[0]) | np.uint32(at[1]) << np.uint32(8)), kind)


@_inline
def _store_scale(payload: Any, block: Any, bits: Any, kind: Any) -> None:
    size = 4 if kind == 0 else 2
    at = payload[size * block : size * block + size]
    for k in range(size):
        at[k] = np.uint8(bits >> np.uint32(8 * k))


# --- planes --------------------------------------------------------------------------------------------


@_inline
def _pack(codes_P: Any, packed: Any, num_bits: Any) -> None:
    """One byte a code to planes of 4, 2 and 1 bits."""
    P = len(codes_P)
    low = np.uint8(0)
    if num_bits & 4:
        run = P // 2
        a, b, plane = codes_P[:run], codes_P[run:], packed[:run]
        for j in range(len(plane)):
            plane[j] = np.uint8((a[j] & np.uint8(15)) | (b[j] << np.uint8(4)))
        packed = packed[run:]
        low = np.uint8(4)
    if num_bits & 2:
        run = P // 4
        plane = packed[:run]
        a, b, c, d = codes_P[:run], codes_P[run : 2 * run], codes_P[2 * run : 3 * run], codes_P[3 * run :]
        for j in range(len(plane)):
            ab = ((a[j] >> low) & np.uint8(3)) | (((b[j] >> low) & np.uint8(3)) << np.uint8(2))
            cd = ((c[j] >> low) & np.uint8(3)) | (((d[j] >> low) & np.uint8(3)) << np.uint8(2))
            plane[j] = np.uint8(ab | (cd << np.uint8(4)))
        packed = packed[run:]
        low = np.uint8(low + np.uint8(2))
    if num_bits & 1:
        run = P // 8
        plane = packed[:run]
        for j in range(len(plane)):
            plane[j] = np.uint8(0)
        for k in range(8):
            a = codes_P[k * run : (k + 1) * run]
            for j in range(len(plane)):
                plane[j] |= np.uint8(((a[j] >> low) & np.uint8(1)) << np.uint8(k))


@_inline
def _unpack(packed: Any, codes_P: Any, num_bits: Any) -> None:
    P = len(codes_P)
    low = np.uint8(0)
    if num_bits & 4:
        run = P // 2
        a, b, plane = codes_P[:run], codes_P[run:], packed[:run]
        for j in range(len(plane)):
            byte = plane[j]
            a[j] = byte & np.uint8(15)
            b[j] = byte >> np.uint8(4)
        packed = packed[run:]
        low = np.uint8(4)
    else:
        for j in range(P):
            codes_P[j] = np.uint8(0)
    if num_bits & 2:
        run = P // 4
        plane = packed[:run]
        for k in range(4):
            a = codes_P[k * run : (k + 1) * run]
            for j in range(len(plane)):
                a[j] |= np.uint8(((plane[j] >> np.uint8(2 * k)) & np.uint8(3)) << low)
        packed = packed[run:]
        low = np.uint8(low + np.uint8(2))
    if num_bits & 1:
        run = P // 8
        plane = packed[:run]
        for k in range(8):
            a = codes_P[k * run : (k + 1) * run]
            for j in range(len(plane)):
                a[j] |= np.uint8(((plane[j] >> np.uint8(k)) & np.uint8(1)) << low)


# --- uniform -------------------------------------------------------------------------------------------


@_jit
def _encode(
    x_at: int,
    n: int,
    payload_at: int,
    num_bits: int,
    block_size: int,
    kind: int,
    stochastic: bool,
    key_low: int,
    key_high: int,
    shift: int,
    first_block: int,
    residual_at: int,
    new_residual_at: int,
    loss_scale: float,
    inverse_loss_scale: float,
) -> None:
    """Addresses of 0 stand for no residual."""
    num_blocks = (n + block_size - 1) // block_size
    padded = (n + 7) // 8 * 8
    header = num_blocks * (4 if kind == 0 else 2)
    x = carray(_f32_pointer(x_at), n)
    payload = carray(_u8_pointer(payload_at), header + padded * num_bits // 8)
    residual = carray(_f32_pointer(residual_at), n)
    new_residual = carray(_f32_pointer(new_residual_at), n)
    value_B = np.empty(block_size, np.float32)
    codes_B = np.empty(block_size, np.uint8)
    unscale = np.float32(loss_scale)
    rescale = np.float32(inverse_loss_scale)
    qmax = np.int32((1 << (num_bits - 1)) - 1)
    top = np.int32(2 * qmax)
    # a dither in the mantissa of a float is 1 + dither / 65536; qmax + u is that + offset, exactly
    offset = np.float32(np.float32(qmax - 1) + np.float32(2.0**-17))
    shift_7 = np.uint32(np.uint32(shift) << np.uint32(7))
    half_up = np.float32(np.float32(qmax) + np.float32(0.5))
    for block in range(num_blocks):
        start = block * block_size
        L = min(block_size, n - start)
        P = (L + 7) // 8 * 8
        h = P // 2
        value = value_B[:P]
        bits = value.view(np.uint32)
        x_L = x[start : start + L]
        absmax_bits = np.uint32(0)
        for j in range(L, P):
            value[j] = np.float32(0)
        if residual_at != 0:
            residual_L = residual[start : start + L]
            for j in range(len(x_L)):
                value[j] = x_L[j] + residual_L[j] * unscale
        else:
            for j in range(len(x_L)):
                value[j] = x_L[j]
        for j in range(len(bits)):
            absmax_bits = max(absmax_bits, np.uint32(bits[j] & np.uint32(0x7FFFFFFF)))
        scale_bits = _scale_bits(_as_float(absmax_bits) / np.float32(qmax), kind)
        scale = _scale_value(scale_bits, kind)
        if not np.float32(scale * np.float32(qmax)) < np.float32(np.inf):
            scale_bits = _scale_bits(np.float32(np.nan), kind)
            scale = np.float32(np.nan)
        _store_scale(payload, block, scale_bits, kind)
        at = header + start * num_bits // 8
        packed = payload[at : at + P * num_bits // 8]
        codes = packed if num_bits == 8 else codes_B[:P]
        if scale != scale:
            for j in range(P):
                codes[j] = np.uint8(qmax)
        else:
            # a scale of 0 means tiny values: 0 * value + qmax + u gives code qmax
            inverse = np.float32(1.0) / scale if scale > np.float32(0) else np.float32(0)
            if stochastic:
                block_key = np.uint32(np.uint32(first_block) + np.uint32(block))
                block_key = np.uint32(_mix32(block_key ^ np.uint32(key_low)) + np.uint32(key_high))
                value_low, value_high, codes_low, codes_high = value[:h], value[h:], codes[:h], codes[h:]
                for j in range(len(value_low)):
                    d = _mix32(np.uint32(np.uint32(j) + block_key))
                    d_low = np.uint32(np.uint32(d << np.uint32(7)) + shift_7)
                    d_high = np.uint32(np.uint32(d >> np.uint32(9)) + shift_7)
                    u_low = _one_to_two(d_low) + offset
                    u_high = _one_to_two(d_high) + offset
                    codes_low[j] = np.uint8(min(np.int32(value_low[j] * inverse + u_low), top))
                    codes_high[j] = np.uint8(min(np.int32(value_high[j] * inverse + u_high), top))
            else:
                for j in range(len(value)):
                    codes[j] = np.uint8(min(np.int32(value[j] * inverse + half_up), top))
        if num_bits != 8:
            _pack(codes, packed, num_bits)
        if new_residual_at != 0:
            new_L = new_residual[start : start + L]
            if scale != scale:
                residual_L = residual[start : start + L]
                for j in range(len(new_L)):
                    new_L[j] = residual_L[j]
            else:
                for j in range(len(new_L)):
                    decoded = np.float32(np.int32(np.int32(codes[j]) - qmax)) * scale
                    new_L[j] = (value[j] - decoded) * rescale


@_jit
def _decode_mean(
    payloads_at: int,
    num_rows: int,
    row_stride: int,
    out_at: int,
    n: int,
    num_bits: int,
    block_size: int,
    kind: int,
) -> None:
    """Decode is the mean of one row."""
    num_blocks = (n + block_size - 1) // block_size
    header = num_blocks * (4 if kind == 0 else 2)
    nbytes = header + (n + 7) // 8 * num_bits
    payloads = carray(_u8_pointer(payloads_at), (num_rows - 1) * row_stride + nbytes)
    out = carray(_f32_pointer(out_at), n)
    codes_B = np.empty(block_size, np.uint8)
    qmax = np.int32((1 << (num_bits - 1)) - 1)
    divisor = np.float32(num_rows)
    for block in range(num_blocks):
        start = block * block_size
        L = min(block_size, n - start)
        P = (L + 7) // 8 * 8
        out_L = out[start : start + L]
        for row in range(num_rows):
            payload = payloads[row * row_stride : row * row_stride + nbytes]
            scale = _load_scale(payload, block, kind)
            at = header + start * num_bits // 8
            packed = payload[at : at + P * num_bits // 8]
            codes = packed if num_bits == 8 else codes_B[:P]
            if num_bits != 8:
                _unpack(packed, codes, num_bits)
            if row == 0:
                for j in range(len(out_L)):
                    out_L[j] = np.float32(np.int32(np.int32(codes[j]) - qmax)) * scale
            else:
                for j in range(len(out_L)):
                    out_L[j] += np.float32(np.int32(np.int32(codes[j]) - qmax)) * scale
        if num_rows > 1:
            for j in range(len(out_L)):
                out_L[j] /= divisor


def uniform_encode(
    x: Tensor,
    payload: Tensor,
    *,
    num_bits: int,
    block_size: int,
    scale_dtype: torch.dtype,
    stochastic: bool,
    key: int,
    shift: int,
    first_block: int,
    residual: Tensor | None,
    new_residual: Tensor | None,
    loss_scale: float,
) -> None:
    """Encode x + loss_scale * residual in one pass; the format is the reference's."""
    assert new_residual is None or residual is not None
    _encode(
        x.data_ptr(),
        x.numel(),
        payload.data_ptr(),
        num_bits,
        block_size,
        _SCALE_KINDS[scale_dtype],
        stochastic,
        key & _MASK32,
        (key >> 32) & _MASK32,
        shift,
        first_block & _MASK32,
        0 if residual is None else residual.data_ptr(),
        0 if new_residual is None else new_residual.data_ptr(),
        float(loss_scale),
        1.0 / loss_scale,
    )


def uniform_decode(
    payload: Tensor, out: Tensor, *, num_bits: int, block_size: int, scale_dtype: torch.dtype
) -> None:
    """Decode one segment into out."""
    kind = _SCALE_KINDS[scale_dtype]
    _decode_mean(payload.data_ptr(), 1, 0, out.data_ptr(), out.numel(), num_bits, block_size, kind)


def uniform_decode_mean(
    payloads: Tensor, out: Tensor, *, num_bits: int, block_size: int, scale_dtype: torch.dtype
) -> None:
    """Mean over the W rows of payloads, added in row order in fp32, divided once."""
    kind = _SCALE_KINDS[scale_dtype]
    num_rows, stride = payloads.shape[0], payloads.stride(0)
    _decode_mean(
        payloads.data_ptr(), num_rows, stride, out.data_ptr(), out.numel(), num_bits, block_size, kind
    )


# --- exact ---------------------------------------------------------------------------------------------

exact_encode = reference.exact_encode
exact_decode = reference.exact_decode
exact_decode_mean = reference.exact_decode_mean


def warm_up() -> None:
    """Compile the kernels, or load them from Numba's cache, so that the first training step does not."""
    x, out = torch.zeros(8), torch.zeros(8)
    payload = torch.zeros(64, dtype=torch.uint8)
    uniform_encode(
        x,
        payload,
        num_bits=8,
        block_size=64,
        scale_dtype=torch.float32,
        stochastic=True,
        key=0,
        shift=0,
        first_block=0,
        residual=None,
        new_residual=None,
        loss_scale=1.0,
    )
    uniform_decode(payload, out, num_bits=8, block_size=64, scale_dtype=torch.float32)
