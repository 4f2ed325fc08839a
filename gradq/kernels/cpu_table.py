"""The table codecs in Numba: byte for byte what `gradq.kernels.reference_table` writes.

Levels are found by bisection; where a processor looks up in a register and there are at most 16, for many
elements at once. The rule "mse" sums from the first element to the last, so there the lanes are multipliers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradq.kernels import reference_table
from gradq.kernels.cpu_hadamard import mix_words
from gradq.kernels.numba_tools import (
    address,
    aligned,
    as_bits,
    as_float,
    f32_at,
    inline,
    jit,
    keep,
    mix32,
    pack,
    row_addresses,
    u8_at,
    unpack,
)
from gradq.kernels.tables import MULTIPLIERS, Table, payload_bytes
from gradq.kernels.vector import (
    LANES,
    as_row,
    as_words,
    constant_row,
    constant_words,
    lane_numbers,
    load_row,
    lookup,
    select_less,
    store_bytes,
    store_row,
    to_float,
)
from gradq.kernels.vector_ir import HAS_LOOKUP

__all__ = ["table_decode", "table_decode_mean", "table_encode"]

_MASK32 = 0xFFFFFFFF
_FORMATS = {"bf16": 0, "e8m0": 1, "e6m2": 2}
_RULES = {"absmax": 0, "l1": 1, "l2": 2, "mse": 3}
_MULTIPLIERS = np.array(MULTIPLIERS, np.float32)
_IN_A_REGISTER = 16 if HAS_LOOKUP else 0  # levels that can be looked up at once
assert len(MULTIPLIERS) <= LANES


@cache
def _constants(table: Table) -> tuple[Any, Any, Any, Any, Any]:
    """Levels, midpoints, 1 / gaps; the same as registers; and numbers.

    Registers, [4, 16]: levels, midpoints, levels but the first and the last, 1 / gaps; what is searched is
    filled up with Inf. Numbers: block_size, num_bits, format, rule, stochastic, smallest.
    """
    levels, middles, gaps, smallest = reference_table.constants(table)
    numbers = (table.block_size, table.num_bits, _FORMATS[table.scale_format], _RULES[table.rule])
    registers = np.full((4, 16), np.inf, np.float32)
    if len(levels) <= _IN_A_REGISTER:
        for row, values in zip(registers, (levels, middles, levels[1:-1], gaps), strict=True):
            row[: len(values)] = values.numpy()
    arrays = levels.numpy(), middles.numpy(), gaps.numpy(), registers
    return *arrays, (*numbers, int(table.stochastic), smallest)


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
    return np.int64(as_bits(np.float32(q - value)) >> np.uint32(31)) - 1


if HAS_LOOKUP:

    @inline
    def _register(at: Any) -> Any:
        """What `lookup` takes of 16 numbers at an address."""
        return load_row(at), load_row(at + 64 - 4 * LANES)

    @inline
    def _counts(q: Any, table_at: Any) -> Any:
        """`_count` for each of a row, of the 16 sorted values at table_at."""
        low, high = _register(table_at)
        count = constant_words(np.uint32(0))
        for step in (8, 4, 2, 1):
            probe = lookup(low, high, count + constant_words(np.uint32(step - 1)))
            more = count + constant_words(np.uint32(step))
            count = as_words(select_less(q, probe, as_row(count), as_row(more)))
        return count

    @inline
    def _nearest_rows(value_at: Any, factors: Any, codes_at: Any, middles_at: Any, L: Any) -> Any:
        """Codes of whole rows of values, times both factors; how many there were."""
        done = L // LANES * LANES
        first, second = constant_row(factors[0]), constant_row(factors[1])
        for j in range(0, done, LANES):
            q = load_row(value_at + 4 * j) * first * second
            store_bytes(codes_at + j, _counts(q, middles_at))
        return done

    @inline
    def _stochastic_rows(value_at: Any, inverse: Any, codes_at: Any, at: Any, dither: Any, P: Any) -> Any:
        """Codes of a block whose halves are whole rows; whether this was one."""
        levels_at, inner_at, gaps_at = at
        key, shift = constant_words(dither[0]), constant_words(dither[1])
        low_levels, high_levels = _register(levels_at)
        low_gaps, high_gaps = _register(gaps_at)
        by, half = constant_row(inverse), P // 2
        if half % LANES != 0:
            return False
        for j in range(0, half, LANES):
            word = mix_words(lane_numbers(np.uint32(j)) + key)
            for k in range(2):
                d = (
                    word & constant_words(np.uint32(0xFFFF))
                    if k == 0
                    else word >> constant_words(np.uint32(16))
                )
                d = (d + shift) & constant_words(np.uint32(0xFFFF))
                u = to_float(d) * constant_row(np.float32(2.0**-16)) + constant_row(np.float32(2.0**-17))
                e = j + k * half
                q = load_row(value_at + 4 * e) * by
                code = _counts(q, inner_at)
                level, gap = lookup(low_levels, high_levels, code), lookup(low_gaps, high_gaps, code)
                above = as_row(code + constant_words(np.uint32(1)))
                store_bytes(codes_at + e, as_words(select_less(u, (q - level) * gap, above, as_row(code))))
        return True

    @inline
    def _sums(value_at: Any, inverse: Any, levels_at: Any, middles_at: Any, sums_at: Any, L: Any) -> None:
        """<c, y> and the squared norm of c for each of the stretches at sums_at, which they replace."""
        stretch = load_row(sums_at)
        low, high = _register(levels_at)
        inner = norm = constant_row(np.float32(0))
        value = f32_at(value_at, L)
        for j in range(L):
            y = constant_row(value[j] * inverse)
            c = lookup(low, high, _counts(y * stretch, middles_at))
            inner, norm = inner + c * y, norm + c * c
        store_row(sums_at, inner)
        store_row(sums_at + 4 * LANES, norm)

else:

    @inline
    def _nearest_rows(value_at: Any, factors: Any, codes_at: Any, middles_at: Any, L: Any) -> Any:
        return 0

    @inline
    def _stochastic_rows(value_at: Any, inverse: Any, codes_at: Any, at: Any, dither: Any, P: Any) -> Any:
        return False

    @inline
    def _sums(value_at: Any, inverse: Any, levels_at: Any, middles_at: Any, sums_at: Any, L: Any) -> None:
        return


@inline
def _nearest(value_at: Any, factors: Any, codes_at: Any, middles: Any, middles_at: Any, L: Any) -> None:
    """The nearest level of each value times both factors."""
    done = 0
    if len(middles) < _IN_A_REGISTER:
        done = _nearest_rows(value_at, factors, codes_at, middles_at, L)
    value, codes = f32_at(value_at + 4 * done, L - done), u8_at(codes_at + done, L - done)
    for j in range(L - done):
        codes[j] = np.uint8(_count(middles, (value[j] * factors[0]) * factors[1]))


@inline
def _stochastic(value: Any, inverse: Any, codes: Any, levels: Any, gaps: Any, dither: Any, P: Any) -> None:
    """One of the two neighbours of each value times inverse, at random."""
    half = P // 2
    for j in range(len(value)):
        q = value[j] * inverse
        low = min(max(_count(levels, q) - 1, 0), len(levels) - 2)
        d = mix32(np.uint32(np.uint32(j if j < half else j - half) + dither[0]))
        d = np.uint32(d & np.uint32(0xFFFF)) if j < half else np.uint32(d >> np.uint32(16))
        d = np.uint32(np.uint32(d + dither[1]) & np.uint32(0xFFFF))
        u = np.float32(np.int32(d)) * np.float32(2.0**-16) + np.float32(2.0**-17)
        codes[j] = np.uint8(low + (1 if (q - levels[low]) * gaps[low] > u else 0))


@inline
def _mse(value_at: Any, inverse: Any, levels: Any, middles: Any, at: Any, multipliers: Any, L: Any) -> Any:
    """The factor of absmax, and the stretch that wins."""
    levels_at, middles_at, sums_at = at
    top, number = levels[len(levels) - 1], len(multipliers)
    sums, norms = f32_at(sums_at, LANES), f32_at(sums_at + 4 * LANES, LANES)
    for m in range(number):
        sums[m] = top / multipliers[m]
    if len(levels) <= _IN_A_REGISTER:
        _sums(value_at, inverse, levels_at, middles_at, sums_at, L)
    else:
        value = f32_at(value_at, L)
        for m in range(number):
            stretch, inner, norm = sums[m], np.float32(0), np.float32(0)
            for j in range(L):
                y = value[j] * inverse
                c = levels[_count(middles, y * stretch)]
                inner += c * y
                norm += c * c
            sums[m], norms[m] = inner, norm
    best, factor, winner = np.float32(-1), np.float32(0), np.float32(1)
    for m in range(number):
        ratio = sums[m] / norms[m] if norms[m] > np.float32(0) else np.float32(0)
        score = sums[m] * ratio
        if score > best:
            best, factor, winner = score, ratio, top / multipliers[m]
    return factor, winner


@jit
def _encode(
    x_at: int,
    n: int,
    payload_at: int,
    nbytes: int,
    levels: Any,
    middles: Any,
    gaps: Any,
    registers: Any,
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
    memory = np.empty(5 * block_size + 8 * LANES + 128, np.uint8)
    value_at = aligned(memory.ctypes.data)
    codes_at = value_at + 4 * block_size
    sums_at = aligned(codes_at + block_size)
    value_B, codes_B = f32_at(value_at, block_size), u8_at(codes_at, block_size)
    levels_at = registers.ctypes.data
    middles_at, inner_at, gaps_at = levels_at + 64, levels_at + 128, levels_at + 192
    sums_L = f32_at(sums_at, LANES)
    for k in range(LANES):
        sums_L[k] = np.float32(0)
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
                at_L = (levels_at, middles_at, sums_at)
                factor, winner = _mse(value_at, inverse, levels, middles, at_L, multipliers, L)
                _nearest(value_at, (inverse, winner), codes_at, middles, middles_at, L)
                scale = absmax * factor
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
                dither = (block_key, np.uint32(shift))
                done = False
                if L == P and len(levels) <= _IN_A_REGISTER:
                    at_P = (levels_at, inner_at, gaps_at)
                    done = _stochastic_rows(value_at, inverse, codes_at, at_P, dither, P)
                if not done:
                    _stochastic(value, inverse, codes, levels, gaps, dither, P)
            else:
                _nearest(value_at, (inverse, np.float32(1)), codes_at, middles, middles_at, L)
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
    keep(memory)


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
    levels, _, _, _, numbers = _constants(table)
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
