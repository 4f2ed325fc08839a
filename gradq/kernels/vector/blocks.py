"""Blocks of 16 rows: the Hadamard transform, with what is done before and after it, in registers.

The transform of 16 rows takes 64 additions; to read and to write them takes as long. So a row is loaded,
prepared, transformed, used and stored once. The instructions are spelled out, in an order that keeps few rows
alive; one that the compiler chose lost registers.

Rows of `LANES` numbers at addresses, strides in bytes; `ones` is a row of ones that the compiler cannot see
through. Rows of a block that belong together in memory are 64 bytes apart (16 columns).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import types

from gradq.kernels.vector.ir import (
    BYTES,
    FLOATS,
    HAS_FMA,
    HAS_LOOKUP,
    INTS,
    LANES,
    ROW,
    VOID,
    WORDS,
    fused,
    larger,
    load,
    lookup,
    operation,
    smaller,
    store,
    stream,
)

__all__ = [
    "add_block",
    "code_of",
    "decode_block",
    "divide_block",
    "finish_block",
    "finish_block_streamed",
    "hadamard_rows",
    "level_computed",
    "level_looked_up",
    "levels_block_of_4",
    "levels_block_of_fewer",
    "levels_block_of_more",
    "quantize_block_of_4",
    "quantize_block_of_fewer",
    "quantize_block_of_more",
    "start_block",
    "start_block_with_residual",
    "stream_block",
]

_AHEAD = 4  # rows quantized side by side: chains of 12 operations in a row would fill the schedulers
_STEP = 4 * LANES  # bytes from row to row where nothing stands between them


def _transform(builder: Any, ones: Any, row: Callable[[int], Any], put: Callable[[int, Any], None]) -> None:
    """Unnormalized, distances 1, 2, 4, 8. Halves before the whole, and `put` as soon as there is something.

    Rows are asked for in their order, results come in pairs: 0 and 8, 1 and 9, ... a - b is a - 1 * b,
    rounded once: the same number, from the units that multiply, which would be idle.
    """

    def transformed(first: int, count: int) -> list[Any]:
        if count == 1:
            return [row(first)]
        half = count // 2
        low, high = transformed(first, half), transformed(first + half, half)
        sums, differences = [], []
        for k, (a, b) in enumerate(zip(low, high, strict=True)):
            sums.append(builder.fadd(a, b))
            differences.append(fused(builder, builder.fneg(b), ones, a) if HAS_FMA else builder.fsub(a, b))
            if count == 16:
                put(k, sums[k])
                put(k + half, differences[k])
        return sums + differences

    transformed(0, 16)


def _at(builder: Any, base: Any, offset: int) -> Any:
    return builder.add(base, ir.Constant(base.type, offset))


def _row_at(builder: Any, base: Any, offset: int) -> Any:
    return load(builder, _at(builder, base, offset))


def _flip(builder: Any, value: Any, word: Any, k: int) -> Any:
    """A row with the signs that bit k of the words says."""
    bits = builder.shl(word, ir.Constant(INTS, [31 - k] * LANES))
    bits = builder.and_(bits, ir.Constant(INTS, [0x80000000] * LANES))
    return builder.bitcast(builder.xor(builder.bitcast(value, INTS), bits), FLOATS)


# --- transform alone -----------------------------------------------------------------------------------


def _hadamard(builder: Any, source: Any, stride: Any, target: Any, target_stride: Any, ones: Any) -> Any:
    def place(base: Any, step: Any, k: int) -> Any:
        return builder.add(base, builder.mul(step, ir.Constant(step.type, k)))

    _transform(
        builder,
        ones,
        lambda k: load(builder, place(source, stride, k)),
        lambda k, value: store(builder, place(target, target_stride, k), value),
    )
    return VOID


# (from, its stride, to, its stride, ones)
hadamard_rows = operation(types.int64, _hadamard, *[types.intp] * 4, ROW)


# --- encode --------------------------------------------------------------------------------------------


def _start(with_residual: bool) -> Callable[..., Any]:
    def emit(builder: Any, x_at: Any, residual_at: Any, *others: Any) -> Any:
        loss, word, sums_at, to_at, ones = others
        sums = [ir.Constant(FLOATS, [0.0] * LANES)] * 4

        def row(k: int) -> Any:
            value = _row_at(builder, x_at, 64 * k)
            if with_residual:
                value = builder.fadd(value, builder.fmul(_row_at(builder, residual_at, 64 * k), loss))
            value = _flip(builder, value, word, k)
            sums[k % 4] = fused(builder, value, value, sums[k % 4])
            return value

        _transform(builder, ones, row, lambda k, value: store(builder, _at(builder, to_at, 64 * k), value))
        pairs = builder.fadd(sums[0], sums[1]), builder.fadd(sums[2], sums[3])
        store(builder, sums_at, builder.fadd(*pairs))
        return VOID

    return emit


# (x, residual, what it is multiplied by, words of signs, where the sum of squares goes, where the transformed
# rows go, ones): x (+ residual) with its signs, squared and added, and transformed
_START = [types.intp, types.intp, ROW, WORDS, types.intp, types.intp, ROW]
start_block = operation(types.int64, _start(False), *_START)
start_block_with_residual = operation(types.int64, _start(True), *_START)


def _polynomial(builder: Any, code: Any, quantizer_at: Any) -> Any:
    middle, a0, a1, a2, a3 = (_row_at(builder, quantizer_at, 64 * k) for k in range(7, 12))
    m = builder.fsub(builder.sitofp(code, FLOATS), middle)
    m2 = builder.fmul(m, m)
    inner = fused(builder, m2, fused(builder, m2, fused(builder, m2, a3, a2), a1), a0)
    return builder.fmul(m, inner)


def _level(builder: Any, code: Any, quantizer_at: Any, use_table: bool) -> Any:
    if not (use_table and HAS_LOOKUP):
        return _polynomial(builder, code, quantizer_at)
    high_at = 64 * 13 - 4 * LANES
    table = _row_at(builder, quantizer_at, 64 * 12), _row_at(builder, quantizer_at, high_at)
    return lookup(builder, *table, code)


def _constants(builder: Any, quantizer_at: Any) -> list[Any]:
    """What `_codes` needs of what `rotated.cpu_rows.store_quantizer` stored."""
    return [_row_at(builder, quantizer_at, 64 * k) for k in range(7)]


def _codes(builder: Any, zs: Sequence[Any], inverse: Any, constants: Sequence[Any]) -> list[Any]:
    """Codes of rows, all of them a step further at a time."""
    bottom, top, k0, k1, k2, k3, half = constants
    ys = [builder.fmul(z, inverse) for z in zs]
    ys = [smaller(builder, larger(builder, y, bottom), top) for y in ys]
    squares = [builder.fmul(y, y) for y in ys]
    found = [fused(builder, y2, k3, k2) for y2 in squares]
    for k in (k1, k0):
        found = [fused(builder, y2, f, k) for y2, f in zip(squares, found, strict=True)]
    found = [fused(builder, y, f, half) for y, f in zip(ys, found, strict=True)]
    return [builder.fptosi(f, INTS) for f in found]


# code_of(row, 1 / σ, the quantizer's constants), and the level of a code by table (of 16, where the machine
# can) or computed: for what is done with single rows
code_of = operation(
    WORDS,
    lambda builder, z, inverse, at: _codes(builder, [z], inverse, _constants(builder, at))[0],
    ROW,
    ROW,
    types.intp,
)
level_looked_up = operation(ROW, lambda builder, code, at: _level(builder, code, at, True), WORDS, types.intp)
level_computed = operation(ROW, _polynomial, WORDS, types.intp)


def _quantize(pack_four: bool, use_table: bool) -> Callable[..., Any]:
    def emit(
        builder: Any, z_at: Any, near_at: Any, inverse: Any, quantizer_at: Any, codes_at: Any, ones: Any
    ) -> Any:
        constants = _constants(builder, quantizer_at)
        waiting: dict[int, Any] = {}

        def put(k: int, z: Any) -> None:
            store(builder, _at(builder, near_at, _STEP * k), z)
            waiting[k] = z
            if len(waiting) == _AHEAD:
                quantize()
                waiting.clear()

        def quantize() -> None:
            ks, codes = list(waiting), _codes(builder, list(waiting.values()), inverse, constants)
            levels = [_level(builder, code, quantizer_at, use_table) for code in codes]
            for k, level in zip(ks, levels, strict=True):
                store(builder, _at(builder, near_at, _STEP * (16 + k)), level)
            if not pack_four:
                for k, code in zip(ks, codes, strict=True):
                    store(builder, _at(builder, codes_at, 256 * k), code, BYTES)
                return
            for k, low, high in zip(ks[::2], codes[::2], codes[1::2], strict=True):
                four = builder.shl(high, ir.Constant(INTS, [4] * LANES))
                store(builder, _at(builder, codes_at, 256 * k), builder.or_(low, four), BYTES)

        _transform(builder, ones, lambda k: _row_at(builder, z_at, 1024 * k), put)
        return VOID

    return emit


# (rows 1024 bytes apart, where transformed rows and, 16 rows further, their levels go, 1 / σ, the quantizer's
# constants, codes 256 bytes apart, ones). Of 4 bits two codes share a byte; of fewer the levels are looked up
# too; of more they are computed.
_QUANTIZE = [types.intp, types.intp, ROW, types.intp, types.intp, ROW]
quantize_block_of_4 = operation(types.int64, _quantize(True, True), *_QUANTIZE)
quantize_block_of_fewer = operation(types.int64, _quantize(False, True), *_QUANTIZE)
quantize_block_of_more = operation(types.int64, _quantize(False, False), *_QUANTIZE)


def _finish(streamed: bool) -> Callable[..., Any]:
    write = stream if streamed else store

    def emit(builder: Any, z_at: Any, x_at: Any, residual_at: Any, *others: Any) -> Any:
        loss, scale, word, factor, new_at, ones = others

        def put(k: int, value: Any) -> None:
            decoded = _flip(builder, builder.fmul(value, scale), word, k)
            lost = builder.fmul(_row_at(builder, residual_at, 64 * k), loss)
            lost = builder.fsub(builder.fadd(_row_at(builder, x_at, 64 * k), lost), decoded)
            write(builder, _at(builder, new_at, 64 * k), builder.fmul(lost, factor))

        _transform(builder, ones, lambda k: _row_at(builder, z_at, 64 * k), put)
        return VOID

    return emit


# (rows, x, residual, what it is multiplied by, scale, words of signs, factor, the new residual, ones):
# what is lost of x + residual, times factor
_FINISH = [types.intp] * 3 + [ROW, ROW, WORDS, ROW, types.intp, ROW]
finish_block = operation(types.int64, _finish(False), *_FINISH)
finish_block_streamed = operation(types.int64, _finish(True), *_FINISH)


# --- decode --------------------------------------------------------------------------------------------


def _levels(packed_four: bool, use_table: bool) -> Callable[..., Any]:
    def emit(builder: Any, codes_at: Any, quantizer_at: Any, to_at: Any, ones: Any) -> Any:
        def row(k: int) -> Any:
            if not packed_four:
                code = load(builder, _at(builder, codes_at, 256 * k), BYTES)
            else:
                code = load(builder, _at(builder, codes_at, 256 * (k % 8)), BYTES)
                four, low = (ir.Constant(INTS, [number] * LANES) for number in (4, 15))
                code = builder.and_(code, low) if k < 8 else builder.lshr(code, four)
            return _level(builder, code, quantizer_at, use_table)

        _transform(builder, ones, row, lambda k, value: store(builder, _at(builder, to_at, 1024 * k), value))
        return VOID

    return emit


# (codes 256 bytes apart, the quantizer's constants, where the transformed levels go, 1024 bytes apart, ones)
_LEVELS = [types.intp] * 3 + [ROW]
levels_block_of_4 = operation(types.int64, _levels(True, True), *_LEVELS)
levels_block_of_fewer = operation(types.int64, _levels(False, True), *_LEVELS)
levels_block_of_more = operation(types.int64, _levels(False, False), *_LEVELS)


def _decode(add: bool, divide: bool, streamed: bool) -> Callable[..., Any]:
    write = stream if streamed else store

    def emit(builder: Any, z_at: Any, scale: Any, word: Any, divisor: Any, out_at: Any, ones: Any) -> Any:
        def put(k: int, value: Any) -> None:
            to_at = _at(builder, out_at, 64 * k)
            value = _flip(builder, builder.fmul(value, scale), word, k)
            if add:
                value = builder.fadd(load(builder, to_at), value)
            if divide:
                value = builder.fdiv(value, divisor)
            write(builder, to_at, value)

        _transform(builder, ones, lambda k: _row_at(builder, z_at, 64 * k), put)
        return VOID

    return emit


# (rows, scale, words of signs, divisor, out, ones): decoded values to out, past the cache, onto what is
# there, or that divided
_DECODE = [types.intp, ROW, WORDS, ROW, types.intp, ROW]
decode_block = operation(types.int64, _decode(False, False, False), *_DECODE)
stream_block = operation(types.int64, _decode(False, False, True), *_DECODE)
add_block = operation(types.int64, _decode(True, False, False), *_DECODE)
divide_block = operation(types.int64, _decode(True, True, False), *_DECODE)
