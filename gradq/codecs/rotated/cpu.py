"""The rotated codecs in Numba: byte for byte what `gradq.codecs.rotated.reference` writes.

A tile (16 KiB) is worked on in scratch that stays close; memory is read and written once. Full tiles, all but
the last of a segment, are in `cpu_tile`, what any tile needs in `cpu_rows`. R rows of 16
columns, G groups; `_at` is an address, 0 for none, and `at` alone that of the scratch.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradq.codecs.rotated.cpu_codes import (
    coding_of,
    decoding_of,
    store_tables,
    tile_packing,
    variant_name,
)
from gradq.codecs.rotated.cpu_hadamard import low_stages, mix_words, rotate, sign_words, window
from gradq.codecs.rotated.cpu_rows import (
    COUNT,
    ENERGY,
    GROUP,
    INVERSE,
    NEAR,
    NORMS,
    PADDED,
    SCALE,
    SCRATCH_BYTES,
    SUMS,
    WORDS,
    clear_sums,
    finish_rows,
    fold,
    is_ordinary,
    largest_of,
    start_rows,
    store_quantizer,
)
from gradq.codecs.rotated.cpu_tile import (
    decode_tile,
    finish_tile,
    start_tile,
)
from gradq.codecs.rotated.format import RotatedFormat, rotation_base
from gradq.kernels.numba_compile import inline_optimized, variant
from gradq.kernels.numba_tools import (
    address,
    aligned,
    as_bits,
    as_float,
    f32_at,
    fence,
    keep,
    mix32,
    row_addresses,
    u8_at,
    u32_at,
)
from gradq.kernels.vector.operations import (
    LANES,
    as_row,
    as_words,
    constant_row,
    constant_words,
    load_row,
    load_words,
    mask_at_least,
    select_less,
    square_root,
    store_halves,
    store_row,
)
from gradq.rng import EncodeContext

__all__ = ["decode", "decode_mean", "encode"]

_LARGEST_DENORMAL = np.float32(2.0**-126 - 2.0**-149)
_STREAM_FROM = 65536  # from this many elements outputs are written past the cache


@functools.cache
def _constants(num_bits: int, trellis: bool) -> Any:
    """What `store_quantizer` takes."""
    polynomials = RotatedFormat(num_bits, trellis).polynomials
    half = 1 << (num_bits if trellis else num_bits - 1)
    return np.array([polynomials.top, *polynomials.to_index, *polynomials.to_level, half], np.float32)


# --- encode --------------------------------------------------------------------------------------------


@inline_optimized
def _start(x_at: Any, residual_at: Any, at: Any, rows: Any, groups: Any, unscale: Any) -> Any:
    """Steps 1 and 2 of the reference: the transformed tile, and the energy of each column's group.

    Of a full tile the transform's high stages are still to come.

    Returns:
        The largest exponent (127 for any that needs no care), and the factor the tile was multiplied by.
    """
    exponent, to_unit, done = np.int32(127), np.float32(1), False
    if rows == 256:
        start_tile(x_at, residual_at, at, unscale)
        done = is_ordinary(at)
    if not done:
        start_rows(x_at, residual_at, at, rows, unscale, 1.0)
        exponent = np.int32(largest_of(at) >> np.uint32(23))
    if exponent == 0 or exponent == 255:
        for z_at in range(at, at + 64 * rows, 4 * LANES):
            store_row(z_at, constant_row(np.float32(0)))
        clear_sums(at)
    elif exponent < 87 or exponent >= 167:
        to_unit = as_float(np.uint32(min(max(254 - exponent, 1), 253)) << np.uint32(23))
        start_rows(x_at, residual_at, at, rows, unscale, float(to_unit))
    if rows == 256 and not done:
        low_stages(at, 256)
    fold(at + SUMS, groups, at + ENERGY)
    if rows != 256:
        rotate(at, rows, at + WORDS)
    return exponent, to_unit


@inline_optimized
def _gain(rows: Any) -> Any:
    """What a transform multiplies energies by."""
    return np.float32(rows if window(rows) == rows else 1)


@inline_optimized
def _count_groups(at: Any, rows: Any, groups: Any) -> None:
    """Which group each column belongs to, and how many elements that has, for tiles of this size."""
    group_C, count_C = u32_at(at + GROUP, 16), f32_at(at + COUNT, 16)
    for c in range(16):
        g = c * groups // 16
        first, end = (g * 16 + groups - 1) // groups, ((g + 1) * 16 + groups - 1) // groups
        group_C[c] = np.uint32(g)
        count_C[c] = np.float32((end - first) * rows)


@inline_optimized
def _invert(at: Any, gain: Any) -> None:
    """Step 3: 1 / σ of each column's group, 0 for one without energy."""
    least, none = constant_row(np.float32(2.0**-120)), constant_row(np.float32(0))
    for part in range(0, 64, 4 * LANES):
        energy, count = load_row(at + ENERGY + part), load_row(at + COUNT + part)
        inverse = constant_row(np.float32(1)) / square_root(energy * constant_row(gain) / count)
        store_row(at + INVERSE + part, select_less(energy, least, none, inverse))


@inline_optimized
def _round_scales(at: Any, groups: Any, to_unit: Any, gain: Any, unbiased: Any, key: Any) -> Any:
    """Step 4: scales as bf16 has them. Returns whether one could decode to Inf."""
    fold(at + SUMS, groups, at + SCALE)
    fold(at + NORMS, groups, at + NEAR)
    least, none = constant_row(np.float32(2.0**-120)), constant_row(np.float32(0))
    lost = False
    for part in range(0, 64, 4 * LANES):
        energy, inner = load_row(at + ENERGY + part), load_row(at + SCALE + part)
        if unbiased:  # noqa: SIM108 (Numba drops the branch)
            scale = energy / inner
        else:
            scale = (inner / load_row(at + NEAR + part)) / constant_row(gain)
        scale = select_less(energy, least, none, scale / constant_row(to_unit))
        word = constant_words(np.uint32(0x8000))
        if unbiased:
            group = load_words(at + GROUP + part) + constant_words(np.uint32(key + np.uint32(128)))
            word = mix_words(group) & constant_words(np.uint32(0xFFFF))
        rounded = as_row((as_words(scale) + word) & constant_words(np.uint32(0xFFFF0000)))
        # below 2**-126 it is 0
        scale = select_less(constant_row(_LARGEST_DENORMAL), scale, rounded, none)
        store_row(at + SCALE + part, scale)
        # not scale * 4096 < Inf
        lost = lost or mask_at_least(as_words(scale), constant_words(np.uint32(0x79800000))) != 0
    return lost


@inline_optimized
def _write_scales(at: Any, groups: Any, lost: Any, scales_at: Any) -> None:
    """The upper halves of the scales, NaN for all if one is lost."""
    if groups == 16:
        for part in range(0, 16, LANES):
            bits = load_words(at + SCALE + 4 * part) >> constant_words(np.uint32(16))
            store_halves(scales_at + 2 * part, constant_words(np.uint32(0x7FC0)) if lost else bits)
        return
    scale_C, group_C, scales = f32_at(at + SCALE, 16), u32_at(at + GROUP, 16), u8_at(scales_at, 2 * groups)
    for c in range(16):
        g, bits = group_C[c], np.uint32(0x7FC0)
        if not lost:
            bits = np.uint32(as_bits(scale_C[c]) >> np.uint32(16))
        scales[2 * g], scales[2 * g + 1] = np.uint8(bits), np.uint8(bits >> np.uint32(8))


@inline_optimized
def _finish(
    x_at: Any, residual_at: Any, at: Any, rows: Any, unscale: Any, factor: Any, new_at: Any, L: Any
) -> None:
    """Step 5 of a tile that is not full, or was scaled."""
    finish_rows(at, rows)
    x, residual, z, new = f32_at(x_at, L), f32_at(residual_at, L), f32_at(at, L), f32_at(new_at, L)
    if residual_at != 0:
        for j in range(L):
            new[j] = ((x[j] + residual[j] * unscale) - z[j]) * factor
    else:
        for j in range(L):
            new[j] = (x[j] - z[j]) * factor


@functools.cache
def _encoder(num_bits: int, trellis: bool) -> Any:
    """The kernel for codes of a width: only what that needs is compiled."""
    pack_tile, write_codes = tile_packing(num_bits, trellis)[0], coding_of(num_bits, trellis)

    @variant(variant_name(num_bits, trellis))
    def encode(
        x_at: int,
        n: int,
        payload_at: int,
        nbytes: int,
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
        memory = np.empty(SCRATCH_BYTES + 64, np.uint8)
        at = aligned(memory.ctypes.data)
        store_quantizer(at, constants)
        if trellis:
            store_tables(at, num_bits)
        unscale, factor = np.float32(loss_scale), np.float32(inverse_loss_scale)
        for k in range(4):
            payload[k] = np.uint8(np.uint32(base) >> np.uint32(8 * k))
        stream = n >= _STREAM_FROM and new_residual_at & 63 == 0
        with_residual = new_residual_at != 0
        scales_at = payload_at + 4
        codes_at = payload_at + 4 + 2 * ((n + 255) // 256)
        for tile in range((n + 4095) // 4096):
            start = 16384 * tile  # bytes
            L = min(4096, n - 4096 * tile)
            rows = (L + 15) // 16
            groups = (L + 255) // 256
            gain = _gain(rows)
            tile_key = mix32(np.uint32(np.uint32(base) + np.uint32(tile)))
            sign_words(tile_key, rows, at + WORDS)
            from_at, add_at = x_at + start, residual_at + start if residual_at != 0 else 0
            if L & 15:  # the last row would be read past its end
                x_L, residual_L, padded = f32_at(from_at, L), f32_at(add_at, L), f32_at(at + PADDED, 4096)
                for j in range(16 * rows):
                    padded[j] = np.float32(0)
                    if j < L:
                        padded[j] = x_L[j] + residual_L[j] * unscale if add_at != 0 else x_L[j]
                from_at, add_at = at + PADDED, 0
            exponent, to_unit = _start(from_at, add_at, at, rows, groups, unscale)
            if tile == 0 or L != 4096:
                _count_groups(at, rows, groups)
            _invert(at, gain)
            ahead = start + 16384
            write_codes(at, codes_at, rows, with_residual, x_at + ahead, residual_at + ahead)
            lost = _round_scales(at, groups, to_unit, gain, unbiased, tile_key) or exponent == 255
            _write_scales(at, groups, lost, scales_at)
            scales_at += 2 * groups
            pack_tile(at, codes_at, rows)
            codes_at += 2 * rows * num_bits
            if with_residual:
                new_at = new_residual_at + start
                if lost:
                    new_L, residual_L = f32_at(new_at, L), f32_at(residual_at + start, L)
                    for j in range(L):
                        new_L[j] = residual_L[j]
                elif L == 4096 and to_unit == np.float32(1):
                    finish_tile(from_at, add_at, at, unscale, float(factor), new_at, stream)
                else:
                    _finish(from_at, add_at, at, rows, unscale, factor, new_at, L)
        if stream:
            fence()
        keep(memory)

    return encode


# --- decode --------------------------------------------------------------------------------------------


@inline_optimized
def _scales_of(payload: Any, scales_at: Any, groups: Any, scale_C: Any) -> None:
    for c in range(16):
        at = scales_at + 2 * (c * groups // 16)
        bits = np.uint32(np.uint32(payload[at]) | (np.uint32(payload[at + 1]) << np.uint32(8)))
        scale_C[c] = as_float(np.uint32(bits << np.uint32(16)))


@functools.cache
def _decoder(num_bits: int, trellis: bool) -> Any:
    """The kernel for codes of a width; see `_encoder`."""
    read_levels = decoding_of(num_bits, trellis)

    @variant(variant_name(num_bits, trellis))
    def decode_mean(
        payloads_at: int,
        num_rows: int,
        row_stride: int,
        nbytes: int,
        out_at: int,
        n: int,
        constants: Any,
    ) -> None:
        """Decode is the mean of one row."""
        memory = np.empty(SCRATCH_BYTES + 64, np.uint8)
        at = aligned(memory.ctypes.data)
        store_quantizer(at, constants)
        if trellis:
            store_tables(at, num_bits)
        scale_C = f32_at(at + SCALE, 16)
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
                    sign_words(mix32(np.uint32(base + np.uint32(tile))), rows, at + WORDS)
                    read_levels(at, payloads_at + rank * row_stride + codes_at, rows)
                    if L == 4096:  # the last row may be incomplete
                        decode_tile(at, out_at + 16384 * tile, rank > 0, float(divisor), stream)
                        continue
                    finish_rows(at, rows)
                else:
                    z[:] = np.float32(np.nan)
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

    return decode_mean


def encode(
    x: Tensor,
    payload: Tensor,
    form: RotatedFormat,
    context: EncodeContext,
    residual: Tensor | None = None,
    new_residual: Tensor | None = None,
) -> None:
    """Encode x + loss_scale * residual in one pass; the format is the reference's."""
    assert new_residual is None or residual is not None
    if (n := x.numel()) == 0:
        return
    nbytes, scale = form.nbytes(n), float(context.loss_scale)
    x_at, payload_at = address(x, torch.float32, n), address(payload, torch.uint8, nbytes)
    residual_at = 0 if residual is None else address(residual, torch.float32, n)
    new_at = 0 if new_residual is None else address(new_residual, torch.float32, n)
    where, scales = (x_at, n, payload_at, nbytes), (scale, 1.0 / scale)
    kernel, base = _encoder(form.num_bits, form.trellis), rotation_base(context)
    kernel(*where, form.unbiased, base, residual_at, new_at, *scales, _constants(form.num_bits, form.trellis))


def decode(payload: Tensor, out: Tensor, form: RotatedFormat) -> None:
    """Decode one segment into out."""
    decode_mean(payload[None], out, form)


def decode_mean(payloads: Tensor, out: Tensor, form: RotatedFormat) -> None:
    """Mean over the W rows of payloads, added in row order in fp32, divided once."""
    n = out.numel()
    if n == 0:
        return
    nbytes = form.nbytes(n)
    payloads_at, rows = row_addresses(payloads, nbytes)
    constants = _constants(form.num_bits, form.trellis)
    kernel = _decoder(form.num_bits, form.trellis)
    kernel(payloads_at, *rows, nbytes, address(out, torch.float32, n), n, constants)
