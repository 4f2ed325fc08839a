"""The rotated codecs in Numba: byte for byte what `gradq.kernels.reference_rotated` writes.

A tile (16 KiB) is worked on in scratch that stays in the L1 cache; memory is read and written once. Shapes as
in the reference: R rows of 16 columns, G groups.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba.np.numpy_support import carray
from torch import Tensor

from gradq.kernels.cpu import (
    _as_float,
    _f32_pointer,
    _inline,
    _jit,
    _mix32,
    _pack,
    _u8_pointer,
    _unpack,
)
from gradq.kernels.rotated import POLYNOMIALS, payload_bytes
from gradq.kernels.vector import (
    as_row,
    as_words,
    constant_row,
    constant_words,
    hadamard_rows,
    load_bytes,
    load_row,
    load_words,
    maximum,
    maximum_words,
    minimum,
    store_bytes,
    store_row,
    store_words,
    to_float,
    to_int,
)

__all__ = ["rotated_decode", "rotated_decode_mean", "rotated_encode"]

_CONSTANTS = {
    bits: np.array([p.top, *p.to_index, *p.to_level, 1 << (bits - 1)], np.float32)
    for bits, p in POLYNOMIALS.items()
}


@_inline
def _zero() -> Any:
    return constant_row(np.float32(0))


@_inline
def _sign_words(tile_key: Any, words: Any) -> None:
    for w in range(len(words)):
        words[w] = _mix32(np.uint32(tile_key + np.uint32(w)))


@_inline
def _sign_bits(words_at: Any, row: Any) -> Any:
    left = constant_words(np.uint32(31 - (row & 31)))
    return (load_words(words_at + 64 * (row >> 5)) << left) & constant_words(np.uint32(0x80000000))


@_inline
def _signed_row(z_at: Any, words_at: Any, row: Any, scale: Any) -> Any:
    return as_row(as_words(load_row(z_at + 64 * row) * scale) ^ _sign_bits(words_at, row))


@_inline
def _low_stages(at: Any, size: Any) -> None:
    """Distances 1, 2, 4, 8 of `size` rows, a power of two, in place."""
    if size >= 16:
        for row in range(0, size, 16):
            hadamard_rows(at + 64 * row, 64)
    else:
        distance = 1
        while distance < size:
            _stage(at, size, distance)
            distance *= 2


@_inline
def _high_stages(at: Any, size: Any) -> None:
    """Distances 16, 32, ... of `size` rows, a power of two, in place."""
    if size == 256:
        for row in range(16):
            hadamard_rows(at + 64 * row, 1024)
    else:
        distance = 16
        while distance < size:
            _stage(at, size, distance)
            distance *= 2


@_inline
def _stage(at: Any, size: Any, distance: Any) -> None:
    for row in range(size):
        if row & distance == 0:
            first, second = at + 64 * row, at + 64 * (row + distance)
            a, b = load_row(first), load_row(second)
            store_row(first, a + b)
            store_row(second, a - b)


@_inline
def _multiply(at: Any, rows: Any, factor: Any) -> None:
    for row in range(rows):
        store_row(at + 64 * row, load_row(at + 64 * row) * constant_row(factor))


@_inline
def _window(rows: Any) -> Any:
    """The largest power of two <= rows."""
    size = 1
    while 2 * size <= rows:
        size *= 2
    return size


@_inline
def _rotate(at: Any, rows: Any) -> None:
    size = _window(rows)
    _low_stages(at, size)
    _high_stages(at, size)
    if size != rows:
        factor = np.float32(1.0 / np.sqrt(float(size)))
        last = at + 64 * (rows - size)
        _multiply(at, size, factor)
        _low_stages(last, size)
        _high_stages(last, size)
        _multiply(last, size, factor)


@_inline
def _unrotate(at: Any, rows: Any) -> None:
    size = _window(rows)
    if size != rows:
        factor = np.float32(1.0 / np.sqrt(float(size)))
        last = at + 64 * (rows - size)
        _high_stages(last, size)
        _low_stages(last, size)
        _multiply(last, size, factor)
        _high_stages(at, size)
        _low_stages(at, size)
        _multiply(at, size, factor)
    else:
        _high_stages(at, size)
        _low_stages(at, size)


@_inline
def _read(x_L: Any, residual_L: Any, unscale: Any, with_residual: Any, value_at: Any, value: Any) -> Any:
    """Value = x + residual * unscale, the last row filled up with zeros; the bits of the largest magnitude."""
    L = len(x_L)
    x_at, residual_at = x_L.ctypes.data, residual_L.ctypes.data
    bits = constant_words(np.uint32(0))
    magnitude = constant_words(np.uint32(0x7FFFFFFF))
    factor = constant_row(unscale)
    if L & 15:
        for j in range(L & ~15, (L + 15) & ~15):
            value[j] = np.float32(0)
            if j < L:
                value[j] = x_L[j] + residual_L[j] * unscale if with_residual else x_L[j]
        bits = as_words(load_row(value_at + 4 * (L & ~15))) & magnitude
    if with_residual:
        for row in range(L >> 4):
            v = load_row(x_at + 64 * row) + load_row(residual_at + 64 * row) * factor
            store_row(value_at + 64 * row, v)
            bits = maximum_words(bits, as_words(v) & magnitude)
    else:
        for row in range(L >> 4):
            v = load_row(x_at + 64 * row)
            store_row(value_at + 64 * row, v)
            bits = maximum_words(bits, as_words(v) & magnitude)
    return bits


@_inline
def _fold(s0: Any, s1: Any, s2: Any, s3: Any, groups: Any, scratch_C: Any, sums_G: Any) -> None:
    """The four accumulators of each column to sums over the columns of each group."""
    store_row(scratch_C.ctypes.data, (s0 + s1) + (s2 + s3))
    for g in range(groups):
        sums_G[g] = np.float32(0)
    for c in range(16):
        sums_G[c * groups // 16] += scratch_C[c]


@_inline
def _to_unit_row(value_at: Any, z_at: Any, words_at: Any, row: Any, factor: Any) -> Any:
    """Store a row of value with its signs and in units of the tile; its squares."""
    v = as_row(as_words(load_row(value_at + 64 * row)) ^ _sign_bits(words_at, row)) * factor
    store_row(z_at + 64 * row, v)
    return v * v


@_inline
def _to_unit(
    value_at: Any, z_at: Any, words_at: Any, rows: Any, to_unit: Any, groups: Any, scratch_C: Any, sums_G: Any
) -> None:
    """Step 2 but for the transform: signs, unit, energy; of a full tile also the low stages."""
    s0, s1, s2, s3 = _zero(), _zero(), _zero(), _zero()
    factor = constant_row(to_unit)
    for row in range(0, rows & ~3, 4):
        s0 = s0 + _to_unit_row(value_at, z_at, words_at, row, factor)
        s1 = s1 + _to_unit_row(value_at, z_at, words_at, row + 1, factor)
        s2 = s2 + _to_unit_row(value_at, z_at, words_at, row + 2, factor)
        s3 = s3 + _to_unit_row(value_at, z_at, words_at, row + 3, factor)
        if rows == 256 and row & 12 == 12:
            hadamard_rows(z_at + 64 * (row - 12), 64)
    rest = rows & ~3
    if rows & 3 > 0:
        s0 = s0 + _to_unit_row(value_at, z_at, words_at, rest, factor)
    if rows & 3 > 1:
        s1 = s1 + _to_unit_row(value_at, z_at, words_at, rest + 1, factor)
    if rows & 3 > 2:
        s2 = s2 + _to_unit_row(value_at, z_at, words_at, rest + 2, factor)
    _fold(s0, s1, s2, s3, groups, scratch_C, sums_G)


@_inline
def _rows_of(constants: Any) -> Any:
    """Constants as rows, for `_quantize_row` and `_level`; outside of loops, or they are loaded every time."""
    middle = np.float32(constants[9] - np.float32(0.5))
    return (
        constant_row(-constants[0]),
        constant_row(constants[0]),
        constant_row(constants[1]),
        constant_row(constants[2]),
        constant_row(constants[3]),
        constant_row(constants[4]),
        constant_row(constants[9]),
        (
            constant_row(middle),
            constant_row(constants[5]),
            constant_row(constants[6]),
            constant_row(constants[7]),
            constant_row(constants[8]),
        ),
    )


@_inline
def _level(code: Any, to_level: Any) -> Any:
    """The levels of a row of codes."""
    middle, a0, a1, a2, a3 = to_level
    m = to_float(code) - middle
    m2 = m * m
    return m * (a0 + m2 * (a1 + m2 * (a2 + m2 * a3)))


@_inline
def _quantize_row(at: Any, codes_at: Any, inverse: Any, constants: Any) -> Any:
    """Store the codes of a row, replace it by its levels; level * z and level²."""
    bottom, top, k0, k1, k2, k3, half, to_level = constants
    z = load_row(at)
    y = minimum(maximum(z * inverse, bottom), top)
    y2 = y * y
    code = to_int(y * (k0 + y2 * (k1 + y2 * (k2 + y2 * k3))) + half)
    store_bytes(codes_at, code)
    level = _level(code, to_level)
    store_row(at, level)
    return level * z, level * level


@_inline
def _quantize(
    at: Any,
    codes_at: Any,
    rows: Any,
    groups: Any,
    rows_of_constants: Any,
    inverse: Any,
    with_residual: Any,
    scratch_C: Any,
    inner_G: Any,
    norm_G: Any,
) -> None:
    """Codes of z and sums of ⟨level, z⟩ and ‖level‖²; z becomes the levels.

    Of a full tile this includes the transform's high stages before, and those of its inverse after.
    """
    i0, i1, i2, i3 = _zero(), _zero(), _zero(), _zero()
    n0, n1, n2, n3 = _zero(), _zero(), _zero(), _zero()
    step = 16 if rows == 256 else 1  # between rows
    for first in range(0, rows & ~3, 4):
        row = (first >> 4) + ((first & 15) << 4) if rows == 256 else first
        if rows == 256 and first & 15 == 0:
            hadamard_rows(at + 64 * row, 1024)
        i, n = _quantize_row(at + 64 * row, codes_at + 16 * row, inverse, rows_of_constants)
        i0, n0 = i0 + i, n0 + n
        row += step
        i, n = _quantize_row(at + 64 * row, codes_at + 16 * row, inverse, rows_of_constants)
        i1, n1 = i1 + i, n1 + n
        row += step
        i, n = _quantize_row(at + 64 * row, codes_at + 16 * row, inverse, rows_of_constants)
        i2, n2 = i2 + i, n2 + n
        row += step
        i, n = _quantize_row(at + 64 * row, codes_at + 16 * row, inverse, rows_of_constants)
        i3, n3 = i3 + i, n3 + n
        if rows == 256 and with_residual and first & 12 == 12:
            hadamard_rows(at + 64 * (row - 240), 1024)
    rest = rows & ~3
    if rows & 3 > 0:
        i, n = _quantize_row(at + 64 * rest, codes_at + 16 * rest, inverse, rows_of_constants)
        i0, n0 = i0 + i, n0 + n
    if rows & 3 > 1:
        i, n = _quantize_row(at + 64 * rest + 64, codes_at + 16 * rest + 16, inverse, rows_of_constants)
        i1, n1 = i1 + i, n1 + n
    if rows & 3 > 2:
        i, n = _quantize_row(at + 64 * rest + 128, codes_at + 16 * rest + 32, inverse, rows_of_constants)
        i2, n2 = i2 + i, n2 + n
    _fold(i0, i1, i2, i3, groups, scratch_C, inner_G)
    _fold(n0, n1, n2, n3, groups, scratch_C, norm_G)


@_inline
def _bf16(bits: Any) -> Any:
    return _as_float(np.uint32(bits << np.uint32(16)))


@_inline
def _as_bits(value: Any) -> Any:
    return np.float32(value).view(np.uint32)


@_jit
def _encode(
    x_at: int,
    n: int,
    payload_at: int,
    nbytes: int,
    num_bits: int,
    unbiased: bool,
    base: int,
    residual_at: int,
    new_residual_at: int,
    loss_scale: float,
    inverse_loss_scale: float,
    constants: Any,
) -> None:
    """Addresses of 0 stand for no residual."""
    x = carray(_f32_pointer(x_at), n)
    payload = carray(_u8_pointer(payload_at), nbytes)
    residual = carray(_f32_pointer(residual_at), n)
    new_residual = carray(_f32_pointer(new_residual_at), n)
    value_T, z_T = np.empty(4096, np.float32), np.empty(4096, np.float32)
    codes_T, words = np.empty(4096, np.uint8), np.empty(128, np.uint32)
    scratch_C, column_C, bits_G = np.empty(16, np.float32), np.empty(16, np.float32), np.empty(16, np.uint32)
    energy_G, inner_G, norm_G = np.empty(16, np.float32), np.empty(16, np.float32), np.empty(16, np.float32)
    value_at, z_at, codes_T_at = value_T.ctypes.data, z_T.ctypes.data, codes_T.ctypes.data
    words_at, column_at = words.ctypes.data, column_C.ctypes.data
    rows_of_constants = _rows_of(constants)
    unscale, rescale = np.float32(loss_scale), np.float32(inverse_loss_scale)
    for k in range(4):
        payload[k] = np.uint8(np.uint32(base) >> np.uint32(8 * k))
    scales_at = 4
    codes_at = 4 + 2 * ((n + 255) // 256)
    for tile in range((n + 4095) // 4096):
        start = tile * 4096
        L = min(4096, n - start)
        rows = (L + 15) // 16
        groups = (L + 255) // 256
        x_L, residual_L = x[start : start + L], residual[start : start + L]
        magnitudes = _read(x_L, residual_L, unscale, residual_at != 0, value_at, value_T)
        store_words(bits_G.ctypes.data, magnitudes)
        absmax = np.uint32(0)
        for c in range(16):
            absmax = max(absmax, bits_G[c])
        exponent = np.int32(absmax >> np.uint32(23))
        to_unit = _as_float(np.uint32(min(max(254 - exponent, 1), 253)) << np.uint32(23))
        lost = exponent == 255
        tile_key = _mix32(np.uint32(np.uint32(base) + np.uint32(tile)))
        _sign_words(tile_key, words)
        if lost or exponent == 0:
            for row in range(rows):
                store_row(z_at + 64 * row, _zero())
            for g in range(groups):
                energy_G[g] = np.float32(0)
        else:
            _to_unit(value_at, z_at, words_at, rows, to_unit, groups, scratch_C, energy_G)
            if rows != 256:
                _rotate(z_at, rows)
        gain = np.float32(rows if _window(rows) == rows else 1)
        for c in range(16):
            g = c * groups // 16
            count = ((g + 1) * 16 + groups - 1) // groups - (g * 16 + groups - 1) // groups
            energy = energy_G[g]
            sigma = np.sqrt(energy * gain / np.float32(count * rows))
            coded = energy >= np.float32(2.0**-90)
            column_C[c] = np.float32(1) / sigma if coded else np.float32(0)
        inverse = load_row(column_at)
        with_residual = new_residual_at != 0
        _quantize(
            z_at, codes_T_at, rows, groups, rows_of_constants, inverse, with_residual, scratch_C, inner_G, norm_G
        )
        for g in range(groups):
            scale = np.float32(0)
            if energy_G[g] >= np.float32(2.0**-90):
                scale = energy_G[g] / inner_G[g] if unbiased else (inner_G[g] / norm_G[g]) / gain
                scale = scale / to_unit
            bits = np.uint32(0)
            if scale >= np.float32(2.0**-126):
                word = np.uint32(0x8000)
                if unbiased:
                    word = _mix32(np.uint32(tile_key + np.uint32(128 + g))) & np.uint32(0xFFFF)
                bits = np.uint32(np.uint32(_as_bits(scale) + word) >> np.uint32(16))
            lost = lost or not _bf16(bits) * np.float32(4096) < np.float32(np.inf)
            bits_G[g] = bits
        for g in range(groups):
            bits = np.uint32(0x7FC0) if lost else bits_G[g]
            bits_G[g] = bits
            payload[scales_at + 2 * g] = np.uint8(bits)
            payload[scales_at + 2 * g + 1] = np.uint8(bits >> np.uint32(8))
        scales_at += 2 * groups
        size = 2 * rows * num_bits
        _pack(codes_T[: 16 * rows], payload[codes_at : codes_at + size], num_bits)
        codes_at += size
        if new_residual_at != 0:
            new_L, new_at = new_residual[start : start + L], new_residual_at + 4 * start
            if lost:
                for j in range(len(new_L)):
                    new_L[j] = residual_L[j]
            else:
                for c in range(16):
                    column_C[c] = _bf16(bits_G[c * groups // 16])
                scale, factor = load_row(column_at), constant_row(rescale)
                if rows != 256:
                    _unrotate(z_at, rows)
                for row in range(rows):
                    if rows == 256 and row & 15 == 0:
                        hadamard_rows(z_at + 64 * row, 64)
                    decoded = _signed_row(z_at, words_at, row, scale)
                    error = (load_row(value_at + 64 * row) - decoded) * factor
                    if row < L >> 4:
                        store_row(new_at + 64 * row, error)
                    else:
                        store_row(value_at + 64 * row, error)
                for j in range(L & ~15, L):
                    new_L[j] = value_T[j]


@_jit
def _decode_mean(
    payloads_at: int,
    num_rows: int,
    row_stride: int,
    nbytes: int,
    out_at: int,
    n: int,
    num_bits: int,
    constants: Any,
) -> None:
    """Decode is the mean of one row."""
    payloads = carray(_u8_pointer(payloads_at), (num_rows - 1) * row_stride + nbytes)
    out = carray(_f32_pointer(out_at), n)
    z_T, column_C = np.empty(4096, np.float32), np.empty(16, np.float32)
    codes_T, words = np.empty(4096, np.uint8), np.empty(128, np.uint32)
    z_at, codes_T_at, words_at = z_T.ctypes.data, codes_T.ctypes.data, words.ctypes.data
    to_level = _rows_of(constants)[7]
    divisor = np.float32(num_rows)
    for tile in range((n + 4095) // 4096):
        start = tile * 4096
        L = min(4096, n - start)
        rows = (L + 15) // 16
        groups = (L + 255) // 256
        scales_at = 4 + 32 * tile
        size = 2 * rows * num_bits
        codes_at = 4 + 2 * ((n + 255) // 256) + tile * 512 * num_bits
        out_L = out[start : start + L]
        z = z_T[:L]
        for rank in range(num_rows):
            payload = payloads[rank * row_stride : rank * row_stride + nbytes]
            base = np.uint32(0)
            for k in range(4):
                base = np.uint32(base | (np.uint32(payload[k]) << np.uint32(8 * k)))
            for c in range(16):
                at = scales_at + 2 * (c * groups // 16)
                bits = np.uint32(np.uint32(payload[at]) | (np.uint32(payload[at + 1]) << np.uint32(8)))
                column_C[c] = _bf16(bits)
            if column_C[0] != column_C[0]:
                z[:] = np.float32(np.nan)
            else:
                _sign_words(_mix32(np.uint32(base + np.uint32(tile))), words)
                _unpack(payload[codes_at : codes_at + size], codes_T[: 16 * rows], num_bits)
                scale = load_row(column_C.ctypes.data)
                for k in range(rows):
                    row = (k >> 4) + ((k & 15) << 4) if rows == 256 else k
                    store_row(z_at + 64 * row, _level(load_bytes(codes_T_at + 16 * row), to_level))
                    if rows == 256 and k & 15 == 15:
                        hadamard_rows(z_at + 64 * (row - 240), 1024)
                if rows != 256:
                    _unrotate(z_at, rows)
                for row in range(rows):
                    if rows == 256 and row & 15 == 0:
                        hadamard_rows(z_at + 64 * row, 64)
                    store_row(z_at + 64 * row, _signed_row(z_at, words_at, row, scale))
            if rank == 0:
                for j in range(len(out_L)):
                    out_L[j] = z[j]
            else:
                for j in range(len(out_L)):
                    out_L[j] += z[j]
        if num_rows > 1:
            for j in range(len(out_L)):
                out_L[j] /= divisor


def rotated_encode(
    x: Tensor,
    payload: Tensor,
    *,
    num_bits: int,
    unbiased: bool,
    base: int,
    residual: Tensor | None,
    new_residual: Tensor | None,
    loss_scale: float,
) -> None:
    """Encode x + loss_scale * residual in one pass; the format is the reference's."""
    assert new_residual is None or residual is not None
    if x.numel() == 0:
        return
    _encode(
        x.data_ptr(),
        x.numel(),
        payload.data_ptr(),
        payload.numel(),
        num_bits,
        unbiased,
        base,
        0 if residual is None else residual.data_ptr(),
        0 if new_residual is None else new_residual.data_ptr(),
        float(loss_scale),
        1.0 / loss_scale,
        _CONSTANTS[num_bits],
    )


def rotated_decode(payload: Tensor, out: Tensor, *, num_bits: int) -> None:
    """Decode one segment into out."""
    rotated_decode_mean(payload[None], out, num_bits=num_bits)


def rotated_decode_mean(payloads: Tensor, out: Tensor, *, num_bits: int) -> None:
    """Mean over the W rows of payloads, added in row order in fp32, divided once."""
    n = out.numel()
    if n == 0:
        return
    _decode_mean(
        payloads.data_ptr(),
        payloads.shape[0],
        payloads.stride(0),
        payload_bytes(n, num_bits),
        out.data_ptr(),
        n,
        num_bits,
        _CONSTANTS[num_bits],
    )
