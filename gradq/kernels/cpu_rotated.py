"""The rotated codecs in Numba: byte for byte what `gradq.kernels.reference_rotated` writes.

A tile (16 KiB) is worked on in scratch that stays in the L1 cache; memory is read and written once. Shapes as
in the reference: R rows of 16 columns, G groups.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradq.kernels.cpu_hadamard import (
    high_stages,
    rotate,
    sign_bits,
    sign_words,
    signed_row,
    unrotate,
    window,
)
from gradq.kernels.cpu_trellis import trellis_encode, trellis_levels
from gradq.kernels.numba_tools import (
    address,
    as_bits,
    as_float,
    f32_at,
    fence,
    inline,
    jit,
    keep,
    mix32,
    pack,
    row_addresses,
    u8_at,
    unpack,
)
from gradq.kernels.rotated import POLYNOMIALS, TRELLIS_POLYNOMIALS, Polynomials, payload_bytes
from gradq.kernels.vector import (
    HAS_LOOKUP,
    as_row,
    as_words,
    constant_row,
    constant_words,
    hadamard_rows,
    load_bytes,
    load_row,
    lookup,
    maximum,
    maximum_words,
    minimum,
    prefetch,
    prefetch_to_write,
    select_less,
    square_root,
    store_bytes,
    store_row,
    store_words,
    stream_row,
    to_float,
    to_int,
)

__all__ = ["rotated_decode", "rotated_decode_mean", "rotated_encode"]


def _constants(polynomials: Polynomials, half: int) -> Any:
    return np.array([polynomials.top, *polynomials.to_index, *polynomials.to_level, half], np.float32)


_CONSTANTS = {(False, bits): _constants(p, 1 << (bits - 1)) for bits, p in POLYNOMIALS.items()}
_CONSTANTS |= {(True, bits): _constants(p, 1 << bits) for bits, p in TRELLIS_POLYNOMIALS.items()}


@inline
def _zero() -> Any:
    return constant_row(np.float32(0))


@inline
def _fold(s0: Any, s1: Any, s2: Any, s3: Any, groups: Any, scratch_C: Any, sums_G: Any) -> Any:
    """The four accumulators of each column to the sum over its group."""
    sums = (s0 + s1) + (s2 + s3)
    if groups == 16:
        return sums
    store_row(scratch_C.ctypes.data, sums)
    sums_G[:] = np.float32(0)
    for c in range(16):
        sums_G[c * groups // 16] += scratch_C[c]
    for c in range(16):
        scratch_C[c] = sums_G[c * groups // 16]
    return load_row(scratch_C.ctypes.data)


@inline
def _start_row(
    x_at: Any, residual_at: Any, z_at: Any, words_at: Any, row: Any, unscale: Any, to_unit: Any
) -> Any:
    """Store a row of x + residual with its signs, in units of the tile; magnitudes and squares."""
    value = load_row(x_at + 64 * row)
    if residual_at != 0:
        value = value + load_row(residual_at + 64 * row) * unscale
    z = as_row(as_words(value) ^ sign_bits(words_at, row)) * to_unit
    store_row(z_at + 64 * row, z)
    return as_words(value) & constant_words(np.uint32(0x7FFFFFFF)), z * z


@inline
def _start(
    x_at: Any,
    residual_at: Any,
    z_at: Any,
    words_at: Any,
    rows: Any,
    unscale: Any,
    to_unit: Any,
    groups: Any,
    scratch_C: Any,
    sums_G: Any,
) -> Any:
    """Steps 1 and 2 but for the transform; of a full tile its low stages too.

    Returns:
        The bits of the largest magnitude, and the energy of each column's group.
    """
    s0, s1, s2, s3 = _zero(), _zero(), _zero(), _zero()
    bits = constant_words(np.uint32(0))
    loss, unit = constant_row(unscale), constant_row(to_unit)
    for row in range(0, rows & ~3, 4):
        b, s = _start_row(x_at, residual_at, z_at, words_at, row, loss, unit)
        bits, s0 = maximum_words(bits, b), s0 + s
        b, s = _start_row(x_at, residual_at, z_at, words_at, row + 1, loss, unit)
        bits, s1 = maximum_words(bits, b), s1 + s
        b, s = _start_row(x_at, residual_at, z_at, words_at, row + 2, loss, unit)
        bits, s2 = maximum_words(bits, b), s2 + s
        b, s = _start_row(x_at, residual_at, z_at, words_at, row + 3, loss, unit)
        bits, s3 = maximum_words(bits, b), s3 + s
        if rows == 256 and row & 12 == 12:
            hadamard_rows(z_at + 64 * (row - 12), 64)
    rest = rows & ~3
    if rows & 3 > 0:
        b, s = _start_row(x_at, residual_at, z_at, words_at, rest, loss, unit)
        bits, s0 = maximum_words(bits, b), s0 + s
    if rows & 3 > 1:
        b, s = _start_row(x_at, residual_at, z_at, words_at, rest + 1, loss, unit)
        bits, s1 = maximum_words(bits, b), s1 + s
    if rows & 3 > 2:
        b, s = _start_row(x_at, residual_at, z_at, words_at, rest + 2, loss, unit)
        bits, s2 = maximum_words(bits, b), s2 + s
    store_words(scratch_C.ctypes.data, bits)
    largest = np.uint32(0)
    for c in range(16):
        largest = max(largest, as_bits(scratch_C[c]))
    return largest, _fold(s0, s1, s2, s3, groups, scratch_C, sums_G)


@inline
def _rows_of(constants: Any, table: Any) -> Any:
    """Constants as rows, for `_quantize_row` and `_level`; outside of loops, or they are loaded each time."""
    middle = constant_row(np.float32(constants[9] - np.float32(0.5)))
    to_level = (
        middle,
        constant_row(constants[5]),
        constant_row(constants[6]),
        constant_row(constants[7]),
        constant_row(constants[8]),
    )
    if HAS_LOOKUP:
        for code in range(16):
            if code < 2 * constants[9]:
                store_row(table.ctypes.data + 64 * code, _polynomial(_words_of(code), to_level))
        for code in range(16):
            table[code] = table[16 * code]
    return (
        constant_row(-constants[0]),
        constant_row(constants[0]),
        constant_row(constants[1]),
        constant_row(constants[2]),
        constant_row(constants[3]),
        constant_row(constants[4]),
        constant_row(constants[9]),
        (to_level, load_row(table.ctypes.data)),
    )


@inline
def _words_of(number: Any) -> Any:
    return constant_words(np.uint32(number))


@inline
def _polynomial(code: Any, to_level: Any) -> Any:
    middle, a0, a1, a2, a3 = to_level
    m = to_float(code) - middle
    m2 = m * m
    return m * (a0 + m2 * (a1 + m2 * (a2 + m2 * a3)))


@inline
def _level(code: Any, levels: Any, use_table: Any) -> Any:
    """The levels of a row of codes: looked up where 16 are enough and the machine can, or computed."""
    to_level, table = levels
    if HAS_LOOKUP and use_table:
        return lookup(table, code)
    return _polynomial(code, to_level)


@inline
def _quantize_row(at: Any, codes_at: Any, inverse: Any, constants: Any, use_table: Any) -> Any:
    """Store the codes of a row, replace it by its levels; level * z and level²."""
    bottom, top, k0, k1, k2, k3, half, levels = constants
    z = load_row(at)
    y = minimum(maximum(z * inverse, bottom), top)
    y2 = y * y
    code = to_int(y * (k0 + y2 * (k1 + y2 * (k2 + y2 * k3))) + half)
    store_bytes(codes_at, code)
    level = _level(code, levels, use_table)
    store_row(at, level)
    return level * z, level * level


@inline
def _quantize(
    at: Any,
    codes_at: Any,
    rows: Any,
    groups: Any,
    rows_of_constants: Any,
    inverse: Any,
    use_table: Any,
    with_residual: Any,
    next_x_at: Any,
    next_residual_at: Any,
    new_residual_at: Any,
    scratch_C: Any,
    sums_G: Any,
) -> Any:
    """Codes of z; z becomes the levels. Returns ⟨level, z⟩ and ‖level‖² of each column's group.

    Of a full tile this includes the transform's high stages before, and those of its inverse after.
    """
    i0, i1, i2, i3 = _zero(), _zero(), _zero(), _zero()
    n0, n1, n2, n3 = _zero(), _zero(), _zero(), _zero()
    step = 16 if rows == 256 else 1  # between rows
    for first in range(0, rows & ~3, 4):
        row = (first >> 4) + ((first & 15) << 4) if rows == 256 else first
        for ahead in range(4):
            prefetch(next_x_at + 64 * (first + ahead))
            prefetch(next_residual_at + 64 * (first + ahead))
            if with_residual and new_residual_at != 0:
                prefetch_to_write(new_residual_at + 64 * (first + ahead))
        if rows == 256 and first & 15 == 0:
            hadamard_rows(at + 64 * row, 1024)
        i, n = _quantize_row(at + 64 * row, codes_at + 16 * row, inverse, rows_of_constants, use_table)
        i0, n0 = i0 + i, n0 + n
        row += step
        i, n = _quantize_row(at + 64 * row, codes_at + 16 * row, inverse, rows_of_constants, use_table)
        i1, n1 = i1 + i, n1 + n
        row += step
        i, n = _quantize_row(at + 64 * row, codes_at + 16 * row, inverse, rows_of_constants, use_table)
        i2, n2 = i2 + i, n2 + n
        row += step
        i, n = _quantize_row(at + 64 * row, codes_at + 16 * row, inverse, rows_of_constants, use_table)
        i3, n3 = i3 + i, n3 + n
        if rows == 256 and with_residual and first & 12 == 12:
            hadamard_rows(at + 64 * (row - 240), 1024)
    rest = rows & ~3
    if rows & 3 > 0:
        i, n = _quantize_row(at + 64 * rest, codes_at + 16 * rest, inverse, rows_of_constants, use_table)
        i0, n0 = i0 + i, n0 + n
    if rows & 3 > 1:
        i, n = _quantize_row(
            at + 64 * rest + 64, codes_at + 16 * rest + 16, inverse, rows_of_constants, use_table
        )
        i1, n1 = i1 + i, n1 + n
    if rows & 3 > 2:
        i, n = _quantize_row(
            at + 64 * rest + 128, codes_at + 16 * rest + 32, inverse, rows_of_constants, use_table
        )
        i2, n2 = i2 + i, n2 + n
    inner = _fold(i0, i1, i2, i3, groups, scratch_C, sums_G)
    return inner, _fold(n0, n1, n2, n3, groups, scratch_C, sums_G)


@inline
def _bf16(bits: Any) -> Any:
    return as_float(np.uint32(bits << np.uint32(16)))


@inline
def _trellis(
    at: Any,
    codes_at: Any,
    rows: Any,
    groups: Any,
    num_bits: Any,
    constants: Any,
    inverse: Any,
    choices_at: Any,
    scratch_C: Any,
    sums_G: Any,
) -> Any:
    """As `_quantize`, through the trellis."""
    if rows == 256:
        high_stages(at, 256)
    i, n = trellis_encode(at, codes_at, rows, num_bits, constants, inverse, choices_at)
    if rows == 256:
        high_stages(at, 256)
    inner = _fold(i[0], i[1], i[2], i[3], groups, scratch_C, sums_G)
    return inner, _fold(n[0], n[1], n[2], n[3], groups, scratch_C, sums_G)


@jit
def _encode(
    x_at: int,
    n: int,
    payload_at: int,
    nbytes: int,
    num_bits: int,
    trellis: bool,
    unbiased: bool,
    base: int,
    residual_at: int,
    new_residual_at: int,
    loss_scale: float,
    inverse_loss_scale: float,
    constants: Any,
) -> None:
    """Addresses of 0 stand for no residual."""
    x = f32_at(x_at, n)
    payload = u8_at(payload_at, nbytes)
    residual = f32_at(residual_at, n)
    new_residual = f32_at(new_residual_at, n)
    z_T, tail = np.empty(4096, np.float32), np.empty(4096, np.float32)
    codes_T, words = np.empty(4096, np.uint8), np.empty(256, np.uint32)
    scratch_C, column_C, sums_G = np.empty(16, np.float32), np.empty(16, np.float32), np.empty(16, np.float32)
    z_at, codes_T_at = z_T.ctypes.data, codes_T.ctypes.data
    words_at, column_at = words.ctypes.data, column_C.ctypes.data
    choices_T = np.empty(4096 if trellis else 1, np.uint8)
    choices_at = choices_T.ctypes.data
    table = np.empty(256, np.float32)
    rows_of_constants = _rows_of(constants, table)
    unscale, rescale = np.float32(loss_scale), np.float32(inverse_loss_scale)
    for k in range(4):
        payload[k] = np.uint8(np.uint32(base) >> np.uint32(8 * k))
    stream = n >= 65536 and new_residual_at & 63 == 0
    scales_at = 4
    codes_at = 4 + 2 * ((n + 255) // 256)
    for tile in range((n + 4095) // 4096):
        start = tile * 4096
        L = min(4096, n - start)
        rows = (L + 15) // 16
        groups = (L + 255) // 256
        x_L, residual_L = x[start : start + L], residual[start : start + L]
        tile_key = mix32(np.uint32(np.uint32(base) + np.uint32(tile)))
        sign_words(tile_key, rows, words)
        from_at, add_at = x_at + 4 * start, residual_at + 4 * start if residual_at != 0 else 0
        if L & 15:  # the last row would be read past its end
            for j in range(16 * rows):
                tail[j] = np.float32(0)
                if j < L:
                    tail[j] = x_L[j] + residual_L[j] * unscale if add_at != 0 else x_L[j]
            from_at, add_at = tail.ctypes.data, 0
        to_unit = np.float32(1)
        largest, energy = _start(
            from_at, add_at, z_at, words_at, rows, unscale, to_unit, groups, scratch_C, sums_G
        )
        exponent = np.int32(largest >> np.uint32(23))
        lost = exponent == 255
        if lost or exponent == 0:
            for row in range(rows):
                store_row(z_at + 64 * row, _zero())
            energy = _zero()
        elif exponent < 87 or exponent >= 167:
            to_unit = as_float(np.uint32(min(max(254 - exponent, 1), 253)) << np.uint32(23))
            _, energy = _start(
                from_at, add_at, z_at, words_at, rows, unscale, to_unit, groups, scratch_C, sums_G
            )
        if rows != 256:
            rotate(z_at, rows, words_at)
            for c in range(16):
                g = c * groups // 16
                first, end = (g * 16 + groups - 1) // groups, ((g + 1) * 16 + groups - 1) // groups
                column_C[c] = np.float32((end - first) * rows)
            count = load_row(column_at)
        else:
            count = constant_row(np.float32(256))
        gain = constant_row(np.float32(rows if window(rows) == rows else 1))
        least = constant_row(np.float32(2.0**-120))
        sigma = square_root(energy * gain / count)
        inverse = select_less(energy, least, _zero(), constant_row(np.float32(1)) / sigma)
        if trellis:
            inner, norm = _trellis(
                z_at,
                codes_T_at,
                rows,
                groups,
                num_bits,
                rows_of_constants,
                inverse,
                choices_at,
                scratch_C,
                sums_G,
            )
        else:
            inner, norm = _quantize(
                z_at,
                codes_T_at,
                rows,
                groups,
                rows_of_constants,
                inverse,
                num_bits <= 4,
                new_residual_at != 0,
                x_at + 4 * (start + 4096),
                residual_at + 4 * (start + 4096),
                0 if stream else new_residual_at + 4 * start,
                scratch_C,
                sums_G,
            )
        scale = energy / inner if unbiased else (inner / norm) / gain
        scale = select_less(energy, least, _zero(), scale / constant_row(to_unit))
        store_row(column_at, scale)
        for c in range(16):
            bits = np.uint32(0)
            if column_C[c] >= np.float32(2.0**-126):
                word = np.uint32(0x8000)
                if unbiased:
                    g = np.uint32(c if groups == 16 else c * groups // 16)
                    word = mix32(np.uint32(tile_key + np.uint32(128) + g)) & np.uint32(0xFFFF)
                bits = np.uint32(np.uint32(as_bits(column_C[c]) + word) >> np.uint32(16))
            column_C[c] = _bf16(bits)
            lost = lost or not column_C[c] * np.float32(4096) < np.float32(np.inf)
        for c in range(16):
            bits = np.uint32(0x7FC0) if lost else np.uint32(as_bits(column_C[c]) >> np.uint32(16))
            g = c if groups == 16 else c * groups // 16
            payload[scales_at + 2 * g] = np.uint8(bits)
            payload[scales_at + 2 * g + 1] = np.uint8(bits >> np.uint32(8))
        scales_at += 2 * groups
        size = 2 * rows * num_bits
        pack(codes_T[: 16 * rows], payload[codes_at : codes_at + size], num_bits)
        codes_at += size
        if new_residual_at != 0:
            new_L, new_at = new_residual[start : start + L], new_residual_at + 4 * start
            if lost:
                for j in range(len(new_L)):
                    new_L[j] = residual_L[j]
            else:
                if rows != 256:
                    unrotate(z_at, rows, words_at)
                scale, factor, loss = load_row(column_at), constant_row(rescale), constant_row(unscale)
                for row in range(rows):
                    if rows == 256 and row & 15 == 0:
                        hadamard_rows(z_at + 64 * row, 64)
                    value = load_row(from_at + 64 * row)
                    if add_at != 0:
                        value = value + load_row(add_at + 64 * row) * loss
                    error = (value - signed_row(z_at, words_at, row, scale)) * factor
                    if row < L >> 4:
                        if stream:
                            stream_row(new_at + 64 * row, error)
                        else:
                            store_row(new_at + 64 * row, error)
                    else:
                        store_row(z_at + 64 * row, error)
                for j in range(L & ~15, L):
                    new_L[j] = z_T[j]
    if stream:
        fence()
    keep(choices_T)


@jit
def _decode_mean(
    payloads_at: int,
    num_rows: int,
    row_stride: int,
    nbytes: int,
    out_at: int,
    n: int,
    num_bits: int,
    trellis: bool,
    constants: Any,
) -> None:
    """Decode is the mean of one row."""
    payloads = u8_at(payloads_at, (num_rows - 1) * row_stride + nbytes)
    out = f32_at(out_at, n)
    z_T, column_C = np.empty(4096, np.float32), np.empty(16, np.float32)
    codes_T, words = np.empty(4096, np.uint8), np.empty(256, np.uint32)
    z_at, codes_T_at, words_at = z_T.ctypes.data, codes_T.ctypes.data, words.ctypes.data
    rows_of_constants = _rows_of(constants, z_T)
    levels = rows_of_constants[7]
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
                sign_words(mix32(np.uint32(base + np.uint32(tile))), rows, words)
                unpack(payload[codes_at : codes_at + size], codes_T[: 16 * rows], num_bits)
                scale = load_row(column_C.ctypes.data)
                if trellis:
                    trellis_levels(codes_T_at, z_at, rows, rows_of_constants)
                    if rows == 256:
                        high_stages(z_at, 256)
                else:
                    for k in range(rows):
                        row = (k >> 4) + ((k & 15) << 4) if rows == 256 else k
                        store_row(
                            z_at + 64 * row, _level(load_bytes(codes_T_at + 16 * row), levels, num_bits <= 4)
                        )
                        if rows == 256 and k & 15 == 15:
                            hadamard_rows(z_at + 64 * (row - 240), 1024)
                if rows != 256:
                    unrotate(z_at, rows, words_at)
                for row in range(rows):
                    if rows == 256 and row & 15 == 0:
                        hadamard_rows(z_at + 64 * row, 64)
                    store_row(z_at + 64 * row, signed_row(z_at, words_at, row, scale))
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
    trellis: bool,
    unbiased: bool,
    base: int,
    residual: Tensor | None,
    new_residual: Tensor | None,
    loss_scale: float,
) -> None:
    """Encode x + loss_scale * residual in one pass; the format is the reference's."""
    assert new_residual is None or residual is not None
    if (n := x.numel()) == 0:
        return
    nbytes = payload_bytes(n, num_bits)
    x_at, payload_at = address(x, torch.float32, n), address(payload, torch.uint8, nbytes)
    residual_at = 0 if residual is None else address(residual, torch.float32, n)
    new_at = 0 if new_residual is None else address(new_residual, torch.float32, n)
    how, scales = (num_bits, trellis, unbiased, base), (float(loss_scale), 1.0 / loss_scale)
    _encode(x_at, n, payload_at, nbytes, *how, residual_at, new_at, *scales, _CONSTANTS[trellis, num_bits])


def rotated_decode(payload: Tensor, out: Tensor, *, num_bits: int, trellis: bool) -> None:
    """Decode one segment into out."""
    rotated_decode_mean(payload[None], out, num_bits=num_bits, trellis=trellis)


def rotated_decode_mean(payloads: Tensor, out: Tensor, *, num_bits: int, trellis: bool) -> None:
    """Mean over the W rows of payloads, added in row order in fp32, divided once."""
    n = out.numel()
    if n == 0:
        return
    payloads_at, rows = row_addresses(payloads, payload_bytes(n, num_bits))
    _decode_mean(
        payloads_at,
        *rows,
        payload_bytes(n, num_bits),
        address(out, torch.float32, n),
        n,
        num_bits,
        trellis,
        _CONSTANTS[trellis, num_bits],
    )
