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
from gradq.kernels.vector import hadamard_rows

__all__ = ["rotated_decode", "rotated_decode_mean", "rotated_encode"]

_CONSTANTS = {
    bits: np.array([p.top, *p.to_index, *p.to_level], np.float32) for bits, p in POLYNOMIALS.items()
}


@_inline
def _sign_words(tile_key: Any, words: Any) -> None:
    for w in range(len(words)):
        words[w] = _mix32(np.uint32(tile_key + np.uint32(w)))


@_inline
def _hadamard(z: Any, first_row: Any, size: Any) -> None:
    """The unnormalized transform of `size` rows, a power of two."""
    at = z.ctypes.data + 64 * first_row
    distance = 1
    while 16 * distance <= size:
        for block in range(0, size, 16 * distance):
            for row in range(block, block + distance):
                hadamard_rows(at + 64 * row, 64 * distance)
        distance *= 16
    while distance < size:
        half = 16 * distance
        for start in range(16 * first_row, 16 * (first_row + size), 2 * half):
            a, b = z[start : start + half], z[start + half : start + 2 * half]
            for j in range(len(a)):
                p, q = a[j], b[j]
                a[j] = p + q
                b[j] = p - q
        distance *= 2


@_inline
def _multiply(z: Any, factor: Any) -> None:
    for j in range(len(z)):
        z[j] *= factor


@_inline
def _window(rows: Any) -> Any:
    """The largest power of two <= rows."""
    size = 1
    while 2 * size <= rows:
        size *= 2
    return size


@_inline
def _rotate(z: Any, rows: Any) -> None:
    size = _window(rows)
    _hadamard(z, 0, size)
    if size != rows:
        factor = np.float32(1.0 / np.sqrt(float(size)))
        _multiply(z[: 16 * size], factor)
        _hadamard(z, rows - size, size)
        _multiply(z[16 * (rows - size) : 16 * rows], factor)


@_inline
def _unrotate(z: Any, rows: Any) -> None:
    size = _window(rows)
    _hadamard(z, rows - size, size)
    if size != rows:
        factor = np.float32(1.0 / np.sqrt(float(size)))
        _multiply(z[16 * (rows - size) : 16 * rows], factor)
        _hadamard(z, 0, size)
        _multiply(z[: 16 * size], factor)


@_inline
def _flip_signs(z: Any, words: Any, rows: Any) -> None:
    bits = z.view(np.uint32)
    for row in range(rows):
        words_C = words[16 * (row >> 5) : 16 * (row >> 5) + 16]
        left = np.uint32(31 - (row & 31))
        bits_C = bits[16 * row : 16 * row + 16]
        for c in range(16):
            bits_C[c] ^= np.uint32(words_C[c] << left) & np.uint32(0x80000000)


@_inline
def _fold(sums_4C: Any, groups: Any, sums_G: Any) -> None:
    """The four accumulators of each column to sums over the columns of each group."""
    for g in range(groups):
        sums_G[g] = np.float32(0)
    for c in range(16):
        low, high = sums_4C[0, c] + sums_4C[1, c], sums_4C[2, c] + sums_4C[3, c]
        sums_G[c * groups // 16] += low + high


@_inline
def _energy(z: Any, rows: Any, groups: Any, sums_4C: Any, energy_G: Any) -> None:
    sums_4C[:] = np.float32(0)
    for row in range(rows):
        z_C, sums_C = z[16 * row : 16 * row + 16], sums_4C[row & 3]
        for c in range(16):
            sums_C[c] += z_C[c] * z_C[c]
    _fold(sums_4C, groups, energy_G)


@_inline
def _level(code: Any, middle: Any, a0: Any, a1: Any, a2: Any, a3: Any) -> Any:
    m = np.float32(np.int32(code)) - middle
    m2 = m * m
    return m * (a0 + m2 * (a1 + m2 * (a2 + m2 * a3)))


@_inline
def _bf16(bits: Any) -> Any:
    return _as_float(np.uint32(bits << np.uint32(16)))


@_inline
def _quantize(
    z: Any,
    codes: Any,
    rows: Any,
    num_bits: Any,
    constants: Any,
    inverse_C: Any,
    inner_4C: Any,
    norm_4C: Any,
) -> None:
    """Codes of z, and the accumulators of ⟨level, z⟩ and ‖level‖²; z becomes the levels."""
    top = constants[0]
    k0, k1, k2, k3 = constants[1], constants[2], constants[3], constants[4]
    a0, a1, a2, a3 = constants[5], constants[6], constants[7], constants[8]
    half = np.float32(1 << (num_bits - 1))
    middle = np.float32(half - np.float32(0.5))
    inner_4C[:] = np.float32(0)
    norm_4C[:] = np.float32(0)
    for row in range(rows):
        z_C, codes_C = z[16 * row : 16 * row + 16], codes[16 * row : 16 * row + 16]
        inner_C, norm_C = inner_4C[row & 3], norm_4C[row & 3]
        for c in range(16):
            value = z_C[c]
            y = min(max(value * inverse_C[c], -top), top)
            y2 = y * y
            u = y * (k0 + y2 * (k1 + y2 * (k2 + y2 * k3)))
            code = np.int32(u + half)
            codes_C[c] = np.uint8(code)
            level = _level(code, middle, a0, a1, a2, a3)
            z_C[c] = level
            inner_C[c] += level * value
            norm_C[c] += level * level


@_inline
def _levels(codes: Any, z: Any, num_bits: Any, constants: Any) -> None:
    a0, a1, a2, a3 = constants[5], constants[6], constants[7], constants[8]
    middle = np.float32(np.float32(1 << (num_bits - 1)) - np.float32(0.5))
    for j in range(len(codes)):
        z[j] = _level(codes[j], middle, a0, a1, a2, a3)


@_inline
def _scale_rows(z: Any, rows: Any, scale_C: Any) -> None:
    for row in range(rows):
        z_C = z[16 * row : 16 * row + 16]
        for c in range(16):
            z_C[c] *= scale_C[c]


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
    value_T = np.empty(4096, np.float32)
    z_T = np.empty(4096, np.float32)
    codes_T = np.empty(4096, np.uint8)
    words = np.empty(128, np.uint32)
    sums_4C, inner_4C, norm_4C = (
        np.empty((4, 16), np.float32),
        np.empty((4, 16), np.float32),
        np.empty((4, 16), np.float32),
    )
    energy_G, inner_G, norm_G = np.empty(16, np.float32), np.empty(16, np.float32), np.empty(16, np.float32)
    scale_C, inverse_C = np.empty(16, np.float32), np.empty(16, np.float32)
    bits_G = np.empty(16, np.uint32)
    unscale = np.float32(loss_scale)
    rescale = np.float32(inverse_loss_scale)
    for k in range(4):
        payload[k] = np.uint8(np.uint32(base) >> np.uint32(8 * k))
    scales_at = 4
    codes_at = 4 + 2 * ((n + 255) // 256)
    for tile in range((n + 4095) // 4096):
        start = tile * 4096
        L = min(4096, n - start)
        rows = (L + 15) // 16
        groups = (L + 255) // 256
        x_L = x[start : start + L]
        value, z, codes = value_T[: 16 * rows], z_T[: 16 * rows], codes_T[: 16 * rows]
        for j in range(L, 16 * rows):
            value[j] = np.float32(0)
        if residual_at != 0:
            residual_L = residual[start : start + L]
            for j in range(len(x_L)):
                value[j] = x_L[j] + residual_L[j] * unscale
        else:
            for j in range(len(x_L)):
                value[j] = x_L[j]
        absmax = np.uint32(0)
        value_bits = value.view(np.uint32)
        for j in range(len(value_bits)):
            absmax = max(absmax, np.uint32(value_bits[j] & np.uint32(0x7FFFFFFF)))
        exponent = np.int32(absmax >> np.uint32(23))
        to_unit = _as_float(np.uint32(min(max(254 - exponent, 1), 253)) << np.uint32(23))
        lost = exponent == 255
        tile_key = _mix32(np.uint32(np.uint32(base) + np.uint32(tile)))
        _sign_words(tile_key, words)
        if lost or exponent == 0:
            z[:] = np.float32(0)
        else:
            for j in range(len(value)):
                z[j] = value[j] * to_unit
            _flip_signs(z, words, rows)
            _rotate(z, rows)
        _energy(z, rows, groups, sums_4C, energy_G)
        for c in range(16):
            g = c * groups // 16
            count = ((g + 1) * 16 + groups - 1) // groups - (g * 16 + groups - 1) // groups
            energy = energy_G[g]
            sigma = np.sqrt(energy / np.float32(count * rows))
            coded = energy >= np.float32(2.0**-90)
            inverse_C[c] = np.float32(1) / sigma if coded else np.float32(0)
        _quantize(z, codes, rows, num_bits, constants, inverse_C, inner_4C, norm_4C)
        _fold(inner_4C, groups, inner_G)
        _fold(norm_4C, groups, norm_G)
        transforms = np.float32(rows if _window(rows) == rows else 1)
        for g in range(groups):
            scale = np.float32(0)
            if energy_G[g] >= np.float32(2.0**-90):
                scale = energy_G[g] / inner_G[g] if unbiased else inner_G[g] / norm_G[g]
                scale = (scale / transforms) / to_unit
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
        _pack(codes, payload[codes_at : codes_at + size], num_bits)
        codes_at += size
        if new_residual_at != 0:
            new_L = new_residual[start : start + L]
            if lost:
                residual_L = residual[start : start + L]
                for j in range(len(new_L)):
                    new_L[j] = residual_L[j]
            else:
                for c in range(16):
                    scale_C[c] = _bf16(bits_G[c * groups // 16])
                _scale_rows(z, rows, scale_C)
                _unrotate(z, rows)
                _flip_signs(z, words, rows)
                for j in range(len(new_L)):
                    new_L[j] = (value[j] - z[j]) * rescale


@_inline
def _as_bits(value: Any) -> Any:
    return np.float32(value).view(np.uint32)


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
    z_T = np.empty(4096, np.float32)
    codes_T = np.empty(4096, np.uint8)
    words = np.empty(128, np.uint32)
    scale_C = np.empty(16, np.float32)
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
        z, codes = z_T[: 16 * rows], codes_T[: 16 * rows]
        for rank in range(num_rows):
            payload = payloads[rank * row_stride : rank * row_stride + nbytes]
            base = np.uint32(0)
            for k in range(4):
                base = np.uint32(base | (np.uint32(payload[k]) << np.uint32(8 * k)))
            for c in range(16):
                at = scales_at + 2 * (c * groups // 16)
                bits = np.uint32(np.uint32(payload[at]) | (np.uint32(payload[at + 1]) << np.uint32(8)))
                scale_C[c] = _bf16(bits)
            if scale_C[0] != scale_C[0]:
                z[:] = np.float32(np.nan)
            else:
                _sign_words(_mix32(np.uint32(base + np.uint32(tile))), words)
                _unpack(payload[codes_at : codes_at + size], codes, num_bits)
                _levels(codes, z, num_bits, constants)
                _scale_rows(z, rows, scale_C)
                _unrotate(z, rows)
                _flip_signs(z, words, rows)
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
