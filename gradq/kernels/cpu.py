"""The Numba kernels: one pass over memory, byte for byte what `gradq.kernels.reference` writes.

A block at a time, in scratch that stays in the L1 cache: add the residual and find absmax, round to one byte
a code, pack the bytes. L elements in a block, P = L padded to 8, W rows; `_at` is an address, 0 for none.

What makes them fast. Every operand is cast to 32 bits (Numba widens to 64). Kernels take addresses: a call
with six arrays costs more than a short segment. Loops over a constant length compile to far better code, so
the usual block size has its own copy, by inlining. Outputs nobody reads soon are written past the cache.

What keeps them right. No fast-math: NaN, Inf and the reference's rounding survive. absmax is the greatest bit
pattern: integers have no NaN to lose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from llvmlite import ir
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
_FP32, _BF16, _FP16 = 0, 1, 2
_KIND = {torch.float32: _FP32, torch.bfloat16: _BF16, torch.float16: _FP16}
_USUAL = 256  # the block size with loops of its own
_STREAM_FROM = 4096  # from this many elements outputs are written past the cache
_TILE = 1024  # elements of an exact mean that stay in the L1 cache


def _jit(function: _F) -> _F:
    return cast(_F, numba.njit(nogil=True, cache=True)(function))


def _inline(function: _F) -> _F:
    return cast(_F, numba.njit(nogil=True, forceinline=True)(function))


# --- memory --------------------------------------------------------------------------------------------


def _array_at(numba_type: Any) -> Any:
    """A function (address, length) -> array for use inside kernels."""
    pointer = cast(Any, types.CPointer)(numba_type)

    def typed(_typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(pointer))

        return pointer(types.intp), generate

    to_pointer: Any = intrinsic(typed)

    @_inline
    def array_at(address: Any, length: Any) -> Any:
        return carray(to_pointer(address), length)

    return array_at


_u8_at, _u16_at, _u32_at = _array_at(types.uint8), _array_at(types.uint16), _array_at(types.uint32)
_f32_at = _array_at(types.float32)


def _stream_8(_typing: Any, _to: Any, _source: Any, _factor: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> None:
        eight = ir.VectorType(ir.FloatType(), 8)
        undefined, lanes = ir.Constant(eight, ir.Undefined), ir.VectorType(ir.IntType(32), 8)
        factor = builder.insert_element(undefined, args[2], ir.Constant(ir.IntType(32), 0))
        factors = builder.shuffle_vector(factor, undefined, ir.Constant(lanes, [0] * 8))
        source, to = (builder.inttoptr(args[k], eight.as_pointer()) for k in (1, 0))
        store = builder.store(builder.fmul(builder.load(source, align=32), factors), to, align=32)
        hint = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        store.set_metadata("nontemporal", hint)

    return types.void(types.intp, types.intp, types.float32), generate


def _full_fence(_typing: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, _args: Any) -> None:
        builder.fence("seq_cst")

    return types.void(), generate


_stream: Any = intrinsic(_stream_8)  # 8 floats times a factor, written past the cache
_fence: Any = intrinsic(_full_fence)  # such writes are not ordered with others without it


@_inline
def _aligned(address: Any) -> Any:
    return np.intp((np.intp(address) + 63) // 64 * 64)


@_inline
def _write(scratch_at: Any, out_at: Any, factor: Any, L: Any, stream: Any) -> None:
    """Scratch times factor to out."""
    done = 0
    if stream:
        done = L // 8 * 8
        for j in range(0, done, 8):
            _stream(out_at + 4 * j, scratch_at + 4 * j, factor)
    scratch, out = _f32_at(scratch_at + 4 * done, L - done), _f32_at(out_at + 4 * done, L - done)
    for j in range(L - done):  # a range from 0: of others Numba does not know that they stay positive
        out[j] = scratch[j] * factor


@_inline
def _write_mean(sum_at: Any, out_at: Any, num_rows: Any, L: Any, stream: Any) -> None:
    factor = np.float32(1)
    if num_rows & (num_rows - 1) == 0:  # a product with a power of two equals the quotient
        factor /= np.float32(num_rows)
    else:
        total = _f32_at(sum_at, L)
        for j in range(L):
            total[j] /= np.float32(num_rows)
    _write(sum_at, out_at, factor, L, stream)


# --- bits ----------------------------------------------------------------------------------------------


@_inline
def _as_float(bits: Any) -> Any:
    return np.uint32(bits).view(np.float32)


@_inline
def _as_bits(value: Any) -> Any:
    return np.float32(value).view(np.uint32)


@_inline
def _mix32(h: Any) -> Any:
    h = np.uint32(h ^ (h >> np.uint32(16)))
    h = np.uint32(h * np.uint32(0x7FEB352D))
    h = np.uint32(h ^ (h >> np.uint32(15)))
    h = np.uint32(h * np.uint32(0x846CA68B))
    return np.uint32(h ^ (h >> np.uint32(16)))


@_inline
def _scale_bits(scale: Any, kind: Any) -> Any:
    """As in the reference: rounded up, 0 for tiny scales, NaN for what is not finite."""
    bits = _as_bits(scale)
    if bits >= np.uint32(0x7F800000):
        return np.uint32(0x7FC00000 if kind == _FP32 else (0x7FC0 if kind == _BF16 else 0x7E00))
    if bits < np.uint32(0x00800000):
        return np.uint32(0)
    if kind == _FP32:
        return bits
    if kind == _BF16:
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
def _scale_value(bits: Any, kind: Any) -> Any:
    if kind == _FP32:
        return _as_float(bits)
    if kind == _BF16:
        return _as_float(bits << np.uint32(16))
    sign = np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))
    exponent, mantissa = bits & np.uint32(0x7C00), bits & np.uint32(0x3FF)
    if exponent == 0:
        return _as_float(sign | _as_bits(np.float32(np.int32(mantissa)) * np.float32(2.0**-24)))
    bias = np.uint32((224 if exponent == 0x7C00 else 112) << 23)
    return _as_float(sign | (((exponent | mantissa) << np.uint32(13)) + bias))


@_inline
def _load_scale(at: Any, kind: Any) -> Any:
    bits = _u32_at(at, 1)[0] if kind == _FP32 else np.uint32(_u16_at(at, 1)[0])
    return _scale_value(bits, kind)


@_inline
def _store_scale(at: Any, kind: Any, absmax: Any, qmax: Any) -> Any:
    bits = _scale_bits(absmax / np.float32(qmax), kind)
    if not np.float32(_scale_value(bits, kind) * np.float32(qmax)) < np.float32(np.inf):
        bits = _scale_bits(np.float32(np.nan), kind)
    if kind == _FP32:
        _u32_at(at, 1)[0] = bits
    else:
        _u16_at(at, 1)[0] = np.uint16(bits)
    return _scale_value(bits, kind)


# --- planes --------------------------------------------------------------------------------------------
# A plane of w bits folds its digits in half until w * P / 8 bytes are left, shifting by 4, 2 and 1 bits.


@_inline
def _fold(from_at: Any, to_at: Any, run: Any, up: Any) -> None:
    low, high, folded = _u8_at(from_at, run), _u8_at(from_at + run, run), _u8_at(to_at, run)
    for j in range(run):
        folded[j] = np.uint8(low[j] | np.uint8(high[j] << np.uint8(up)))


@_jit
def _pack_planes(codes_at: int, packed_at: int, spare_at: int, num_bits: int, P: int) -> None:
    done = np.uint8(0)
    for width in (4, 2, 1):
        if num_bits & width:
            codes, digits = _u8_at(codes_at, P), _u8_at(spare_at, P)
            mask = np.uint8((1 << width) - 1)
            for j in range(P):
                digits[j] = np.uint8(codes[j] >> done) & mask
            run, up, from_at, to_at = P // 2, 4, spare_at, spare_at + P
            while run > P * width // 8:
                _fold(from_at, to_at, run, up)
                run, up, from_at, to_at = run // 2, up // 2, to_at, from_at
            _fold(from_at, packed_at, run, up)
            packed_at += run
            done = np.uint8(done + np.uint8(width))


@_jit
def _unpack_planes(packed_at: int, codes_at: int, spare_at: int, num_bits: int, P: int) -> None:
    done = np.uint8(0)
    for width in (4, 2, 1):
        if num_bits & width:
            run = P * width // 8
            plane, codes, digits = _u8_at(packed_at, run), _u8_at(codes_at, P), _u8_at(spare_at, P)
            for j in range(run):
                digits[j] = plane[j]
            packed_at += run
            up = np.uint8(width)
            while run < P:
                low, high = _u8_at(spare_at, run), _u8_at(spare_at + run, run)
                for j in range(run):
                    high[j] = low[j] >> up
                run, up = 2 * run, np.uint8(2 * up)
            mask, old = np.uint8((1 << width) - 1), np.uint8((1 << done) - 1)
            for j in range(P):
                codes[j] = np.uint8(codes[j] & old) | np.uint8(np.uint8(digits[j] & mask) << done)
            done = np.uint8(done + np.uint8(width))


@_inline
def _codes_of(packed_at: Any, codes_at: Any, spare_at: Any, num_bits: Any, P: Any) -> Any:
    """The address of a block's codes, one byte each."""
    if num_bits == 8:
        return packed_at
    if num_bits == 4:
        run = P // 2
        packed, low, high = _u8_at(packed_at, run), _u8_at(codes_at, run), _u8_at(codes_at + run, run)
        for j in range(run):
            low[j] = packed[j] & np.uint8(15)
            high[j] = packed[j] >> np.uint8(4)
    else:
        _unpack_planes(packed_at, codes_at, spare_at, num_bits, P)
    return codes_at


# --- encode --------------------------------------------------------------------------------------------


@_inline
def _load(x_at: Any, residual_at: Any, value_at: Any, unscale: Any, L: Any, P: Any) -> Any:
    """Return absmax of x + unscale * residual; the sum goes to scratch, if any, padded with zeros."""
    x, residual, value = _f32_at(x_at, L), _f32_at(residual_at, L), _f32_at(value_at, P)
    most = np.uint32(0)
    if residual_at != 0:
        for j in range(L):
            v = x[j] + residual[j] * unscale
            value[j] = v
            most = np.uint32(max(most, np.uint32(_as_bits(v) & np.uint32(0x7FFFFFFF))))
    else:
        for j in range(L):
            most = np.uint32(max(most, np.uint32(_as_bits(x[j]) & np.uint32(0x7FFFFFFF))))
        if value_at != 0:
            for j in range(L):
                value[j] = x[j]
    for j in range(L, P):
        value[j] = np.float32(0)
    return _as_float(most)


@_inline
def _dithers(j: Any, key: Any, shift: Any, offset: Any) -> Any:
    """Two qmax + u: 16 bits in the mantissa of a float are 1 + dither / 65536; adding offset is exact."""
    d = _mix32(np.uint32(np.uint32(j) + key))
    low = np.uint32(np.uint32(d << np.uint32(7)) + shift)
    high = np.uint32(np.uint32(d >> np.uint32(9)) + shift)
    u = _as_float(np.uint32((low & np.uint32(0x7FFF80)) | np.uint32(0x3F800000))) + offset
    return u, _as_float(np.uint32((high & np.uint32(0x7FFF80)) | np.uint32(0x3F800000))) + offset


@_inline
def _code(v: Any, inverse: Any, u: Any, top: Any) -> Any:
    return np.int32(min(np.int32(v * inverse + u), top))


@_inline
def _lost(v: Any, code: Any, qmax: Any, scale: Any) -> Any:
    return v - np.float32(np.int32(code - qmax)) * scale


@_inline
def _round_nearest(value_at: Any, codes_at: Any, feedback: Any, scale: Any, qmax: Any, P: Any) -> None:
    """Codes, one byte each; with feedback, what is lost replaces the values."""
    value, codes = _f32_at(value_at, P), _u8_at(codes_at, P)
    top, half_up = np.int32(qmax + qmax), np.float32(np.float32(qmax) + np.float32(0.5))
    # a scale of 0 means tiny values: 0 * value + qmax + u gives code qmax
    inverse = np.float32(1) / scale if scale > np.float32(0) else np.float32(0)
    if feedback:
        for j in range(P):
            v = value[j]
            c = _code(v, inverse, half_up, top)
            codes[j] = np.uint8(c)
            value[j] = _lost(v, c, qmax, scale)
    else:
        for j in range(P):
            codes[j] = np.uint8(_code(value[j], inverse, half_up, top))


@_inline
def _round_stochastic(
    value_at: Any, codes_at: Any, feedback: Any, scale: Any, qmax: Any, key_shift: Any, P: Any
) -> None:
    """As `_round_nearest`, elements j and j + P/2 together: they share a hash."""
    h = P // 2
    value, high_value = _f32_at(value_at, h), _f32_at(value_at + 4 * h, h)
    codes, high_codes = _u8_at(codes_at, h), _u8_at(codes_at + h, h)
    key, shift = key_shift[0], np.uint32(key_shift[1] << np.uint32(7))
    top, offset = np.int32(qmax + qmax), np.float32(np.float32(qmax - 1) + np.float32(2.0**-17))
    inverse = np.float32(1) / scale if scale > np.float32(0) else np.float32(0)
    if feedback:
        for j in range(h):
            u, high_u = _dithers(j, key, shift, offset)
            v, high_v = value[j], high_value[j]
            c, high_c = _code(v, inverse, u, top), _code(high_v, inverse, high_u, top)
            codes[j], high_codes[j] = np.uint8(c), np.uint8(high_c)
            value[j], high_value[j] = _lost(v, c, qmax, scale), _lost(high_v, high_c, qmax, scale)
    else:
        for j in range(h):
            u, high_u = _dithers(j, key, shift, offset)
            codes[j] = np.uint8(_code(value[j], inverse, u, top))
            high_codes[j] = np.uint8(_code(high_value[j], inverse, high_u, top))


@_inline
def _encode_block(at: Any, scratch: Any, how: Any, factors: Any, key_shift: Any, L: Any, P: Any) -> None:
    x_at, residual_at, new_at, scale_at, packed_at = at
    value_at, codes_at, spare_at = scratch
    num_bits, kind, stochastic, stream = how
    qmax = np.int32((1 << (num_bits - 1)) - 1)
    feedback = residual_at != 0
    if not feedback and L == P:  # x is only read, so it needs no copy
        absmax = _load(x_at, 0, 0, factors[0], L, P)
        value_at = x_at
    else:
        absmax = _load(x_at, residual_at, value_at, factors[0], L, P)
    scale = _store_scale(scale_at, kind, absmax, qmax)
    if num_bits == 8:
        codes_at = packed_at
    if scale != scale:
        codes = _u8_at(codes_at, P)
        for j in range(P):
            codes[j] = np.uint8(qmax)
    elif stochastic:
        _round_stochastic(value_at, codes_at, feedback, scale, qmax, key_shift, P)
    else:
        _round_nearest(value_at, codes_at, feedback, scale, qmax, P)
    if num_bits == 4:
        _fold(codes_at, packed_at, P // 2, 4)
    elif num_bits != 8:
        _pack_planes(codes_at, packed_at, spare_at, num_bits, P)
    if new_at != 0:
        if scale != scale:
            _write(residual_at, new_at, np.float32(1), L, False)
        else:
            _write(value_at, new_at, factors[1], L, stream)


@_jit
def _encode(tensors_at: Any, n: int, shape: Any, dither: Any, loss_scale: float) -> None:
    x_at, payload_at, residual_at, new_at = tensors_at
    num_bits, block_size, kind, stochastic = shape
    key_low, key_high, shift, first_block = dither
    num_blocks = (n + block_size - 1) // block_size
    scale_size = 4 if kind == _FP32 else 2
    scale_at, packed_at = payload_at, payload_at + num_blocks * scale_size
    memory = np.empty(7 * block_size + 64, np.uint8)
    value_at = _aligned(memory.ctypes.data)
    scratch = (value_at, value_at + 4 * block_size, value_at + 5 * block_size)
    stream = new_at != residual_at and new_at % 32 == 0 and n >= _STREAM_FROM
    how = (num_bits, kind, stochastic, stream)
    factors = (np.float32(loss_scale), np.float32(1.0 / loss_scale))
    for block in range(num_blocks):
        L = min(block_size, n - block * block_size)
        key = np.uint32(np.uint32(np.uint32(first_block) + np.uint32(block)) ^ np.uint32(key_low))
        key_shift = (np.uint32(_mix32(key) + np.uint32(key_high)), np.uint32(shift))
        at = (x_at, residual_at, new_at, scale_at, packed_at)
        if L == _USUAL:
            _encode_block(at, scratch, how, factors, key_shift, _USUAL, _USUAL)
        else:
            _encode_block(at, scratch, how, factors, key_shift, L, (L + 7) // 8 * 8)
        x_at += 4 * L
        residual_at += 4 * L if residual_at != 0 else 0
        new_at += 4 * L if new_at != 0 else 0
        scale_at += scale_size
        packed_at += block_size * num_bits // 8
    if stream:
        _fence()


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
    residual_at = 0 if residual is None else residual.data_ptr()
    new_at = 0 if new_residual is None else new_residual.data_ptr()
    shape = num_bits, block_size, _KIND[scale_dtype], stochastic
    dither = key & _MASK32, (key >> 32) & _MASK32, shift, first_block & _MASK32
    at = x.data_ptr(), payload.data_ptr(), residual_at, new_at
    _encode(at, x.numel(), shape, dither, float(loss_scale))


# --- decode --------------------------------------------------------------------------------------------


@_inline
def _value(code: Any, qmax: Any, scale: Any) -> Any:
    return np.float32(np.int32(np.int32(code) - qmax)) * scale


@_inline
def _add_two_rows(codes_at: Any, scales: Any, qmax: Any, sum_at: Any, first: Any, L: Any) -> None:
    """Two at a time: half the traffic to the sum."""
    a, b, total = _u8_at(codes_at[0], L), _u8_at(codes_at[1], L), _f32_at(sum_at, L)
    if first:
        for j in range(L):
            total[j] = _value(a[j], qmax, scales[0]) + _value(b[j], qmax, scales[1])
    else:
        for j in range(L):
            total[j] = (total[j] + _value(a[j], qmax, scales[0])) + _value(b[j], qmax, scales[1])


@_inline
def _mean_block(at: Any, rows: Any, scratch: Any, how: Any, L: Any, P: Any) -> None:
    scale_at, packed_at, out_at = at
    num_rows, row_stride = rows
    sum_at, codes_at, spare_at = scratch
    num_bits, kind, stream = how
    qmax = np.int32((1 << (num_bits - 1)) - 1)
    if num_rows & 1:
        a = _codes_of(packed_at, codes_at, spare_at, num_bits, P)
        codes, total, scale = _u8_at(a, L), _f32_at(sum_at, L), _load_scale(scale_at, kind)
        for j in range(L):
            total[j] = _value(codes[j], qmax, scale)
        scale_at, packed_at = scale_at + row_stride, packed_at + row_stride
    for row in range(num_rows & 1, num_rows, 2):
        scales = (_load_scale(scale_at, kind), _load_scale(scale_at + row_stride, kind))
        a = _codes_of(packed_at, codes_at, spare_at, num_bits, P)
        b = _codes_of(packed_at + row_stride, codes_at + P, spare_at, num_bits, P)
        _add_two_rows((a, b), scales, qmax, sum_at, row == 0, L)
        scale_at, packed_at = scale_at + 2 * row_stride, packed_at + 2 * row_stride
    _write_mean(sum_at, out_at, num_rows, L, stream)


@_jit
def _decode_mean(payload_at: int, rows: Any, out_at: int, n: int, shape: Any) -> None:
    num_bits, block_size, kind = shape
    num_blocks = (n + block_size - 1) // block_size
    scale_size = 4 if kind == _FP32 else 2
    scale_at, packed_at = payload_at, payload_at + num_blocks * scale_size
    memory = np.empty(7 * block_size + 64, np.uint8)
    sum_at = _aligned(memory.ctypes.data)
    scratch = (sum_at, sum_at + 4 * block_size, sum_at + 6 * block_size)
    stream = out_at % 32 == 0 and n >= _STREAM_FROM
    how = (num_bits, kind, stream)
    for block in range(num_blocks):
        L = min(block_size, n - block * block_size)
        at = (scale_at, packed_at, out_at)
        if L == _USUAL:
            _mean_block(at, rows, scratch, how, _USUAL, _USUAL)
        else:
            _mean_block(at, rows, scratch, how, L, (L + 7) // 8 * 8)
        out_at += 4 * L
        scale_at += scale_size
        packed_at += block_size * num_bits // 8
    if stream:
        _fence()


def uniform_decode(
    payload: Tensor, out: Tensor, *, num_bits: int, block_size: int, scale_dtype: torch.dtype
) -> None:
    """Decode one segment into out."""
    shape = num_bits, block_size, _KIND[scale_dtype]
    _decode_mean(payload.data_ptr(), (1, 0), out.data_ptr(), out.numel(), shape)


def uniform_decode_mean(
    payloads: Tensor, out: Tensor, *, num_bits: int, block_size: int, scale_dtype: torch.dtype
) -> None:
    """Mean over the W rows of payloads, added in row order in fp32, divided once."""
    shape = num_bits, block_size, _KIND[scale_dtype]
    rows = payloads.shape[0], payloads.stride(0)
    _decode_mean(payloads.data_ptr(), rows, out.data_ptr(), out.numel(), shape)


# --- exact ---------------------------------------------------------------------------------------------

exact_encode = reference.exact_encode  # torch's casts run at the speed of memory
exact_decode = reference.exact_decode


@_inline
def _add_exact_row(row_at: Any, is_bf16: Any, sum_at: Any, first: Any, L: Any) -> None:
    row, half, total = _f32_at(row_at, L), _u16_at(row_at, L), _f32_at(sum_at, L)
    if is_bf16 and first:
        for j in range(L):
            total[j] = _as_float(np.uint32(half[j]) << np.uint32(16))
    elif is_bf16:
        for j in range(L):
            total[j] += _as_float(np.uint32(half[j]) << np.uint32(16))
    elif first:
        for j in range(L):
            total[j] = row[j]
    else:
        for j in range(L):
            total[j] += row[j]


@_jit
def _exact_mean(rows_at: int, rows: Any, out_at: int, n: int, is_bf16: bool) -> None:
    num_rows, row_stride = rows
    memory = np.empty(4 * _TILE + 64, np.uint8)
    sum_at = _aligned(memory.ctypes.data)
    stream = out_at % 32 == 0 and n >= _STREAM_FROM
    for start in range(0, n, _TILE):
        L = min(_TILE, n - start)
        for row in range(num_rows):
            row_at = rows_at + row * row_stride + (2 if is_bf16 else 4) * start
            _add_exact_row(row_at, is_bf16, sum_at, row == 0, L)
        _write_mean(sum_at, out_at + 4 * start, num_rows, L, stream)
    if stream:
        _fence()


def exact_decode_mean(payloads: Tensor, out: Tensor, *, wire_dtype: torch.dtype) -> None:
    """Mean over the W rows of payloads in one pass, added in row order in out's dtype, divided once."""
    rows = payloads.shape[0], payloads.stride(0)
    if out.dtype == torch.float32 and wire_dtype in (torch.float32, torch.bfloat16):
        is_bf16 = wire_dtype == torch.bfloat16
        _exact_mean(payloads.data_ptr(), rows, out.data_ptr(), out.numel(), is_bf16)
    else:
        reference.exact_decode_mean(payloads, out, wire_dtype=wire_dtype)


def warm_up() -> None:
    """Compile the kernels, or load them from Numba's cache, so that the first training step does not."""
    x, payload = torch.zeros(8), torch.zeros(1, 64, dtype=torch.uint8)
    form: dict[str, Any] = {"num_bits": 8, "block_size": 64, "scale_dtype": torch.float32}
    dither: dict[str, Any] = {"stochastic": True, "key": 0, "shift": 0, "first_block": 0}
    uniform_encode(x, payload[0], **form, **dither, residual=None, new_residual=None, loss_scale=1.0)
    uniform_decode(payload[0], x, **form)
    exact_decode_mean(payload[:, :32], x, wire_dtype=torch.float32)
