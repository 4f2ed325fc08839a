"""The rotated codecs in Numba: byte for byte what `gradq.kernels.reference_rotated` writes.

A tile (16 KiB) is worked on in scratch that stays close; memory is read and written once. Full tiles, all but
the last of a segment, are in `cpu_rotated_tile`, what any tile needs in `cpu_rotated_rows`. R rows of 16
columns, G groups; `_at` is an address, 0 for none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradq.kernels.cpu_hadamard import (
    high_stages,
    low_stages,
    rotate,
    sign_words,
    signed_row,
    unrotate,
    window,
)
from gradq.kernels.cpu_rotated_rows import (
    NORM,
    SUMS_BYTES,
    clear_sums,
    fold,
    largest_of,
    level_of,
    quantize_rows,
    quantizer_of,
    start_rows,
)
from gradq.kernels.cpu_rotated_tile import (
    finish_decoding,
    finish_residual,
    levels_of_tile,
    quantize_tile,
    start_tile,
)
from gradq.kernels.cpu_trellis import trellis_encode, trellis_levels
from gradq.kernels.numba_tools import (
    address,
    aligned,
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
    u32_at,
    unpack,
)
from gradq.kernels.rotated import POLYNOMIALS, TRELLIS_POLYNOMIALS, Polynomials, payload_bytes
from gradq.kernels.vector import (
    LANES,
    constant_row,
    load_bytes,
    load_row,
    select_less,
    square_root,
    store_row,
)

__all__ = ["rotated_decode", "rotated_decode_mean", "rotated_encode"]

_STREAM_FROM = 65536  # from this many elements outputs are written past the cache
# Scratch, in bytes: the tile, its signed values (or a last tile whose end is no whole row), codes, choices of the
# trellis, words of signs, 32 rows, sums, and five times 16 numbers.
_SIGNED, _CODES, _CHOICES, _WORDS, _NEAR, _SUMS = 16384, 32768, 36864, 40960, 41984, 44032
_ENERGY = _SUMS + SUMS_BYTES
_INNER, _NORM, _INVERSE, _SCALE, _SCRATCH = (_ENERGY + 64 * k for k in (1, 2, 3, 4, 5))


def _constants(polynomials: Polynomials, half: int) -> Any:
    return np.array([polynomials.top, *polynomials.to_index, *polynomials.to_level, half], np.float32)


_CONSTANTS = {(False, bits): _constants(p, 1 << (bits - 1)) for bits, p in POLYNOMIALS.items()}
_CONSTANTS |= {(True, bits): _constants(p, 1 << bits) for bits, p in TRELLIS_POLYNOMIALS.items()}


# --- encode --------------------------------------------------------------------------------------------


@inline
def _start(
    x_at: Any, residual_at: Any, scratch_at: Any, rows: Any, groups: Any, unscale: Any
) -> tuple[Any, Any]:
    """Steps 1 and 2 of the reference: the transformed tile, and the energy of each column's group.

    Returns:
        The largest exponent, and the factor the tile was multiplied by.
    """
    z_at, signed_at = scratch_at, scratch_at + _SIGNED
    words_at, sums_at = scratch_at + _WORDS, scratch_at + _SUMS
    to_unit = np.float32(1)
    if rows != 256:
        start_rows(x_at, residual_at, z_at, words_at, rows, unscale, to_unit, sums_at)
    elif residual_at != 0:
        start_tile(x_at, residual_at, signed_at, z_at, words_at, unscale, sums_at, True)
    else:
        start_tile(x_at, residual_at, signed_at, z_at, words_at, unscale, sums_at, False)
    exponent = np.int32(largest_of(sums_at) >> np.uint32(23))
    if exponent == 0 or exponent == 255:
        for at in range(0, 64 * rows, 4 * LANES):
            store_row(z_at + at, constant_row(np.float32(0)))
        clear_sums(sums_at)
    elif exponent < 87 or exponent >= 167:
        to_unit = as_float(np.uint32(min(max(254 - exponent, 1), 253)) << np.uint32(23))
        start_rows(x_at, residual_at, z_at, words_at, rows, unscale, to_unit, sums_at)
        if rows == 256:
            for part in range(0, 16, LANES):
                low_stages(z_at + 4 * part, 256)
    fold(sums_at, groups, scratch_at + _ENERGY)
    if rows != 256:
        for part in range(0, 16, LANES):
            rotate(z_at + 4 * part, rows, words_at + 4 * part)
    return exponent, to_unit


@inline
def _gain(rows: Any) -> Any:
    """What a transform multiplies energies by."""
    return np.float32(rows if window(rows) == rows else 1)


@inline
def _invert(scratch_at: Any, rows: Any, groups: Any) -> None:
    """Step 3: 1 / σ of each column's group, 0 for one without energy."""
    count_C = f32_at(scratch_at + _INVERSE, 16)
    for c in range(16):
        g = c * groups // 16
        first, end = (g * 16 + groups - 1) // groups, ((g + 1) * 16 + groups - 1) // groups
        count_C[c] = np.float32((end - first) * rows)
    gain, least = constant_row(_gain(rows)), constant_row(np.float32(2.0**-120))
    for part in range(0, 16, LANES):
        energy = load_row(scratch_at + _ENERGY + 4 * part)
        sigma = square_root(energy * gain / load_row(scratch_at + _INVERSE + 4 * part))
        inverse = constant_row(np.float32(1)) / sigma
        inverse = select_less(energy, least, constant_row(np.float32(0)), inverse)
        store_row(scratch_at + _INVERSE + 4 * part, inverse)


@inline
def _trellis(scratch_at: Any, rows: Any, num_bits: Any, quantizer: Any) -> None:
    """As `quantize_rows`, through the trellis; of a full tile with the high stages before and after."""
    for part in range(0, 16, LANES):
        at, to = scratch_at + 4 * part, scratch_at + _SUMS + 4 * part
        inverse, choices_at = load_row(scratch_at + _INVERSE + 4 * part), scratch_at + _CHOICES + part
        if rows == 256:
            high_stages(at, 256)
        i, n = trellis_encode(
            at, scratch_at + _CODES + part, rows, num_bits, quantizer, inverse, choices_at
        )
        for k, inner, norm in ((0, i[0], n[0]), (1, i[1], n[1]), (2, i[2], n[2]), (3, i[3], n[3])):
            store_row(to + 64 * k, inner)
            store_row(to + NORM + 64 * k, norm)
        if rows == 256:
            high_stages(at, 256)


@inline
def _round_scales(scratch_at: Any, groups: Any, to_unit: Any, gain: Any, unbiased: Any, key: Any) -> Any:
    """Step 4: scales as bf16 has them. Returns whether one could decode to Inf."""
    sums_at = scratch_at + _SUMS
    fold(sums_at, groups, scratch_at + _INNER)
    fold(sums_at + NORM, groups, scratch_at + _NORM)
    least, none = constant_row(np.float32(2.0**-120)), constant_row(np.float32(0))
    for part in range(0, 16, LANES):
        energy, inner = load_row(scratch_at + _ENERGY + 4 * part), load_row(scratch_at + _INNER + 4 * part)
        if unbiased:
            scale = energy / inner
        else:
            scale = (inner / load_row(scratch_at + _NORM + 4 * part)) / constant_row(gain)
        scale = select_less(energy, least, none, scale / constant_row(to_unit))
        store_row(scratch_at + _SCALE + 4 * part, scale)
    scale_C, lost = f32_at(scratch_at + _SCALE, 16), False
    for c in range(16):
        bits = np.uint32(0)
        if scale_C[c] >= np.float32(2.0**-126):
            word = np.uint32(0x8000)
            if unbiased:
                g = np.uint32(c if groups == 16 else c * groups // 16)
                word = mix32(np.uint32(key + np.uint32(128) + g)) & np.uint32(0xFFFF)
            bits = np.uint32(np.uint32(as_bits(scale_C[c]) + word) & np.uint32(0xFFFF0000))
        scale_C[c] = as_float(bits)
        lost = lost or not scale_C[c] * np.float32(4096) < np.float32(np.inf)
    return lost


@inline
def _finish_rows(
    x_at: Any,
    residual_at: Any,
    scratch_at: Any,
    rows: Any,
    scales: Any,
    new_at: Any,
    L: Any,
) -> None:
    """Step 5 of a tile that is not full, or was scaled."""
    z_at, words_at = scratch_at, scratch_at + _WORDS
    for part in range(0, 16, LANES):
        if rows == 256:
            low_stages(z_at + 4 * part, 256)
        else:
            unrotate(z_at + 4 * part, rows, words_at + 4 * part)
    loss, factor = constant_row(scales[0]), constant_row(scales[1])
    for row in range(rows):
        for part in range(0, 16, LANES):
            at = 64 * row + 4 * part
            value = load_row(x_at + at)
            if residual_at != 0:
                value = value + load_row(residual_at + at) * loss
            decoded = signed_row(
                z_at + 4 * part, words_at + 4 * part, row, load_row(scratch_at + _SCALE + 4 * part)
            )
            store_row(z_at + at, (value - decoded) * factor)
    new, z = f32_at(new_at, L), f32_at(z_at, L)
    for j in range(L):
        new[j] = z[j]


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
    payload = u8_at(payload_at, nbytes)
    memory = np.empty(_SCRATCH + 64, np.uint8)
    at = aligned(memory.ctypes.data)
    codes_T, words, scale_C = u8_at(at + _CODES, 4096), u32_at(at + _WORDS, 256), f32_at(at + _SCALE, 16)
    quantizer = quantizer_of(constants, at + _NEAR)
    scales = (np.float32(loss_scale), np.float32(inverse_loss_scale))
    for k in range(4):
        payload[k] = np.uint8(np.uint32(base) >> np.uint32(8 * k))
    stream = n >= _STREAM_FROM and new_residual_at & 63 == 0
    with_residual = new_residual_at != 0
    scales_at = 4
    codes_at = 4 + 2 * ((n + 255) // 256)
    for tile in range((n + 4095) // 4096):
        start = 4 * 4096 * tile  # bytes
        L = min(4096, n - 4096 * tile)
        rows = (L + 15) // 16
        groups = (L + 255) // 256
        tile_key = mix32(np.uint32(np.uint32(base) + np.uint32(tile)))
        sign_words(tile_key, rows, words)
        from_at, add_at = x_at + start, residual_at + start if residual_at != 0 else 0
        if L & 15:  # the last row would be read past its end
            x_L, residual_L, padded = f32_at(from_at, L), f32_at(add_at, L), f32_at(at + _SIGNED, 4096)
            for j in range(16 * rows):
                padded[j] = np.float32(0)
                if j < L:
                    padded[j] = x_L[j] + residual_L[j] * scales[0] if add_at != 0 else x_L[j]
            from_at, add_at = at + _SIGNED, 0
        exponent, to_unit = _start(from_at, add_at, at, rows, groups, scales[0])
        _invert(at, rows, groups)
        if trellis:
            _trellis(at, rows, num_bits, quantizer)
        elif rows != 256:
            quantize_rows(at, at + _CODES, rows, num_bits, quantizer, at + _INVERSE, at + _SUMS)
        else:
            scratch = at + _INVERSE, at + _SUMS, at + _NEAR
            ahead = x_at + start + 16384, residual_at + start + 16384
            if num_bits == 4:
                quantize_tile(
                    at, payload_at + codes_at, quantizer, scratch, with_residual, True, True, ahead
                )
            elif num_bits < 4:
                quantize_tile(at, at + _CODES, quantizer, scratch, with_residual, False, True, ahead)
            else:
                quantize_tile(at, at + _CODES, quantizer, scratch, with_residual, False, False, ahead)
        lost = _round_scales(at, groups, to_unit, _gain(rows), unbiased, tile_key) or exponent == 255
        for c in range(16):
            bits = np.uint32(0x7FC0) if lost else np.uint32(as_bits(scale_C[c]) >> np.uint32(16))
            g = c if groups == 16 else c * groups // 16
            payload[scales_at + 2 * g] = np.uint8(bits)
            payload[scales_at + 2 * g + 1] = np.uint8(bits >> np.uint32(8))
        scales_at += 2 * groups
        size = 2 * rows * num_bits
        if num_bits != 4 or trellis or rows != 256:
            pack(codes_T[: 16 * rows], payload[codes_at : codes_at + size], num_bits)
        codes_at += size
        if with_residual:
            new_at = new_residual_at + start
            if lost:
                new_L, residual_L = f32_at(new_at, L), f32_at(residual_at + start, L)
                for j in range(L):
                    new_L[j] = residual_L[j]
            elif rows == 256 and to_unit == np.float32(1):
                scratch = at + _WORDS, at + _SCALE, at + _NEAR
                if stream:
                    finish_residual(at, at + _SIGNED, scratch, scales[1], new_at, True)
                else:
                    finish_residual(at, at + _SIGNED, scratch, scales[1], new_at, False)
            else:
                _finish_rows(from_at, add_at, at, rows, scales, new_at, L)
    if stream:
        fence()
    keep(memory)


# --- decode --------------------------------------------------------------------------------------------


@inline
def _scales_of(payload: Any, scales_at: Any, groups: Any, scale_C: Any) -> None:
    for c in range(16):
        at = scales_at + 2 * (c * groups // 16)
        bits = np.uint32(np.uint32(payload[at]) | (np.uint32(payload[at + 1]) << np.uint32(8)))
        scale_C[c] = as_float(np.uint32(bits << np.uint32(16)))


@inline
def _levels(scratch_at: Any, rows: Any, num_bits: Any, trellis: Any, packed_at: Any, quantizer: Any) -> None:
    """The levels of a tile; of a full one transformed at distances 16 to 128."""
    z_at, codes_at, levels = scratch_at, scratch_at + _CODES, quantizer[7]
    near_at = scratch_at + _NEAR
    if num_bits != 4 or trellis or rows != 256:
        unpack(u8_at(packed_at, 2 * rows * num_bits), u8_at(codes_at, 16 * rows), num_bits)
    if trellis:
        for part in range(0, 16, LANES):
            trellis_levels(codes_at + part, z_at + 4 * part, rows, quantizer)
            if rows == 256:
                high_stages(z_at + 4 * part, 256)
    elif rows != 256:
        for row in range(rows):
            for part in range(0, 16, LANES):
                code = load_bytes(codes_at + 16 * row + part)
                store_row(z_at + 64 * row + 4 * part, level_of(code, levels, num_bits <= 4))
    elif num_bits == 4:
        levels_of_tile(packed_at, z_at, levels, near_at, True, True)
    elif num_bits < 4:
        levels_of_tile(codes_at, z_at, levels, near_at, False, True)
    else:
        levels_of_tile(codes_at, z_at, levels, near_at, False, False)


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
    memory = np.empty(_SCRATCH + 64, np.uint8)
    at = aligned(memory.ctypes.data)
    words, scale_C = u32_at(at + _WORDS, 256), f32_at(at + _SCALE, 16)
    quantizer = quantizer_of(constants, at + _NEAR)
    stream = num_rows == 1 and n >= _STREAM_FROM and out_at & 63 == 0
    for tile in range((n + 4095) // 4096):
        L = min(4096, n - 4096 * tile)
        rows = (L + 15) // 16
        groups = (L + 255) // 256
        codes_at = 4 + 2 * ((n + 255) // 256) + tile * 512 * num_bits
        out_L, z = f32_at(out_at + 16384 * tile, L), f32_at(at, L)
        for rank in range(num_rows):
            payload = u8_at(payloads_at + rank * row_stride, nbytes)
            base = np.uint32(0)
            for k in range(4):
                base = np.uint32(base | (np.uint32(payload[k]) << np.uint32(8 * k)))
            _scales_of(payload, 4 + 32 * tile, groups, scale_C)
            divisor = np.float32(num_rows if rank > 0 and rank == num_rows - 1 else 0)
            lost = scale_C[0] != scale_C[0]
            if not lost:
                sign_words(mix32(np.uint32(base + np.uint32(tile))), rows, words)
                packed_at = payloads_at + rank * row_stride + codes_at
                _levels(at, rows, num_bits, trellis, packed_at, quantizer)
            if rows == 256 and not lost:
                scratch, to_at = (at + _WORDS, at + _SCALE, at + _NEAR), out_at + 16384 * tile
                if rank > 0:
                    finish_decoding(at, scratch, to_at, True, divisor, False)
                elif stream:
                    finish_decoding(at, scratch, to_at, False, divisor, True)
                else:
                    finish_decoding(at, scratch, to_at, False, divisor, False)
                continue
            if lost:
                z[:] = np.float32(np.nan)
            else:
                for part in range(0, 16, LANES):
                    unrotate(at + 4 * part, rows, at + _WORDS + 4 * part)
                    scale = load_row(at + _SCALE + 4 * part)
                    for row in range(rows):
                        decoded = signed_row(at + 4 * part, at + _WORDS + 4 * part, row, scale)
                        store_row(at + 64 * row + 4 * part, decoded)
            if rank == 0:
                for j in range(L):
                    out_L[j] = z[j]
            else:
                for j in range(L):
                    out_L[j] += z[j]
            if divisor != np.float32(0):
                for j in range(L):
                    out_L[j] /= divisor
    if stream:
        fence()
    keep(memory)


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
