"""The table codecs in Numba: byte for byte what `gradq.kernels.reference_table` writes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradq.kernels import reference_table
from gradq.kernels.numba_tools import (
    address,
    as_bits,
    as_float,
    f32_at,
    inline,
    jit,
    mix32,
    pack,
    row_addresses,
    u8_at,
    unpack,
)
from gradq.kernels.tables import MULTIPLIERS, Table, payload_bytes

__all__ = ["table_decode", "table_decode_mean", "table_encode"]

_MASK32 = 0xFFFFFFFF
_FORMATS = {"bf16": 0, "e8m0": 1, "e6m2": 2}
_RULES = {"absmax": 0, "l1": 1, "l2": 2, "mse": 3}
_MULTIPLIERS = np.array(MULTIPLIERS, np.float32)


@cache
def _constants(table: Table) -> tuple[Any, Any, Any, Any]:
    """Levels, midpoints, 1 / gaps; and numbers: block_size, num_bits, format, rule, stochastic, smallest."""
    levels, middles, gaps, smallest = reference_table.constants(table)
    numbers = (table.block_size, table.num_bits, _FORMATS[table.scale_format], _RULES[table.rule])
    return levels.numpy(), middles.numpy(), gaps.numpy(), (*numbers, int(table.stochastic), smallest)


@inline
def _scale_bits(scale: Any, kind: Any, up: Any) -> Any:
    bits = as_bits(scale)
    if kind == 0:
        if bits >= np.uint32(0x7F800000):
            return np.uint32(0x7FC0)
        wire = np.uint32((bits + np.uint32(0xFFFF if up else 0x8000)) >> np.uint32(16))
        return (
            np.uint32(0)
            if bits < np.uint32(0x800000)
            else np.uint32(0x7FC0)
            if wire >= np.uint32(0x7F80)
            else wire
        )
    if bits >= np.uint32(0x7F800000):
        return np.uint32(255)
    mantissa, bias = (0, 0) if kind == 1 else (2, 79)
    drop = 23 - mantissa
    number = ((np.int64(bits) + (1 << drop) - 1) >> drop) - (bias << mantissa)
    if bits < np.uint32(0x800000) or number < 1 << mantissa:
        return np.uint32(0)
    return np.uint32(min(number, 255))


@inline
def _scale_value(bits: Any, kind: Any) -> Any:
    if kind == 0:
        return as_float(np.uint32(bits << np.uint32(16)))
    if bits == np.uint32(255):
        return np.float32(np.nan)
    if kind == 1:
        return as_float(np.uint32(bits << np.uint32(23)))
    if bits == np.uint32(0):
        return np.float32(0)
    return as_float(np.uint32(np.uint32(bits + np.uint32(79 << 2)) << np.uint32(21)))


@inline
def _count(sorted_values: Any, q: Any) -> Any:
    """How many of the values are <= q."""
    low, high = 0, len(sorted_values)
    while low < high:
        middle = (low + high) >> 1
        if sorted_values[middle] <= q:
            low = middle + 1
        else:
            high = middle
    return low


@inline
def _mse(value_L: Any, inverse: Any, levels: Any, middles: Any, multipliers: Any, codes: Any) -> Any:
    """The factor of absmax; codes of the multiplier that wins."""
    best, factor, winner = np.float32(-1), np.float32(0), np.float32(1)
    for m in range(len(multipliers)):
        stretch = levels[len(levels) - 1] / multipliers[m]
        inner, norm = np.float32(0), np.float32(0)
        for j in range(len(value_L)):
            y = value_L[j] * inverse
            c = levels[_count(middles, y * stretch)]
            inner += c * y
            norm += c * c
        ratio = inner / norm if norm > np.float32(0) else np.float32(0)
        score = inner * ratio
        if score > best:
            best, factor, winner = score, ratio, stretch
    for j in range(len(value_L)):
        codes[j] = np.uint8(_count(middles, (value_L[j] * inverse) * winner))
    return factor


@jit
def _encode(
    x_at: int,
    n: int,
    payload_at: int,
    nbytes: int,
    levels: Any,
    middles: Any,
    gaps: Any,
    numbers: Any,
    multipliers: Any,
    key_low: int,
    key_high: int,
    shift: int,
    first_block: int,
    residual_at: int,
    new_residual_at: int,
    loss_scale: float,
    inverse_loss_scale: float,
) -> None:
    block_size, num_bits, kind, rule, stochastic, smallest = numbers
    x, payload = f32_at(x_at, n), u8_at(payload_at, nbytes)
    residual, new_residual = f32_at(residual_at, n), f32_at(new_residual_at, n)
    value_B, codes_B = np.empty(block_size, np.float32), np.empty(block_size, np.uint8)
    unscale, rescale = np.float32(loss_scale), np.float32(inverse_loss_scale)
    top = levels[len(levels) - 1]
    size = 2 if kind == 0 else 1
    up = rule == 0 or rule == 2
    num_blocks = (n + block_size - 1) // block_size
    at = num_blocks * size
    for block in range(num_blocks):
        start = block * block_size
        L = min(block_size, n - start)
        P = (L + 7) // 8 * 8
        value, codes = value_B[:L], codes_B[:P]
        absmax_bits = np.uint32(0)
        for j in range(L):
            v = x[start + j]
            if residual_at != 0:
                v = v + residual[start + j] * unscale
            value[j] = v
            absmax_bits = max(absmax_bits, np.uint32(as_bits(v) & np.uint32(0x7FFFFFFF)))
        absmax = as_float(absmax_bits)
        scale, chosen = np.float32(0), False
        if absmax_bits >= np.uint32(0x7F800000):
            scale = np.float32(np.nan)
        elif absmax_bits >= np.uint32(0x800000):
            inverse = np.float32(1) / absmax
            total = np.float32(0)
            if rule == 0:
                scale = absmax / top
            elif rule == 1:
                for j in range(L):
                    total += abs(value[j] * inverse)
                scale = absmax * (total / np.float32(L))
            elif rule == 2:
                for j in range(L):
                    y = value[j] * inverse
                    total += y * y
                scale = absmax * np.float32(np.sqrt(total))
            else:
                scale = absmax * _mse(value, inverse, levels, middles, multipliers, codes)
                chosen = True
        bits = _scale_bits(scale, kind, up)
        scale = _scale_value(bits, kind)
        if not scale * top < np.float32(np.inf):
            bits = _scale_bits(np.float32(np.nan), kind, up)
            scale = np.float32(np.nan)
        for k in range(size):
            payload[block * size + k] = np.uint8(bits >> np.uint32(8 * k))
        first = 0
        if scale > np.float32(0):
            first = L
            inverse = np.float32(1) / scale
            if chosen:
                pass
            elif stochastic:
                block_key = np.uint32(np.uint32(first_block) + np.uint32(block))
                block_key = np.uint32(mix32(block_key ^ np.uint32(key_low)) + np.uint32(key_high))
                half = P // 2
                for j in range(L):
                    q = value[j] * inverse
                    low = min(max(_count(levels, q) - 1, 0), len(levels) - 2)
                    d = mix32(np.uint32(np.uint32(j if j < half else j - half) + block_key))
                    d = np.uint32(d & np.uint32(0xFFFF)) if j < half else np.uint32(d >> np.uint32(16))
                    d = np.uint32(np.uint32(d + np.uint32(shift)) & np.uint32(0xFFFF))
                    u = np.float32(np.int32(d)) * np.float32(2.0**-16) + np.float32(2.0**-17)
                    codes[j] = np.uint8(low + (1 if (q - levels[low]) * gaps[low] > u else 0))
            else:
                for j in range(L):
                    codes[j] = np.uint8(_count(middles, value[j] * inverse))
        for j in range(first, P):
            codes[j] = np.uint8(smallest)
        pack(codes, payload[at : at + P * num_bits // 8], num_bits)
        at += P * num_bits // 8
        if new_residual_at != 0:
            for j in range(L):
                if scale != scale:
                    new_residual[start + j] = residual[start + j]
                else:
                    new_residual[start + j] = (value[j] - levels[codes[j]] * scale) * rescale


@jit
def _decode_mean(
    payloads_at: int,
    num_rows: int,
    row_stride: int,
    nbytes: int,
    out_at: int,
    n: int,
    levels: Any,
    numbers: Any,
) -> None:
    """Decode is the mean of one row."""
    block_size, num_bits, kind, _, _, _ = numbers
    payloads, out = u8_at(payloads_at, (num_rows - 1) * row_stride + nbytes), f32_at(out_at, n)
    codes_B = np.empty(block_size, np.uint8)
    size = 2 if kind == 0 else 1
    divisor = np.float32(num_rows)
    num_blocks = (n + block_size - 1) // block_size
    for block in range(num_blocks):
        start = block * block_size
        L = min(block_size, n - start)
        P = (L + 7) // 8 * 8
        codes, out_L = codes_B[:P], out[start : start + L]
        at = num_blocks * size + start * num_bits // 8
        for rank in range(num_rows):
            payload = payloads[rank * row_stride : rank * row_stride + nbytes]
            bits = np.uint32(payload[block * size])
            if size == 2:
                bits = np.uint32(bits | (np.uint32(payload[block * size + 1]) << np.uint32(8)))
            scale = _scale_value(bits, kind)
            unpack(payload[at : at + P * num_bits // 8], codes, num_bits)
            for j in range(L):
                decoded = levels[codes[j]] * scale if scale == scale else np.float32(np.nan)
                out_L[j] = decoded if rank == 0 else out_L[j] + decoded
        if num_rows > 1:
            for j in range(L):
                out_L[j] /= divisor


def table_encode(
    x: Tensor,
    payload: Tensor,
    *,
    table: Table,
    key: int,
    shift: int,
    first_block: int,
    residual: Tensor | None,
    new_residual: Tensor | None,
    loss_scale: float,
) -> None:
    """Encode x + loss_scale * residual; the format is the reference's."""
    assert new_residual is None or residual is not None
    nbytes = payload_bytes(x.numel(), table)
    _encode(
        address(x, torch.float32, x.numel()),
        x.numel(),
        address(payload, torch.uint8, nbytes),
        nbytes,
        *_constants(table),
        _MULTIPLIERS,
        key & _MASK32,
        (key >> 32) & _MASK32,
        shift,
        first_block & _MASK32,
        0 if residual is None else address(residual, torch.float32, x.numel()),
        0 if new_residual is None else address(new_residual, torch.float32, x.numel()),
        float(loss_scale),
        1.0 / loss_scale,
    )


def table_decode(payload: Tensor, out: Tensor, *, table: Table) -> None:
    """Decode one segment into out."""
    table_decode_mean(payload[None], out, table=table)


def table_decode_mean(payloads: Tensor, out: Tensor, *, table: Table) -> None:
    """Mean over the W rows of payloads, added in row order in fp32, divided once."""
    n = out.numel()
    levels, _, _, numbers = _constants(table)
    payloads_at, rows = row_addresses(payloads, payload_bytes(n, table))
    _decode_mean(
        payloads_at,
        *rows,
        payload_bytes(n, table),
        address(out, torch.float32, n),
        n,
        levels,
        numbers,
    )
