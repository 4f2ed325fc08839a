"""The table codecs in Numba: byte for byte what `gradq.contrib.table.reference` writes.

Blocks are taken a few at a time, each step for all of them. Levels are found by arithmetic where they are
small floats, else by bisection; where a processor looks up in a register and there are at most 16, for many
elements at once. The rules l1, l2 and mse sum from the first element to the last, so that the sums of four
blocks go side by side, and under mse the lanes are multipliers, of two blocks if so many fit.
"""

from __future__ import annotations

import functools
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradq.contrib.table import reference as reference_table
from gradq.contrib.table.cpu_float_levels import float_nearest, float_stochastic, mantissa_bits
from gradq.contrib.table.cpu_rows import (
    IN_A_REGISTER,
    decode_rows,
    multiplier_sums,
    nearest_rows,
    stochastic_rows,
)
from gradq.contrib.table.format import MULTIPLIERS, Table, payload_bytes
from gradq.kernels.numba_compile import inline, variant
from gradq.kernels.numba_tools import (
    address,
    aligned,
    as_bits,
    as_float,
    f32_at,
    keep,
    load_copy,
    load_sum,
    mix32,
    next_blocks,
    pack_few,
    packing,
    row_addresses,
    u8_at,
    unit_dither,
    unpack_few,
)
from gradq.kernels.vector.operations import LANES

__all__ = ["table_decode", "table_decode_mean", "table_encode"]

_MASK32 = 0xFFFFFFFF
_FORMATS = {"bf16": 0, "e8m0": 1, "e6m2": 2}
_RULES = {"absmax": 0, "l1": 1, "l2": 2, "mse": 3}
_MULTIPLIERS = np.array(MULTIPLIERS, np.float32)
_TOGETHER = 1024  # elements of the blocks that are taken together
_PAIR = 2 if LANES >= 16 else 1  # blocks whose multipliers share a row
assert len(MULTIPLIERS) <= 8


@cache
def _constants(table: Table) -> tuple[Any, Any, Any, Any, Any]:
    """Levels, midpoints, 1 / gaps; the same as registers; and numbers.

    Registers, [4, 16]: levels, midpoints, levels but the first and the last, 1 / gaps; what is searched is
    filled up with Inf. Numbers: block_size, num_bits, format, rule, stochastic, smallest, bits of mantissa,
    whether the levels are even.
    """
    levels, middles, gaps, smallest = reference_table.constants(table)
    numbers = (table.block_size, table.num_bits, _FORMATS[table.scale_format], _RULES[table.rule])
    registers = np.full((4, 16), np.inf, np.float32)
    if len(levels) <= IN_A_REGISTER:
        for row, values in zip(registers, (levels, middles, levels[1:-1], gaps), strict=True):
            row[: len(values)] = values.numpy()
    arrays = levels.numpy(), middles.numpy(), gaps.numpy(), registers
    mantissa = 0 if table.rule == "mse" else mantissa_bits(table.levels)  # which has two factors
    is_even = bool(gaps.max() < 1.0001 * gaps.min())
    return *arrays, (*numbers, int(table.stochastic), smallest, mantissa, is_even)


@cache
def _level_of_each_code(table: Table) -> Any:
    """The levels, and NaN for codes that stand for none: a corrupted payload must not read past them."""
    levels = np.full(1 << table.num_bits, np.nan, np.float32)
    levels[: len(table.levels)] = table.levels
    return levels


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
    """How many of the values are <= q, by signs of differences: nobody could foresee branches."""
    first, left = 0, len(sorted_values)
    while left > 1:
        half = left >> 1
        first += half & _if_reached(sorted_values[first + half - 1], q)
        left -= half
    return first - _if_reached(sorted_values[first], q)


@inline
def _if_reached(value: Any, q: Any) -> Any:
    """-1 where value <= q, else 0."""
    difference = np.float32(np.float32(q - value) + np.float32(0))  # of -0 and 0 it would be -0
    return np.int64(as_bits(difference) >> np.uint32(31)) - 1


@inline
def _nearest(value_at: Any, factors: Any, codes_at: Any, middles: Any, middles_at: Any, L: Any) -> None:
    """The nearest level of each value times both factors."""
    done = 0
    if len(middles) < IN_A_REGISTER:
        done = nearest_rows(value_at, factors, codes_at, middles_at, L)
    value, codes = f32_at(value_at + 4 * done, L - done), u8_at(codes_at + done, L - done)
    for j in range(L - done):
        codes[j] = np.uint8(_count(middles, (value[j] * factors[0]) * factors[1]))


@inline
def _below(levels: Any, gaps: Any, q: Any) -> Any:
    """The level below q, of levels that are even but for their rounding."""
    last = len(levels) - 2
    low = min(max(np.int64((q - levels[0]) * gaps[0]), 0), last)
    if low > 0 and levels[low] > q:
        low -= 1
    elif low < last and levels[low + 1] <= q:
        low += 1
    return low


@inline
def _stochastic(
    value: Any, inverse: Any, codes: Any, levels: Any, gaps: Any, is_even: Any, dither: Any, P: Any
) -> None:
    """One of the two neighbours of each value times inverse, at random."""
    half = P // 2
    for j in range(len(value)):
        q = value[j] * inverse
        low = _below(levels, gaps, q) if is_even else min(max(_count(levels, q) - 1, 0), len(levels) - 2)
        d = mix32(np.uint32(np.uint32(j if j < half else j - half) + dither[0]))
        u = unit_dither(d if j < half else np.uint32(d >> np.uint32(16)), dither[1])
        codes[j] = np.uint8(low + (1 if (q - levels[low]) * gaps[low] > u else 0))


@inline
def _inverse(absmax: Any) -> Any:
    """1 / absmax; of zero, where Numba would raise, and of NaN anything: such a block has no use for it."""
    return np.float32(1) / absmax if absmax > np.float32(0) else np.float32(0)


@inline
def _sums_of_one(
    value_at: Any, inverse: Any, levels: Any, middles: Any, stretches: Any, norms: Any, L: Any
) -> None:
    """`multiplier_sums` of one block, without lanes."""
    value = f32_at(value_at, L)
    for m in range(len(stretches)):
        stretch, inner, norm = stretches[m], np.float32(0), np.float32(0)
        for j in range(L):
            y = value[j] * inverse
            c = levels[_count(middles, y * stretch)]
            inner += c * y
            norm += c * c
        stretches[m], norms[m] = inner, norm


@inline
def _mse(
    value_at: Any, absmax: Any, factors: Any, winners: Any, tables: Any, at: Any, multipliers: Any, L: Any
) -> None:
    """For each block the factor of absmax, and the stretch that wins."""
    levels, middles = tables
    levels_at, middles_at, sums_at = at
    top, number = levels[len(levels) - 1], len(multipliers)
    sums, norms = f32_at(sums_at, LANES), f32_at(sums_at + 4 * LANES, LANES)
    in_lanes = len(levels) <= IN_A_REGISTER
    together = _PAIR if in_lanes else 1
    for i in range(0, len(absmax), together):
        last = min(i + together, len(absmax)) - 1
        for k in range(LANES):
            sums[k] = np.float32(1)
        for m in range(number):
            sums[m] = sums[m + 8 * (together - 1)] = top / multipliers[m]
        inverses = (_inverse(absmax[i]), _inverse(absmax[last]))
        if in_lanes:
            pair_at = (value_at + 4 * i * L, value_at + 4 * last * L)
            multiplier_sums(pair_at, inverses, levels_at, middles_at, sums_at, L)
        else:
            _sums_of_one(value_at + 4 * i * L, inverses[0], levels, middles, sums[:number], norms[:number], L)
        for b in range(i, last + 1):
            best, lane = np.float32(-1), 8 * (b - i)
            for m in range(number):
                inner, norm = sums[lane + m], norms[lane + m]
                ratio = inner / norm if norm > np.float32(0) else np.float32(0)
                score = inner * ratio
                if score > best:
                    best, factors[b], winners[b] = score, ratio, top / multipliers[m]


@inline
def _term(v: Any, inverse: Any, squared: Any) -> Any:
    y = v * inverse
    return y * y if squared else abs(y)


@inline
def _totals(value_at: Any, absmax: Any, totals: Any, squared: Any, L: Any) -> None:
    """The sum of |x / absmax|, or of its squares, of each block; four blocks side by side."""
    count = len(absmax)
    for i in range(0, count, 4):
        j1, j2, j3 = min(i + 1, count - 1), min(i + 2, count - 1), min(i + 3, count - 1)
        a, b = f32_at(value_at + 4 * i * L, L), f32_at(value_at + 4 * j1 * L, L)
        c, d = f32_at(value_at + 4 * j2 * L, L), f32_at(value_at + 4 * j3 * L, L)
        by_a, by_b = _inverse(absmax[i]), _inverse(absmax[j1])
        by_c, by_d = _inverse(absmax[j2]), _inverse(absmax[j3])
        sum_a = sum_b = sum_c = sum_d = np.float32(0)
        for j in range(L):
            sum_a += _term(a[j], by_a, squared)
            sum_b += _term(b[j], by_b, squared)
            sum_c += _term(c[j], by_c, squared)
            sum_d += _term(d[j], by_d, squared)
        totals[j3], totals[j2], totals[j1], totals[i] = sum_d, sum_c, sum_b, sum_a


@inline
def _scales(
    value_at: Any,
    absmax: Any,
    scales: Any,
    winners: Any,
    rule: Any,
    tables: Any,
    at: Any,
    multipliers: Any,
    L: Any,
) -> None:
    """The scales of blocks before they are rounded."""
    top = tables[0][len(tables[0]) - 1]
    if rule == 1 or rule == 2:
        _totals(value_at, absmax, scales, rule == 2, L)
    elif rule == 3:
        _mse(value_at, absmax, scales, winners, tables, at, multipliers, L)
    for i in range(len(absmax)):
        bits = as_bits(absmax[i])
        if bits >= np.uint32(0x7F800000):
            scales[i] = np.float32(np.nan)
        elif bits < np.uint32(0x800000):
            scales[i] = np.float32(0)
        elif rule == 0:
            scales[i] = absmax[i] / top
        elif rule == 1:
            scales[i] = absmax[i] * (scales[i] / np.float32(L))
        elif rule == 2:
            scales[i] = absmax[i] * np.float32(np.sqrt(scales[i]))
        else:
            scales[i] = absmax[i] * scales[i]


@inline
def _floats(value_at: Any, inverse: Any, codes_at: Any, how: Any, dither: Any, M: Any, L: Any) -> None:
    """Codes of levels that are floats of M bits of mantissa; L a multiple of 8 if it is stochastic."""
    most, stochastic = how
    if stochastic:
        float_stochastic(value_at, inverse, codes_at, most, M, dither, L)
    else:
        float_nearest(value_at, inverse, codes_at, most, M, L)


@inline
def _codes(
    value_at: Any,
    factors: Any,
    codes_at: Any,
    arrays: Any,
    at: Any,
    numbers: Any,
    dither: Any,
    L: Any,
    P: Any,
) -> None:
    """The codes of a block of L elements."""
    levels, middles, gaps = arrays
    levels_at, middles_at, inner_at, gaps_at = at
    stochastic, smallest, mantissa, is_even = numbers
    inverse, floats = factors[0], (smallest, stochastic)
    if mantissa == 3 and (L == P or not stochastic):
        _floats(value_at, inverse, codes_at, floats, dither, 3, L)
    elif mantissa == 2 and (L == P or not stochastic):
        _floats(value_at, inverse, codes_at, floats, dither, 2, L)
    elif mantissa == 1 and L == 32 and not stochastic:
        float_nearest(value_at, inverse, codes_at, smallest, 1, 32)
    elif mantissa == 1 and L == 16 and not stochastic:
        float_nearest(value_at, inverse, codes_at, smallest, 1, 16)
    elif stochastic:
        done, tables_at = False, (levels_at, inner_at, gaps_at)
        if L == P and len(levels) <= IN_A_REGISTER:
            done = stochastic_rows(value_at, inverse, codes_at, tables_at, dither, P)
        if not done:
            value, codes = f32_at(value_at, L), u8_at(codes_at, P)
            _stochastic(value, inverse, codes, levels, gaps, is_even, dither, P)
    else:
        _nearest(value_at, factors, codes_at, middles, middles_at, L)


@inline
def _scale(scale: Any, kind: Any, up: Any, top: Any, wire_at: Any, size: Any) -> Any:
    """Write a scale; its value there."""
    bits = _scale_bits(scale, kind, up)
    value = _scale_value(bits, kind)
    if not value * top < np.float32(np.inf):
        bits = _scale_bits(np.float32(np.nan), kind, up)
        value = np.float32(np.nan)
    wire = u8_at(wire_at, size)
    for k in range(size):
        wire[k] = np.uint8(bits >> np.uint32(8 * k))
    return value


@inline
def _lost(at: Any, codes_at: Any, levels: Any, scale: Any, rescale: Any, L: Any) -> None:
    """The new residual of a block."""
    value_at, residual_at, new_residual_at = at
    value, residual, new = f32_at(value_at, L), f32_at(residual_at, L), f32_at(new_residual_at, L)
    codes = u8_at(codes_at, L)
    if scale != scale:
        for j in range(L):
            new[j] = residual[j]
    else:
        for j in range(L):
            new[j] = (value[j] - levels[codes[j]] * scale) * rescale


@functools.cache
def _encoder(num_bits: int) -> Any:
    """The kernel for codes of a width."""
    pack: Any = packing(num_bits, 0)[0] if num_bits < 8 else None

    @variant(f"{num_bits}")
    def encode(
        tensors_at: Any,
        n: int,
        levels: Any,
        middles: Any,
        gaps: Any,
        registers: Any,
        numbers: Any,
        multipliers: Any,
        draws: Any,
        loss_scale: float,
    ) -> None:
        x_at, payload_at, residual_at, new_residual_at = tensors_at
        key_low, key_high, shift, first_block = draws
        block_size, _, kind, rule, stochastic, smallest, mantissa, is_even = numbers
        together = max(_TOGETHER // block_size, 1)
        memory = np.empty(together * (5 * block_size + 12) + 8 * LANES + 256, np.uint8)
        values_at = aligned(memory.ctypes.data)
        scratch_at = aligned(values_at + 4 * together * block_size)
        sums_at = aligned(scratch_at + together * block_size)
        absmax_at = sums_at + 8 * LANES
        levels_at = registers.ctypes.data
        at = (levels_at, levels_at + 64, levels_at + 128, levels_at + 192)
        at_sums, arrays = (levels_at, levels_at + 64, sums_at), (levels, middles, gaps)
        top, unscale = levels[len(levels) - 1], np.float32(loss_scale)
        rescale = np.float32(1.0 / loss_scale)
        size = 2 if kind == 0 else 1
        num_blocks = (n + block_size - 1) // block_size
        packed_at = payload_at + num_blocks * size
        block = 0
        while block < num_blocks:
            count, L = next_blocks(n - block * block_size, block_size, together)
            P = (L + 7) // 8 * 8
            first_at = 4 * block * block_size
            absmax, scales = f32_at(absmax_at, count), f32_at(absmax_at + 4 * together, count)
            winners = f32_at(absmax_at + 8 * together, count)
            for i in range(count):
                from_at, old_at = x_at + first_at + 4 * i * L, residual_at + first_at + 4 * i * L
                if residual_at != 0:
                    absmax[i] = load_sum(from_at, old_at, values_at + 4 * i * L, unscale, L, L)
                else:
                    absmax[i] = load_copy(from_at, values_at + 4 * i * L, L, L)
            _scales(values_at, absmax, scales, winners, rule, (levels, middles), at_sums, multipliers, L)
            codes_at = packed_at if num_bits == 8 else scratch_at
            for i in range(count):
                wire_at = payload_at + (block + i) * size
                scale = scales[i] = _scale(scales[i], kind, rule == 0 or rule == 2, top, wire_at, size)
                codes, coded = u8_at(codes_at + i * P, P), 0
                if scale > np.float32(0):
                    coded, factors = L, (np.float32(1) / scale, np.float32(1))
                    if rule == 3:
                        factors = (_inverse(absmax[i]), winners[i])
                    key = np.uint32(np.uint32(first_block) + np.uint32(block + i))
                    key = np.uint32(mix32(key ^ np.uint32(key_low)) + np.uint32(key_high))
                    how, dither = (stochastic, smallest, mantissa, is_even), (key, np.uint32(shift))
                    _codes(values_at + 4 * i * L, factors, codes_at + i * P, arrays, at, how, dither, L, P)
                for j in range(coded, P):
                    codes[j] = np.uint8(smallest)
            for i in range(count):
                if num_bits == 4 and P < 64 and P % 16 == 0:
                    pack_few(codes_at + i * P, packed_at, P)
                elif num_bits < 8:
                    pack(codes_at + i * P, packed_at, P)
                packed_at += P * num_bits // 8
            if new_residual_at != 0:
                for i in range(count):
                    more = first_at + 4 * i * L
                    here = (values_at + 4 * i * L, residual_at + more, new_residual_at + more)
                    _lost(here, codes_at + i * P, levels, scales[i], rescale, L)
            block += count
        keep(memory)

    return encode


@inline
def _add_block(
    codes_at: Any, bits: Any, kind: Any, levels: Any, registers: Any, out_at: Any, first: Any, L: Any
) -> None:
    """The values of a block, or these added to what is there."""
    scale, done = _scale_value(bits, kind), 0
    if len(levels) <= IN_A_REGISTER:
        done = decode_rows(codes_at, scale, registers.ctypes.data, out_at, first, L)
    codes, out = u8_at(codes_at + done, L - done), f32_at(out_at + 4 * done, L - done)
    if first:
        for j in range(L - done):
            out[j] = levels[codes[j]] * scale
    else:
        for j in range(L - done):
            out[j] += levels[codes[j]] * scale


@functools.cache
def _decoder(num_bits: int) -> Any:
    """The kernel for codes of a width."""
    unpack: Any = packing(num_bits, 0)[1] if num_bits < 8 else None

    @variant(f"{num_bits}")
    def decode_mean(
        payloads_at: int, rows: Any, out_at: int, n: int, levels: Any, registers: Any, numbers: Any
    ) -> None:
        """Decode is the mean of one row."""
        num_rows, row_stride = rows
        block_size, _, kind, _, _, _, _, _ = numbers
        together = max(_TOGETHER // block_size, 1)
        memory = np.empty(together * block_size + 64, np.uint8)
        scratch_at = aligned(memory.ctypes.data)
        size = 2 if kind == 0 else 1
        divisor = np.float32(num_rows)
        num_blocks = (n + block_size - 1) // block_size
        first_at = payloads_at + num_blocks * size
        block = 0
        while block < num_blocks:
            count, L = next_blocks(n - block * block_size, block_size, together)
            P = (L + 7) // 8 * 8
            for row in range(num_rows):
                packed_at, codes_at = first_at + row * row_stride, scratch_at
                if num_bits == 8:
                    codes_at = packed_at
                elif num_bits == 4 and P < 64 and P % 16 == 0:
                    for i in range(count):
                        unpack_few(packed_at + i * P // 2, codes_at + i * P, P)
                else:
                    for i in range(count):
                        unpack(packed_at + i * P * num_bits // 8, codes_at + i * P, P)
                for i in range(count):
                    wire, bits = (
                        u8_at(payloads_at + row * row_stride + (block + i) * size, size),
                        np.uint32(0),
                    )
                    for k in range(size):
                        bits = np.uint32(bits | (np.uint32(wire[k]) << np.uint32(8 * k)))
                    _add_block(
                        codes_at + i * P, bits, kind, levels, registers, out_at + 4 * i * L, row == 0, L
                    )
            if num_rows > 1:
                out = f32_at(out_at, count * L)
                for j in range(count * L):
                    out[j] /= divisor
            out_at += 4 * count * L
            first_at += count * P * num_bits // 8
            block += count
        keep(memory)

    return decode_mean


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
    n, constants = x.numel(), _constants(table)
    residual_at = 0 if residual is None else address(residual, torch.float32, n)
    new_at = 0 if new_residual is None else address(new_residual, torch.float32, n)
    at = address(x, torch.float32, n), address(payload, torch.uint8, payload_bytes(n, table))
    draws = key & _MASK32, (key >> 32) & _MASK32, shift, first_block & _MASK32
    _encoder(table.num_bits)(
        (*at, residual_at, new_at), n, *constants, _MULTIPLIERS, draws, float(loss_scale)
    )


def table_decode(payload: Tensor, out: Tensor, *, table: Table) -> None:
    """Decode one segment into out."""
    table_decode_mean(payload[None], out, table=table)


def table_decode_mean(payloads: Tensor, out: Tensor, *, table: Table) -> None:
    """Mean over the W rows of payloads, added in row order in fp32, divided once."""
    n = out.numel()
    _, _, _, registers, numbers = _constants(table)
    levels = _level_of_each_code(table)
    payloads_at, rows = row_addresses(payloads, payload_bytes(n, table))
    _decoder(table.num_bits)(payloads_at, rows, address(out, torch.float32, n), n, levels, registers, numbers)
