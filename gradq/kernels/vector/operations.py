"""Rows: vectors of numbers as values in Numba code, for kernels that a loop vectorizer does not get right.

`Row` holds `LANES` fp32 numbers, `Words` as many unsigned 32-bit integers: 16 where a register holds them
(AVX-512), else 8 (one register of AVX2, two of NEON); more would be kept in memory by the compiler. Operators
round each element as scalar code would, in the order in which they are written, so results equal those of
plain loops bit for bit, whatever `LANES` is.

Rows are read and written at addresses (`array.ctypes.data`), in bytes; nothing is checked.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import overload

from gradq.kernels.vector import ir as vector_ir
from gradq.kernels.vector.ir import BYTES, FLOATS, HALVES, INTS, LANES, ROW, WORDS, operation

__all__ = [
    "LANES",
    "as_row",
    "as_words",
    "constant_row",
    "constant_words",
    "fused",
    "lane_numbers",
    "load_bytes",
    "load_row",
    "load_words",
    "lookup",
    "lookup_pair",
    "mask_at_least",
    "maximum_words",
    "minimum",
    "prefetch",
    "prefetch_to_write",
    "select_less",
    "square_root",
    "store_bytes",
    "store_halves",
    "store_row",
    "store_words",
    "stream_row",
    "to_float",
    "to_int",
    "trailing_zeros",
]


def _mask_at_least(builder: Any, a: Any, b: Any) -> Any:
    ones = builder.bitcast(builder.icmp_unsigned(">=", a, b), ir.IntType(LANES))
    return builder.zext(ones, ir.IntType(64))


def _trailing_zeros(builder: Any, a: Any) -> Any:
    return builder.cttz(a, ir.IntType(1)(0))


def _fixed(emit: Any, *fixed: Any) -> Any:
    """An emitter with its last arguments given."""
    return lambda builder, *values: emit(builder, *values, *fixed)


load_row = operation(ROW, vector_ir.load, types.intp)
load_words = operation(WORDS, _fixed(vector_ir.load, INTS), types.intp)
load_bytes = operation(WORDS, _fixed(vector_ir.load, BYTES), types.intp)
store_row = operation(types.int64, vector_ir.store, types.intp, ROW)
# past the cache, to a multiple of 4 LANES bytes; not ordered with other writes without `numba_tools.fence()`
stream_row = operation(types.int64, vector_ir.stream, types.intp, ROW)
store_words = operation(types.int64, _fixed(vector_ir.store, INTS), types.intp, WORDS)
store_bytes = operation(types.int64, _fixed(vector_ir.store, BYTES), types.intp, WORDS)
store_halves = operation(types.int64, _fixed(vector_ir.store, HALVES), types.intp, WORDS)
constant_row = operation(ROW, vector_ir.splat, types.float32)
constant_words = operation(WORDS, vector_ir.splat, types.uint32)
# lane_numbers(first): first, first + 1, ... first + LANES - 1
lane_numbers = operation(
    WORDS,
    lambda builder, first: builder.add(
        vector_ir.splat(builder, first), ir.Constant(INTS, list(range(LANES)))
    ),
    types.uint32,
)
as_words = operation(WORDS, lambda builder, a: builder.bitcast(a, INTS), ROW)
as_row = operation(ROW, lambda builder, a: builder.bitcast(a, FLOATS), WORDS)
to_int = operation(WORDS, lambda builder, a: builder.fptosi(a, INTS), ROW)
to_float = operation(ROW, lambda builder, a: builder.sitofp(a, FLOATS), WORDS)
lookup = operation(ROW, vector_ir.lookup, ROW, ROW, WORDS)  # only where vector_ir.HAS_LOOKUP; see there
lookup_pair = operation(ROW, vector_ir.lookup_pair, ROW, ROW, WORDS)  # only where LANES is 16; see there
prefetch = operation(types.int64, vector_ir.prefetch, types.intp)
prefetch_to_write = operation(types.int64, _fixed(vector_ir.prefetch, True), types.intp)
square_root = operation(ROW, vector_ir.square_root, ROW)
fused = operation(ROW, vector_ir.fused, ROW, ROW, ROW)  # a b + c, rounded once
# bit j of the result: whether a[j] >= b[j]
mask_at_least = operation(types.int64, _mask_at_least, WORDS, WORDS)
trailing_zeros = operation(types.int64, _trailing_zeros, types.int64)  # zeros below the lowest one; 64 of 0
minimum = operation(ROW, vector_ir.smaller, ROW, ROW)
maximum_words = operation(
    WORDS, lambda builder, a, b: builder.select(builder.icmp_unsigned(">", a, b), a, b), WORDS, WORDS
)
# select_less(a, b, c, d): c where a < b, else d
select_less = operation(
    ROW,
    lambda builder, a, b, c, d: builder.select(builder.fcmp_ordered("<", a, b), c, d),
    *[ROW] * 4,
)


def _operator(symbol: Any, kind: Any, method: str) -> None:
    apply_to = operation(kind, lambda builder, a, b: getattr(builder, method)(a, b), kind, kind)

    def implement(a: Any, b: Any) -> Any:
        def apply(a: Any, b: Any) -> Any:
            return apply_to(a, b)

        return apply if a is kind and b is kind else None

    overload(symbol)(implement)


for _symbol, _method in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _operator(_symbol, ROW, _method)
for _symbol, _method in (
    (operator.add, "add"),
    (operator.mul, "mul"),
    (operator.xor, "xor"),
    (operator.and_, "and_"),
    (operator.or_, "or_"),
    (operator.lshift, "shl"),
    (operator.rshift, "lshr"),
):
    _operator(_symbol, WORDS, _method)
