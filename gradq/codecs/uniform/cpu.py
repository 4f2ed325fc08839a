"""The Numba kernels: one pass over memory, byte for byte what `gradq.codecs.uniform.reference` writes.

A few blocks at a time, in scratch that stays in the L1 cache: add the residual and find absmax, round to
one byte a code, pack the bytes. L elements in a block, P = L padded to 8, W rows; `_at` is an address, 0 for
none.

What makes them fast. Every operand is cast to 32 bits (Numba widens to 64). Kernels take addresses: a call
with six arrays costs more than a short segment. Loops over a constant length compile to far better code,
so the usual block sizes have their own copies, by inlining. Outputs nobody reads soon are written past the
cache.

What keeps them right. No fast-math: NaN, Inf and the reference's rounding survive. absmax is the greatest bit
pattern: integers have no NaN to lose.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from gradq.codecs.uniform import reference
from gradq.kernels.numba_compile import inline, jit, variant
from gradq.kernels.numba_tools import (
    address,
    as_bits,
    as_float,
    f32_at,
    fence,
    load_absmax,
    load_copy,
    load_sum,
    mix32,
    next_blocks,
    packing,
    plain,
    row_addresses,
    scratch,
    u8_at,
    u16_at,
    u32_at,
)
from gradq.kernels.turns import in_turns

__all__ = [
    "exact_decode",
    "exact_decode_mean",
    "exact_encode",
    "uniform_decode",
    "uniform_decode_mean",
    "uniform_encode",
    "warm_up",
]

_MASK32 = 0xFFFFFFFF
_FP32, _BF16, _FP16 = 0, 1, 2
_KIND = {torch.float32: _FP32, torch.bfloat16: _BF16, torch.float16: _FP16}
_USUAL = (64, 256)  # the block sizes with loops of their own
_TOGETHER = 1024  # elements of the blocks that are taken together
_WITH_FEEDBACK = 256  # the same where two more streams go to and from memory
_STREAM_FROM = 4096  # from this many elements outputs are written past the cache
_TILE = 1024  # elements of an exact mean that stay in the L1 cache


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


_stream: Any = intrinsic(_stream_8)  # 8 floats times a factor, written past the cache


@inline
def _write(scratch_at: Any, out_at: Any, factor: Any, L: Any, stream: Any) -> None:
    """Scratch times factor to out."""
    done = 0
    if stream:
        done = L // 8 * 8
        for j in range(0, done, 8):
            _stream(out_at + 4 * j, scratch_at + 4 * j, factor)
    scratch, out = f32_at(scratch_at + 4 * done, L - done), f32_at(out_at + 4 * done, L - done)
    for j in range(L - done):  # a range from 0: of others Numba does not know that they stay positive
        out[j] = scratch[j] * factor


@inline
def _write_mean(sum_at: Any, out_at: Any, num_rows: Any, L: Any, stream: Any) -> None:
    factor = np.float32(1)
    if num_rows & (num_rows - 1) == 0:  # a product with a power of two equals the quotient
        factor /= np.float32(num_rows)
    else:
        total = f32_at(sum_at, L)
        for j in range(L):
            total[j] /= np.float32(num_rows)
    _write(sum_at, out_at, factor, L, stream)


# --- bits ----------------------------------------------------------------------------------------------


@inline
def _scale_bits(scale: Any, kind: Any) -> Any:
    """As in the reference: rounded up, 0 for tiny scales, NaN for what is not finite."""
    bits = as_bits(scale)
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


@inline
def _scale_value(bits: Any, kind: Any) -> Any:
    if kind == _FP32:
        return as_float(bits)
    if kind == _BF16:
        return as_float(bits << np.uint32(16))
    sign = np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))
    exponent, mantissa = bits & np.uint32(0x7C00), bits & np.uint32(0x3FF)
    if exponent == 0:
        return as_float(sign | as_bits(np.float32(np.int32(mantissa)) * np.float32(2.0**-24)))
    bias = np.uint32((224 if exponent == 0x7C00 else 112) << 23)
    return as_float(sign | (((exponent | mantissa) << np.uint32(13)) + bias))


@inline
def _load_scale(at: Any, kind: Any) -> Any:
    bits = u32_at(at, 1)[0] if kind == _FP32 else np.uint32(u16_at(at, 1)[0])
    return _scale_value(bits, kind)


@inline
def _store_scale(at: Any, kind: Any, absmax: Any, qmax: Any) -> Any:
    bits = _scale_bits(absmax / np.float32(qmax), kind)
    if not np.float32(_scale_value(bits, kind) * np.float32(qmax)) < np.float32(np.inf):
        bits = _scale_bits(np.float32(np.nan), kind)
    if kind == _FP32:
        u32_at(at, 1)[0] = bits
    else:
        u16_at(at, 1)[0] = np.uint16(bits)
    return _scale_value(bits, kind)


# --- codes ---------------------------------------------------------------------------------------------


@inline
def _codes_as_they_are(packed_at: Any, _codes_at: Any, _count: Any, _P: Any) -> Any:
    return packed_at


@functools.cache
def _codes_of(num_bits: int, multiple: int) -> Any:
    """A function that gives the address of the codes of some blocks, one byte each."""
    if num_bits == 8:
        return _codes_as_they_are
    unpack = packing(num_bits, multiple)[1]

    @inline
    def codes_unpacked(packed_at: Any, codes_at: Any, count: Any, P: Any) -> Any:
        size = P // 8 * num_bits
        for i in range(count):
            unpack(packed_at + i * size, codes_at + i * P, P)
        return codes_at

    return codes_unpacked


# --- encode --------------------------------------------------------------------------------------------


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


_ROUND: dict[tuple[bool, bool], Any] = {
    (False, False): _round_nearest,
    (False, True): _round_nearest_feedback,
    (True, False): _round_stochastic,
    (True, True): _round_stochastic_feedback,
}


@inline
def _no_packing(_codes_at: Any, _packed_at: Any, _P: Any) -> None:
    """Of 8 bits: the codes stand where they belong."""


@functools.cache
def _encoder(num_bits: int, stochastic: bool, feedback: bool, usual: int) -> Any:
    """The kernel for a form: only what that needs is compiled.

    Args:
        num_bits: of a code.
        stochastic: how it rounds.
        feedback: whether there is a residual.
        usual: the block size with loops of its own; 0 for none.
    """
    qmax = np.int32((1 << (num_bits - 1)) - 1)
    in_place = num_bits == 8  # codes are the packed bytes
    round_codes = _ROUND[stochastic, feedback]

    def blocks_with(pack_codes: Any) -> Any:
        @inline
        def encode_block(
            at: Any, places: Any, stream: Any, scale: Any, factor: Any, key_shift: Any, L: Any, P: Any
        ) -> None:
            """Codes of the values at scratch, and what they lose."""
            residual_at, new_at, packed_at = at
            value_at, codes_at = places
            if in_place:
                codes_at = packed_at
            if scale != scale:
                codes = u8_at(codes_at, P)
                for j in range(P):
                    codes[j] = np.uint8(qmax)
            else:
                round_codes(value_at, codes_at, scale, qmax, key_shift, P)
            pack_codes(codes_at, packed_at, P)
            if feedback:  # noqa: SIM102 (Numba drops the branch)
                if new_at != 0:
                    if scale != scale:
                        _write(residual_at, new_at, np.float32(1), L, False)
                    else:
                        _write(value_at, new_at, factor, L, stream)

        @inline
        def encode_blocks(
            at: Any, count: Any, places: Any, stream: Any, factors: Any, dither: Any, L: Any, P: Any
        ) -> None:
            """Blocks of L elements, each step for all: what one waits for the others do not."""
            x_at, residual_at, new_at, scale_at, packed_at = at
            key_low, key_high, shift, first_block = dither
            value_at, codes_at, scales_at, kind = places
            scale_size = 4 if kind == _FP32 else 2
            scales = f32_at(scales_at, count)
            copied = feedback or L != P  # else x is only read
            for i in range(count):
                more = 4 * i * L
                if feedback:
                    scales[i] = load_sum(x_at + more, residual_at + more, value_at + more, factors[0], L, P)
                elif L != P:
                    scales[i] = load_copy(x_at + more, value_at + more, L, P)
                else:
                    scales[i] = load_absmax(x_at + more, L)
            for i in range(count):
                scales[i] = _store_scale(scale_at + scale_size * i, kind, scales[i], qmax)
            for i in range(count):
                more = 4 * i * L
                key = np.uint32(np.uint32(np.uint32(first_block) + np.uint32(i)) ^ np.uint32(key_low))
                key_shift = (np.uint32(mix32(key) + np.uint32(key_high)), np.uint32(shift))
                put_at = new_at + more if new_at != 0 else 0
                block_at = (residual_at + more, put_at, packed_at + i * (P // 8 * num_bits))
                here = ((value_at if copied else x_at) + more, codes_at)
                encode_block(block_at, here, stream, scales[i], factors[1], key_shift, L, P)

        return encode_blocks

    rest = blocks_with(_no_packing if in_place else packing(num_bits, 8 if usual else 0)[0])
    whole = rest if in_place or not usual else blocks_with(packing(num_bits, 64)[0])
    rounding = "stochastic" if stochastic else "nearest"

    @variant(f"{num_bits}-{rounding}-{'feedback' if feedback else 'alone'}-{usual}")
    def encode(tensors_at: Any, n: int, shape: Any, dither: Any, loss_scale: float) -> None:
        block_size, kind = shape
        size = plain(usual)
        scale_size = 4 if kind == _FP32 else 2
        x_at, payload_at, residual_at, new_at = tensors_at
        key_low, key_high, shift, first_block = dither
        num_blocks = (n + block_size - 1) // block_size
        scale_at, packed_at = payload_at, payload_at + num_blocks * scale_size
        together = max((_WITH_FEEDBACK if feedback else _TOGETHER) // block_size, 1)
        value_at = scratch(4 * together * block_size + block_size + 4 * together + 128)
        codes_at = value_at + 4 * together * block_size
        places = (value_at, codes_at, codes_at + (block_size + 63) // 64 * 64, kind)
        stream = new_at != residual_at and new_at % 32 == 0 and n >= _STREAM_FROM
        factors = (np.float32(loss_scale), np.float32(1.0 / loss_scale))
        block = 0
        while block < num_blocks:
            count, L = next_blocks(n - block * block_size, block_size, together)
            at = (x_at, residual_at, new_at, scale_at, packed_at)
            draws = (key_low, key_high, shift, first_block + block)
            if size == L:
                whole(at, count, places, stream, factors, draws, size, size)
            else:
                rest(at, count, places, stream, factors, draws, L, (L + 7) // 8 * 8)
            x_at += 4 * L * count
            residual_at += 4 * L * count if residual_at != 0 else 0
            new_at += 4 * L * count if new_at != 0 else 0
            scale_at += scale_size * count
            packed_at += block_size * num_bits // 8 * count
            block += count
        if stream:
            fence()

    return encode


def _payload_bytes(n: int, num_bits: int, block_size: int, scale: torch.dtype) -> int:
    return -(-n // block_size) * scale.itemsize + -(-n // 8) * num_bits


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
    n = x.numel()
    nbytes = _payload_bytes(n, num_bits, block_size, scale_dtype)
    residual_at = 0 if residual is None else address(residual, torch.float32, n)
    new_at = 0 if new_residual is None else address(new_residual, torch.float32, n)
    dither = key & _MASK32, (key >> 32) & _MASK32, shift, first_block & _MASK32
    at = address(x, torch.float32, n), address(payload, torch.uint8, nbytes), residual_at, new_at
    usual = block_size if block_size in _USUAL else 0
    kernel = _encoder(num_bits, bool(stochastic), residual is not None, usual)
    kernel(at, n, (block_size, _KIND[scale_dtype]), dither, float(loss_scale))


# --- decode --------------------------------------------------------------------------------------------


@inline
def _value(code: Any, qmax: Any, scale: Any) -> Any:
    return np.float32(np.int32(np.int32(code) - qmax)) * scale


@inline
def _add_two_rows(codes_at: Any, scales: Any, qmax: Any, sum_at: Any, first: Any, L: Any) -> None:
    """Two at a time: half the traffic to the sum."""
    a, b, total = u8_at(codes_at[0], L), u8_at(codes_at[1], L), f32_at(sum_at, L)
    if first:
        for j in range(L):
            total[j] = _value(a[j], qmax, scales[0]) + _value(b[j], qmax, scales[1])
    else:
        for j in range(L):
            total[j] = (total[j] + _value(a[j], qmax, scales[0])) + _value(b[j], qmax, scales[1])


@functools.cache
def _decoder(num_bits: int, usual: int) -> Any:
    """The kernel for a form; see `_encoder`."""
    qmax = np.int32((1 << (num_bits - 1)) - 1)

    def blocks_with(codes_of: Any) -> Any:
        @inline
        def mean_blocks(at: Any, count: Any, rows: Any, places: Any, stream: Any, L: Any, P: Any) -> None:
            """Blocks of L elements, as `encode_blocks`."""
            scale_at, packed_at, out_at = at
            num_rows, row_stride = rows
            sum_at, codes_at, kind = places
            scale_size = 4 if kind == _FP32 else 2
            if num_rows & 1:
                a_at = codes_of(packed_at, codes_at, count, P)
                for i in range(count):
                    codes, total = u8_at(a_at + i * P, L), f32_at(sum_at + 4 * i * L, L)
                    scale = _load_scale(scale_at + i * scale_size, kind)
                    for j in range(L):
                        total[j] = _value(codes[j], qmax, scale)
                scale_at, packed_at = scale_at + row_stride, packed_at + row_stride
            for row in range(num_rows & 1, num_rows, 2):
                a_at = codes_of(packed_at, codes_at, count, P)
                b_at = codes_of(packed_at + row_stride, codes_at + count * P, count, P)
                for i in range(count):
                    at_i = scale_at + i * scale_size
                    scales = (_load_scale(at_i, kind), _load_scale(at_i + row_stride, kind))
                    _add_two_rows((a_at + i * P, b_at + i * P), scales, qmax, sum_at + 4 * i * L, row == 0, L)
                scale_at, packed_at = scale_at + 2 * row_stride, packed_at + 2 * row_stride
            for i in range(count):
                _write_mean(sum_at + 4 * i * L, out_at + 4 * i * L, num_rows, L, stream)

        return mean_blocks

    rest = blocks_with(_codes_of(num_bits, 8 if usual else 0))
    whole = rest if num_bits == 8 or not usual else blocks_with(_codes_of(num_bits, 64))

    @variant(f"{num_bits}-{usual}")
    def decode_mean(payload_at: int, rows: Any, out_at: int, n: int, shape: Any) -> None:
        block_size, kind = shape
        size = plain(usual)
        scale_size = 4 if kind == _FP32 else 2
        num_blocks = (n + block_size - 1) // block_size
        scale_at, packed_at = payload_at, payload_at + num_blocks * scale_size
        together = max(_TOGETHER // block_size, 1)
        sum_at = scratch(6 * together * block_size + 64)
        places = (sum_at, sum_at + 4 * together * block_size, kind)
        stream = out_at % 32 == 0 and n >= _STREAM_FROM
        block = 0
        while block < num_blocks:
            count, L = next_blocks(n - block * block_size, block_size, together)
            at = (scale_at, packed_at, out_at)
            if size == L:
                whole(at, count, rows, places, stream, size, size)
            else:
                rest(at, count, rows, places, stream, L, (L + 7) // 8 * 8)
            out_at += 4 * L * count
            scale_at += scale_size * count
            packed_at += block_size * num_bits // 8 * count
            block += count
        if stream:
            fence()

    return decode_mean


def uniform_decode(
    payload: Tensor, out: Tensor, *, num_bits: int, block_size: int, scale_dtype: torch.dtype
) -> None:
    """Decode one segment into out."""
    n = out.numel()
    payload_at = address(payload, torch.uint8, _payload_bytes(n, num_bits, block_size, scale_dtype))
    kernel = _decoder(num_bits, block_size if block_size in _USUAL else 0)
    kernel(payload_at, (1, 0), address(out, torch.float32, n), n, (block_size, _KIND[scale_dtype]))


def uniform_decode_mean(
    payloads: Tensor, out: Tensor, *, num_bits: int, block_size: int, scale_dtype: torch.dtype
) -> None:
    """Mean over the W rows of payloads, added in row order in fp32, divided once."""
    n = out.numel()
    rows_at, rows = row_addresses(payloads, _payload_bytes(n, num_bits, block_size, scale_dtype))
    kernel = _decoder(num_bits, block_size if block_size in _USUAL else 0)
    kernel(rows_at, rows, address(out, torch.float32, n), n, (block_size, _KIND[scale_dtype]))


# --- exact ---------------------------------------------------------------------------------------------

exact_encode, exact_decode = reference.exact_encode, reference.exact_decode  # torch casts as fast as memory


@inline
def _add_exact_row(row_at: Any, is_bf16: Any, sum_at: Any, first: Any, L: Any) -> None:
    row, half, total = f32_at(row_at, L), u16_at(row_at, L), f32_at(sum_at, L)
    if is_bf16 and first:
        for j in range(L):
            total[j] = as_float(np.uint32(half[j]) << np.uint32(16))
    elif is_bf16:
        for j in range(L):
            total[j] += as_float(np.uint32(half[j]) << np.uint32(16))
    elif first:
        for j in range(L):
            total[j] = row[j]
    else:
        for j in range(L):
            total[j] += row[j]


@jit
def _exact_mean(rows_at: int, rows: Any, out_at: int, n: int, is_bf16: bool) -> None:
    num_rows, row_stride = rows
    sum_at = scratch(4 * _TILE)
    stream = out_at % 32 == 0 and n >= _STREAM_FROM
    for start in range(0, n, _TILE):
        L = min(_TILE, n - start)
        for row in range(num_rows):
            row_at = rows_at + row * row_stride + (2 if is_bf16 else 4) * start
            _add_exact_row(row_at, is_bf16, sum_at, row == 0, L)
        _write_mean(sum_at, out_at + 4 * start, num_rows, L, stream)
    if stream:
        fence()


def exact_decode_mean(payloads: Tensor, out: Tensor, *, wire_dtype: torch.dtype) -> None:
    """Mean over the W rows of payloads in one pass, added in row order in out's dtype, divided once."""
    if out.dtype == torch.float32 and wire_dtype in (torch.float32, torch.bfloat16):
        n = out.numel()
        rows_at, rows = row_addresses(payloads, n * wire_dtype.itemsize)
        _exact_mean(rows_at, rows, address(out, torch.float32, n), n, wire_dtype == torch.bfloat16)
    else:
        reference.exact_decode_mean(payloads, out, wire_dtype=wire_dtype)


def warm_up() -> None:
    """Compile the kernels of int8, or load them from disk, so that the first training step does not."""
    x, payload = torch.zeros(8), torch.zeros(1, 64, dtype=torch.uint8)
    form: dict[str, Any] = {"num_bits": 8, "block_size": 256, "scale_dtype": torch.bfloat16}
    dither: dict[str, Any] = {"stochastic": True, "key": 0, "shift": 0, "first_block": 0}
    in_turns(
        [
            lambda: uniform_encode(
                x, payload[0], **form, **dither, residual=None, new_residual=None, loss_scale=1.0
            ),
            lambda: uniform_decode(payload[0], x, **form),
            lambda: exact_decode_mean(payload[:, :32], x, wire_dtype=torch.float32),
        ]
    )
