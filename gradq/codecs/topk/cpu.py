"""The top-k codec in Numba: byte for byte what `gradq.codecs.topk.reference` writes.

The k-th largest magnitude is found by narrowing down its bit pattern: how many of the block are at least this
large? A count is a few hundred vector instructions while the block stays in the L1 cache, a handful settle
it, because the search ends as soon as a count is k, and nothing is sorted.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradq.codecs.topk.format import SCALE_BYTES, Block, TopKFormat
from gradq.codecs.uniform.cpu_scales import BF16, load_scale, store_scale
from gradq.kernels.numba_compile import inline_optimized, variant
from gradq.kernels.numba_packing import packing
from gradq.kernels.numba_tools import (
    address,
    as_bits,
    as_float,
    f32_at,
    fence,
    keep,
    row_addresses,
    u8_at,
    u32_at,
)
from gradq.kernels.vector.operations import (
    LANES,
    as_words,
    constant_row,
    constant_words,
    load_row,
    load_words,
    mask_at_least,
    maximum_words,
    prefetch,
    store_row,
    store_words,
    stream_row,
    trailing_zeros,
)
from gradq.rng import EncodeContext

__all__ = ["decode", "decode_mean", "encode"]


@inline_optimized
def _count(magnitudes_L: Any, least: Any) -> Any:
    """How many are at least this large."""
    total = np.int32(0)
    for j in range(len(magnitudes_L)):
        total = np.int32(total + np.int32(magnitudes_L[j] >= least))
    return total


@inline_optimized
def _logarithm(count: Any) -> Any:
    """Nearly proportional to the logarithm: the bits of a float."""
    return np.float32(np.int32(as_bits(np.float32(count))))


@inline_optimized
def _threshold(magnitudes_L: Any, most: Any, k: Any) -> Any:
    """(t, ties): the k largest are all from t on, and the first `ties` of those that equal t - 1.

    Between two bounds the logarithm of the count is taken for a straight line, as it nearly is. Every third
    step halves instead, so that it ends for any input.
    """
    L = len(magnitudes_L)
    low, below = np.uint32(0), np.int32(L)
    high, above = np.uint32(most + np.uint32(1)), np.int32(0)
    middle = np.uint32(most - min(most, np.uint32(6 << 23)))  # 2**-6 of the largest: often below the k-th
    step = 0
    while high - low > np.uint32(1):
        if middle <= low or middle >= high:
            middle = np.uint32(low + ((high - low) >> np.uint32(1)))
        count = _count(magnitudes_L, middle)
        if count == k:
            return middle, np.int32(0)
        if count > k:
            low, below = middle, count
        else:
            high, above = middle, count
        step += 1
        part = np.float32(0.5)
        if step % 3 != 0:
            top, bottom = _logarithm(below), _logarithm(max(np.float32(above), np.float32(0.25)))
            part = (top - _logarithm(np.float32(k))) / (top - bottom)
        middle = np.uint32(low + np.uint32(np.float32(high - low) * part))
    return high, np.int32(k - above)


@inline_optimized
def _collect(magnitudes_at: Any, L: Any, threshold: Any, ties: Any, indices: Any) -> None:
    """The indices of the k largest, ascending; magnitudes are padded with zeros to a multiple of 16."""
    found = 0
    if ties == 0:
        least = constant_words(threshold)
        for row in range((L + LANES - 1) // LANES):
            mask = mask_at_least(load_words(magnitudes_at + 4 * LANES * row), least)
            while mask != 0:
                indices[found] = LANES * row + trailing_zeros(mask)
                found += 1
                mask &= mask - 1
        return
    magnitudes, tie = u32_at(magnitudes_at, L), np.uint32(threshold - np.uint32(1))
    for j in range(L):
        if magnitudes[j] >= threshold:
            indices[found] = j
            found += 1
        elif ties > 0 and magnitudes[j] == tie:
            indices[found] = j
            found += 1
            ties -= 1


@inline_optimized
def _pack_indices(indices: Any, k: Any, low_bits: Any, high_bytes: Any, low_bytes: Any, data: Any) -> None:
    for j in range(high_bytes):
        data[j] = np.uint8(0)
    for i in range(k):
        at = (indices[i] >> low_bits) + i
        data[at >> 3] |= np.uint8(1 << (at & 7))
    low, held, num_held, at = data[high_bytes:], 0, 0, 0
    for i in range(k):
        held |= (np.int64(indices[i]) & ((1 << low_bits) - 1)) << num_held
        num_held += low_bits
        while num_held >= 8:
            low[at] = np.uint8(held & 255)
            held >>= 8
            num_held -= 8
            at += 1
    if num_held > 0:
        low[at] = np.uint8(held)


@inline_optimized
def _unpack_indices(data: Any, k: Any, low_bits: Any, high_bytes: Any, L: Any, indices: Any) -> None:
    """Whatever the bytes are, k indices below L."""
    found = 0
    for byte in range(high_bytes):
        mask = np.int64(data[byte])
        while mask != 0 and found < k:
            indices[found] = 8 * byte + trailing_zeros(mask) - found
            found += 1
            mask &= mask - 1
    for i in range(found, k):
        indices[i] = 0
    low, held, num_held, at = data[high_bytes:], 0, 0, 0
    for i in range(k):
        while num_held < low_bits:
            held |= np.int64(low[at]) << num_held
            num_held += 8
            at += 1
        index = (np.int64(indices[i]) << low_bits) | (held & ((1 << low_bits) - 1))
        indices[i] = min(index, L - 1)
        held >>= low_bits
        num_held -= low_bits


@inline_optimized
def _write(value_at: Any, out_at: Any, L: Any, factor: Any) -> None:
    """Value times factor to out, past the cache where whole lines can be written."""
    done = 0
    if out_at % 64 == 0:
        done = L // LANES * LANES
        for j in range(0, done, LANES):
            stream_row(out_at + 4 * j, load_row(value_at + 4 * j) * constant_row(factor))
    value, out = f32_at(value_at + 4 * done, L - done), f32_at(out_at + 4 * done, L - done)
    for j in range(L - done):
        out[j] = value[j] * factor


@inline_optimized
def _load(
    x_at: Any, residual_at: Any, value_at: Any, magnitudes_at: Any, L: Any, block_size: Any, unscale: Any
) -> Any:
    """Store x + residual * unscale and its magnitudes, padded with zeros; return the bits of the largest."""
    most_W, mask, factor = (
        constant_words(np.uint32(0)),
        constant_words(np.uint32(0x7FFFFFFF)),
        constant_row(unscale),
    )
    for row in range(L // LANES):
        at = 4 * LANES * row
        prefetch(x_at + 4 * block_size + at)  # of the next block
        value_R = load_row(x_at + at)
        if residual_at != 0:
            prefetch(residual_at + 4 * block_size + at)
            value_R = value_R + load_row(residual_at + at) * factor
        store_row(value_at + at, value_R)
        magnitudes_W = as_words(value_R) & mask
        store_words(magnitudes_at + at, magnitudes_W)
        most_W = maximum_words(most_W, magnitudes_W)
    most, done = np.uint32(0), L // LANES * LANES
    largest = np.empty(LANES, np.uint32)
    store_words(largest.ctypes.data, most_W)
    for j in range(LANES):
        most = np.uint32(max(most, largest[j]))
    keep(largest)
    x, residual = f32_at(x_at + 4 * done, L - done), f32_at(residual_at + 4 * done, L - done)
    value, magnitudes = f32_at(value_at + 4 * done, L - done), u32_at(magnitudes_at + 4 * done, 16)
    for j in range(L - done):
        value[j] = x[j]
        if residual_at != 0:
            value[j] += residual[j] * unscale
        magnitudes[j] = np.uint32(as_bits(value[j]) & np.uint32(0x7FFFFFFF))
        most = np.uint32(max(most, magnitudes[j]))
    for j in range(L - done, 16):
        magnitudes[j] = np.uint32(0)
    return most


@cache
def _encoder(num_bits: int) -> Any:
    """The kernel for codes of a width."""
    pack: Any = packing(num_bits, 0)[0] if num_bits < 8 else None

    @variant(f"{num_bits}")
    def encode(
        x_at: int,
        n: int,
        payload_at: int,
        nbytes: int,
        block_size: int,
        shapes: Any,
        residual_at: int,
        new_residual_at: int,
        loss_scale: float,
        inverse_loss_scale: float,
    ) -> None:
        payload = u8_at(payload_at, nbytes)
        residual, new_residual = f32_at(residual_at, n), f32_at(new_residual_at, n)
        value_B, magnitudes_B = np.empty(block_size, np.float32), np.empty(block_size + 16, np.uint32)
        value_at, magnitudes_at = value_B.ctypes.data, magnitudes_B.ctypes.data
        indices, codes_P = np.empty(block_size, np.int32), np.empty(block_size + 8, np.uint8)
        unscale, rescale = np.float32(loss_scale), np.float32(inverse_loss_scale)
        qmax = (1 << (num_bits - 1)) - 1
        half = np.float32(np.float32(qmax) + np.float32(0.5))
        num_blocks = (n + block_size - 1) // block_size
        at = num_blocks * SCALE_BYTES
        for number in range(num_blocks):
            start = number * block_size
            L = min(block_size, n - start)
            shape = shapes[1 if block_size > L else 0]
            k, low_bits, code_bytes, high_bytes, low_bytes = shape[0], shape[1], shape[2], shape[3], shape[4]
            value, magnitudes = value_B[:L], magnitudes_B[:L]
            old_at = 0 if residual_at == 0 else residual_at + 4 * start
            most = _load(x_at + 4 * start, old_at, value_at, magnitudes_at, L, block_size, unscale)
            scale = store_scale(payload_at + number * SCALE_BYTES, BF16, as_float(most), qmax)
            data = payload[at : at + code_bytes + high_bytes + low_bytes]
            at += code_bytes + high_bytes + low_bytes
            if scale > np.float32(0):
                threshold, ties = _threshold(magnitudes, most, k)
                _collect(magnitudes_at, L, threshold, ties, indices)
                inverse = np.float32(1) / scale
                codes = codes_P[: code_bytes * 8 // num_bits]
                for i in range(len(codes)):
                    codes[i] = np.uint8(qmax)
                for i in range(k):
                    v = value[indices[i]]
                    code = np.int32(v * inverse + half)
                    code = min(max(code, np.int32(0)), np.int32(2 * qmax))
                    codes[i] = np.uint8(code)
                    value[indices[i]] = v - np.float32(np.int32(code - np.int32(qmax))) * scale
                if num_bits == 8:
                    data[: len(codes)] = codes
                else:
                    pack(codes.ctypes.data, data.ctypes.data, len(codes))
                _pack_indices(indices, k, low_bits, high_bytes, low_bytes, data[code_bytes:])
            else:
                for j in range(len(data)):
                    data[j] = np.uint8(0)
            if new_residual_at != 0 and scale == scale:
                _write(value_at, new_residual_at + 4 * start, L, rescale)
            elif new_residual_at != 0:
                old_L, new_L = residual[start : start + L], new_residual[start : start + L]
                for j in range(L):
                    new_L[j] = old_L[j]
        fence()
        keep(value_B)
        keep(magnitudes_B)

    return encode


@cache
def _decoder(num_bits: int) -> Any:
    """The kernel for codes of a width."""
    unpack: Any = packing(num_bits, 0)[1] if num_bits < 8 else None

    @variant(f"{num_bits}")
    def decode_mean(
        payloads_at: int,
        num_rows: int,
        row_stride: int,
        nbytes: int,
        out_at: int,
        n: int,
        block_size: int,
        shapes: Any,
    ) -> None:
        """Decode is the mean of one row."""
        payloads, out = u8_at(payloads_at, (num_rows - 1) * row_stride + nbytes), f32_at(out_at, n)
        indices, codes_P = np.empty(block_size, np.int32), np.empty(block_size + 8, np.uint8)
        qmax, divisor = (1 << (num_bits - 1)) - 1, np.float32(num_rows)
        num_blocks = (n + block_size - 1) // block_size
        at = num_blocks * SCALE_BYTES
        for number in range(num_blocks):
            start = number * block_size
            L = min(block_size, n - start)
            shape = shapes[1 if block_size > L else 0]
            k, low_bits, code_bytes, high_bytes, low_bytes = shape[0], shape[1], shape[2], shape[3], shape[4]
            out_L, codes = out[start : start + L], codes_P[: code_bytes * 8 // num_bits]
            for j in range(L):
                out_L[j] = np.float32(0)
            for rank in range(num_rows):
                payload = payloads[rank * row_stride : rank * row_stride + nbytes]
                scale = load_scale(payloads_at + rank * row_stride + number * SCALE_BYTES, BF16)
                if scale != scale:
                    for j in range(L):
                        out_L[j] = np.float32(np.nan)
                elif scale > np.float32(0):
                    if num_bits == 8:
                        codes[:] = payload[at : at + code_bytes]
                    else:
                        unpack(payload[at:].ctypes.data, codes.ctypes.data, len(codes))
                    _unpack_indices(payload[at + code_bytes :], k, low_bits, high_bytes, L, indices)
                    for i in range(k):
                        decoded = np.float32(np.int32(np.int32(codes[i]) - np.int32(qmax))) * scale
                        out_L[indices[i]] += decoded
            at += code_bytes + high_bytes + low_bytes
            if num_rows > 1:
                for j in range(L):
                    out_L[j] /= divisor

    return decode_mean


@cache
def _shapes(last: int, form: TopKFormat) -> Any:
    """Of a whole block and of the last one: k, low bits, and bytes of codes, high and low parts."""

    def numbers(block: Block) -> list[int]:
        return [block.kept, block.low_bits, block.code_bytes, block.high_bytes, block.low_bytes]

    return np.array([numbers(form.block(form.block_size)), numbers(form.block(last))], np.int64)


def encode(
    x: Tensor,
    payload: Tensor,
    form: TopKFormat,
    context: EncodeContext,
    residual: Tensor | None = None,
    new_residual: Tensor | None = None,
) -> None:
    """Encode x + loss_scale * residual; the format is the reference's."""
    assert new_residual is None or residual is not None
    n, scale = x.numel(), float(context.loss_scale)
    nbytes = form.nbytes(n)
    _encoder(form.num_bits)(
        address(x, torch.float32, n),
        n,
        address(payload, torch.uint8, nbytes),
        nbytes,
        form.block_size,
        _shapes(n % form.block_size or 1, form),
        0 if residual is None else address(residual, torch.float32, n),
        0 if new_residual is None else address(new_residual, torch.float32, n),
        scale,
        1.0 / scale,
    )


def decode(payload: Tensor, out: Tensor, form: TopKFormat) -> None:
    """Decode one segment into out."""
    decode_mean(payload[None], out, form)


def decode_mean(payloads: Tensor, out: Tensor, form: TopKFormat) -> None:
    """Mean over the W rows of payloads, added in row order in fp32, divided once."""
    n = out.numel()
    nbytes = form.nbytes(n)
    payloads_at, rows = row_addresses(payloads, nbytes)
    shapes = _shapes(n % form.block_size or 1, form)
    out_at = address(out, torch.float32, n)
    _decoder(form.num_bits)(payloads_at, *rows, nbytes, out_at, n, form.block_size, shapes)
