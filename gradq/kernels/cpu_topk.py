"""The top-k codec in Numba: byte for byte what `gradq.kernels.reference_topk` writes.

The k-th largest magnitude is found by bisection on its bit pattern: how many of the block are at least this
large? A count is a few hundred vector instructions while the block stays in the L1 cache, about twelve counts
settle it, because the bisection ends as soon as a count is k, and nothing is sorted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradq.kernels.numba_tools import (
    address,
    as_bits,
    as_float,
    f32_at,
    inline,
    jit,
    pack,
    row_addresses,
    u8_at,
    unpack,
)
from gradq.kernels.topk import SCALE_BYTES, Block, TopK, payload_bytes

__all__ = ["topk_decode", "topk_decode_mean", "topk_encode"]

_INFINITY = 0x7F800000
_RUN = 32  # elements looked at together when the kept ones are collected


@inline
def _scale_bits(absmax: Any, qmax: Any) -> Any:
    """As in the reference: bf16 rounded up, 0 for tiny scales, NaN for what is or becomes infinite."""
    bits = as_bits(absmax / np.float32(qmax))
    if bits >= np.uint32(_INFINITY):
        return np.uint32(0x7FC0)
    if bits < np.uint32(0x00800000):
        return np.uint32(0)
    up = np.uint32((bits + np.uint32(0xFFFF)) >> np.uint32(16))
    if not as_float(np.uint32(up << np.uint32(16))) * np.float32(qmax) < np.float32(np.inf):
        return np.uint32(0x7FC0)
    return up


@inline
def _count(magnitudes_L: Any, least: Any) -> Any:
    """How many are at least this large."""
    total = np.int32(0)
    for j in range(len(magnitudes_L)):
        total = np.int32(total + np.int32(magnitudes_L[j] >= least))
    return total


@inline
def _threshold(magnitudes_L: Any, most: Any, k: Any) -> Any:
    """(t, ties): the k largest are all from t on, and the first `ties` of those that equal t - 1."""
    low, high, above = np.uint32(0), np.uint32(most + np.uint32(1)), np.int32(0)
    near = np.uint32(
        most - min(most, np.uint32(8 << 23))
    )  # 2**-8 of the largest: nearly always below the k-th
    count = _count(magnitudes_L, near)
    if count == k:
        return near, np.int32(0)
    if count > k:
        low = near
    else:
        high, above = near, count
    while high - low > np.uint32(1):
        middle = np.uint32(low + ((high - low) >> np.uint32(1)))
        count = _count(magnitudes_L, middle)
        if count == k:
            return middle, np.int32(0)
        if count > k:
            low = middle
        else:
            high, above = middle, count
    return high, np.int32(k - above)


@inline
def _collect(magnitudes_L: Any, threshold: Any, ties: Any, indices: Any) -> None:
    """The indices of the k largest, ascending."""
    L, found, tie = len(magnitudes_L), 0, np.uint32(threshold - np.uint32(1))
    least = tie if ties > 0 else threshold
    for start in range(0, L, _RUN):
        run = magnitudes_L[start : min(start + _RUN, L)]
        if _count(run, least) == 0:
            continue
        for j in range(len(run)):
            if run[j] >= threshold:
                indices[found] = start + j
                found += 1
            elif ties > 0 and run[j] == tie:
                indices[found] = start + j
                found += 1
                ties -= 1


@inline
def _pack_indices(indices: Any, k: Any, low_bits: Any, high_bytes: Any, low_bytes: Any, data: Any) -> None:
    for j in range(high_bytes + low_bytes):
        data[j] = np.uint8(0)
    low = data[high_bytes:]
    for i in range(k):
        at = (indices[i] >> low_bits) + i
        data[at >> 3] |= np.uint8(1 << (at & 7))
        at = i * low_bits
        for b in range(low_bits):
            low[(at + b) >> 3] |= np.uint8(((indices[i] >> b) & 1) << ((at + b) & 7))


@inline
def _unpack_indices(data: Any, k: Any, low_bits: Any, high_bytes: Any, L: Any, indices: Any) -> None:
    """Whatever the bytes are, k indices below L."""
    low, found, at = data[high_bytes:], 0, 0
    while found < k and at < 8 * high_bytes:
        if (data[at >> 3] >> (at & 7)) & 1:
            index, bit = (at - found) << low_bits, found * low_bits
            for b in range(low_bits):
                index |= ((low[(bit + b) >> 3] >> ((bit + b) & 7)) & 1) << b
            indices[found] = min(index, L - 1)
            found += 1
        at += 1
    for i in range(found, k):
        indices[i] = 0


@jit
def _encode(
    x_at: int,
    n: int,
    payload_at: int,
    nbytes: int,
    num_bits: int,
    block_size: int,
    shapes: Any,
    residual_at: int,
    new_residual_at: int,
    loss_scale: float,
    inverse_loss_scale: float,
) -> None:
    x, payload = f32_at(x_at, n), u8_at(payload_at, nbytes)
    residual, new_residual = f32_at(residual_at, n), f32_at(new_residual_at, n)
    value_B, magnitudes_B = np.empty(block_size, np.float32), np.empty(block_size, np.uint32)
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
        value, magnitudes, x_L = value_B[:L], magnitudes_B[:L], x[start : start + L]
        most = np.uint32(0)
        if residual_at != 0:
            residual_L = residual[start : start + L]
            for j in range(L):
                value[j] = x_L[j] + residual_L[j] * unscale
        else:
            for j in range(L):
                value[j] = x_L[j]
        for j in range(L):
            magnitudes[j] = np.uint32(as_bits(value[j]) & np.uint32(0x7FFFFFFF))
            most = np.uint32(max(most, magnitudes[j]))
        bits = _scale_bits(as_float(most), qmax)
        payload[number * SCALE_BYTES] = np.uint8(bits)
        payload[number * SCALE_BYTES + 1] = np.uint8(bits >> np.uint32(8))
        scale = as_float(np.uint32(bits << np.uint32(16)))
        data = payload[at : at + code_bytes + high_bytes + low_bytes]
        at += code_bytes + high_bytes + low_bytes
        if new_residual_at != 0:
            new_L, old_L = new_residual[start : start + L], residual[start : start + L]
            if scale != scale:
                for j in range(L):
                    new_L[j] = old_L[j]
            else:
                for j in range(L):
                    new_L[j] = value[j] * rescale
        if not scale > np.float32(0):
            for j in range(len(data)):
                data[j] = np.uint8(0)
            continue
        threshold, ties = _threshold(magnitudes, most, k)
        _collect(magnitudes, threshold, ties, indices)
        inverse = np.float32(1) / scale
        codes = codes_P[: code_bytes * 8 // num_bits]
        for i in range(len(codes)):
            codes[i] = np.uint8(qmax)
        for i in range(k):
            v = value[indices[i]]
            code = np.int32(v * inverse + half)
            code = min(max(code, np.int32(0)), np.int32(2 * qmax))
            codes[i] = np.uint8(code)
            if new_residual_at != 0:
                decoded = np.float32(np.int32(code - np.int32(qmax))) * scale
                new_residual[start + indices[i]] = (v - decoded) * rescale
        pack(codes, data[:code_bytes], num_bits)
        _pack_indices(indices, k, low_bits, high_bytes, low_bytes, data[code_bytes:])


@jit
def _decode_mean(
    payloads_at: int,
    num_rows: int,
    row_stride: int,
    nbytes: int,
    out_at: int,
    n: int,
    num_bits: int,
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
            bits = np.uint32(payload[number * SCALE_BYTES])
            bits = np.uint32(bits | (np.uint32(payload[number * SCALE_BYTES + 1]) << np.uint32(8)))
            scale = as_float(np.uint32(bits << np.uint32(16)))
            if scale != scale:
                for j in range(L):
                    out_L[j] = np.float32(np.nan)
            elif scale > np.float32(0):
                unpack(payload[at : at + code_bytes], codes, num_bits)
                _unpack_indices(payload[at + code_bytes :], k, low_bits, high_bytes, L, indices)
                for i in range(k):
                    decoded = np.float32(np.int32(np.int32(codes[i]) - np.int32(qmax))) * scale
                    out_L[indices[i]] += decoded
        at += code_bytes + high_bytes + low_bytes
        if num_rows > 1:
            for j in range(L):
                out_L[j] /= divisor


def _shapes(n: int, topk: TopK) -> Any:
    """Of a whole block and of the last one: k, low bits, and bytes of codes, high and low parts."""

    def numbers(block: Block) -> list[int]:
        return [block.kept, block.low_bits, block.code_bytes, block.high_bytes, block.low_bytes]

    return np.array(
        [numbers(topk.block(topk.block_size)), numbers(topk.block(n % topk.block_size or 1))], np.int64
    )


def topk_encode(
    x: Tensor,
    payload: Tensor,
    *,
    topk: TopK,
    residual: Tensor | None,
    new_residual: Tensor | None,
    loss_scale: float,
) -> None:
    """Encode x + loss_scale * residual; the format is the reference's."""
    assert new_residual is None or residual is not None
    n = x.numel()
    nbytes = payload_bytes(n, topk)
    _encode(
        address(x, torch.float32, n),
        n,
        address(payload, torch.uint8, nbytes),
        nbytes,
        topk.num_bits,
        topk.block_size,
        _shapes(n, topk),
        0 if residual is None else address(residual, torch.float32, n),
        0 if new_residual is None else address(new_residual, torch.float32, n),
        float(loss_scale),
        1.0 / loss_scale,
    )


def topk_decode(payload: Tensor, out: Tensor, *, topk: TopK) -> None:
    """Decode one segment into out."""
    topk_decode_mean(payload[None], out, topk=topk)


def topk_decode_mean(payloads: Tensor, out: Tensor, *, topk: TopK) -> None:
    """Mean over the W rows of payloads, added in row order in fp32, divided once."""
    n = out.numel()
    nbytes = payload_bytes(n, topk)
    payloads_at, rows = row_addresses(payloads, nbytes)
    _decode_mean(
        payloads_at,
        *rows,
        nbytes,
        address(out, torch.float32, n),
        n,
        topk.num_bits,
        topk.block_size,
        _shapes(n, topk),
    )
