"""Rows: vectors of numbers as values in Numba code, for kernels that a loop vectorizer does not get right.

`Row` holds `LANES` fp32 numbers, `Words` as many unsigned 32-bit integers: 16 where a register holds them
(AVX-512), else 8 (one register of AVX2, two of NEON); more would be kept in memory by the compiler. Operators
round each element as scalar code would, in the order in which they are written, so results equal those of
plain loops bit for bit, whatever `LANES` is.

Rows are read and written at addresses (`array.ctypes.data`), in bytes; nothing is checked.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

__all__ = [
    "HAS_LOOKUP",
    "LANES",
    "as_row",
    "as_words",
    "constant_row",
    "constant_words",
    "fused",
    "hadamard_rows",
    "lane_numbers",
    "load_bytes",
    "load_row",
    "load_words",
    "lookup",
    "mask_at_least",
    "maximum",
    "maximum_words",
    "minimum",
    "prefetch",
    "prefetch_to_write",
    "select_less",
    "square_root",
    "store_bytes",
    "store_row",
    "store_words",
    "stream_row",
    "to_float",
    "to_int",
    "trailing_zeros",
]

_FEATURES = binding.get_host_cpu_features()
LANES = 16 if _FEATURES.get("avx512f") else 8
HAS_LOOKUP = bool(_FEATURES.get("avx512f") or _FEATURES.get("avx2"))  # whether there is `lookup`
_HAS_FMA = bool(_FEATURES.get("fma"))

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_VOID = ir.Constant(ir.IntType(64), 0)


class _Row(types.Type):
    pass


class _Words(types.Type):
    pass


_declare: Any = cgutils.get_or_insert_function
_row, _words = _Row("Row"), _Words("Words")


@register_model(_Row)
class _RowModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        cast(Any, super()).__init__(dmm, fe_type, _FLOATS)


@register_model(_Words)
class _WordsModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        cast(Any, super()).__init__(dmm, fe_type, _INTS)


def _operation(result: Any, emit: Callable[..., Any], *operands: Any) -> Any:
    """An intrinsic of fixed types; emit(builder, *values) gives its value.

    Its parameters are spelled out because Numba reads the signature.
    """

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return emit(builder, *args)

    def one(_typing: Any, a: Any) -> Any:
        return result(*operands), generate

    def two(_typing: Any, a: Any, b: Any) -> Any:
        return result(*operands), generate

    def three(_typing: Any, a: Any, b: Any, c: Any) -> Any:
        return result(*operands), generate

    def four(_typing: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        return result(*operands), generate

    def five(_typing: Any, a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
        return result(*operands), generate

    return intrinsic(cast(Any, (one, two, three, four, five)[len(operands) - 1]))


def _loader(kind: Any, result: Any, widen: bool = False) -> Any:
    def emit(builder: Any, at: Any) -> Any:
        value = builder.load(builder.inttoptr(at, kind.as_pointer()), align=1 if widen else 4)
        return builder.zext(value, _INTS) if widen else value

    return _operation(result, emit, types.intp)


def _storer(kind: Any, operand: Any, narrow: bool = False) -> Any:
    def emit(builder: Any, at: Any, value: Any) -> Any:
        value = builder.trunc(value, _BYTES) if narrow else value
        builder.store(value, builder.inttoptr(at, kind.as_pointer()), align=1 if narrow else 4)
        return _VOID

    return _operation(types.int64, emit, types.intp, operand)


def _stream(builder: Any, at: Any, value: Any) -> Any:
    store = builder.store(value, builder.inttoptr(at, _FLOATS.as_pointer()), align=4 * LANES)
    store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
    return _VOID


def _splat(kind: Any) -> Callable[..., Any]:
    def emit(builder: Any, scalar: Any) -> Any:
        first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.IntType(32)(0))
        mask = ir.Constant(_INTS, [0] * LANES)
        return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), mask)

    return emit


def _fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    return builder.call(_declare(builder.module, kind, f"llvm.fma.v{LANES}f32"), [a, b, c])


def _hadamard(builder: Any, source: Any, stride: Any, target: Any, target_stride: Any, one: Any) -> Any:
    """Halves before the whole, and a store as soon as there is something to store: few rows are alive.

    a - b is a - 1 * b, rounded once: the same number, from the units that multiply, which would be idle.
    """

    def pointer(base: Any, step: Any, k: int) -> Any:
        offset = builder.mul(step, ir.Constant(step.type, k))
        return builder.inttoptr(builder.add(base, offset), _FLOATS.as_pointer())

    def transform(first: int, count: int) -> list[Any]:
        if count == 1:
            return [builder.load(pointer(source, stride, first), align=4)]
        half = count // 2
        low, high = transform(first, half), transform(first + half, half)
        pairs = list(zip(low, high, strict=True))
        sums, differences = [], []
        for k, (a, b) in enumerate(pairs):
            sums.append(builder.fadd(a, b))
            differences.append(_fused(builder, builder.fneg(b), one, a) if _HAS_FMA else builder.fsub(a, b))
            if count == 16:
                builder.store(sums[k], pointer(target, target_stride, k), align=4)
                builder.store(differences[k], pointer(target, target_stride, k + half), align=4)
        return sums + differences

    transform(0, 16)
    return _VOID


def _prefetch(for_writing: bool) -> Callable[..., Any]:
    """Ask for a cache line, into the second level: a hint, harmless at any address."""

    def emit(builder: Any, at: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = _declare(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(
            function, [builder.inttoptr(at, pointer), number(int(for_writing)), number(2), number(1)]
        )
        return _VOID

    return emit


def _square_root(builder: Any, a: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS])
    return builder.call(_declare(builder.module, kind, f"llvm.sqrt.v{LANES}f32"), [a])


def _lookup(builder: Any, low: Any, high: Any, index: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS, _INTS])
    if LANES == 16:
        function = _declare(builder.module, kind, "llvm.x86.avx512.permvar.sf.512")
        return builder.call(function, [low, index])
    function = _declare(builder.module, kind, "llvm.x86.avx2.permps")  # of an index it reads three bits
    eighth = builder.shl(index, ir.Constant(_INTS, [28] * LANES))
    is_high = builder.icmp_signed("<", eighth, ir.Constant(_INTS, [0] * LANES))
    return builder.select(
        is_high, builder.call(function, [high, index]), builder.call(function, [low, index])
    )


def _mask_at_least(builder: Any, a: Any, b: Any) -> Any:
    ones = builder.bitcast(builder.icmp_unsigned(">=", a, b), ir.IntType(LANES))
    return builder.zext(ones, ir.IntType(64))


def _trailing_zeros(builder: Any, a: Any) -> Any:
    return builder.cttz(a, ir.IntType(1)(0))


def _smaller(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


load_row = _loader(_FLOATS, _row)
load_words = _loader(_INTS, _words)
load_bytes = _loader(_BYTES, _words, widen=True)
store_row = _storer(_FLOATS, _row)
# past the cache, to a multiple of 4 LANES bytes; not ordered with other writes without `numba_tools.fence()`
stream_row = _operation(types.int64, _stream, types.intp, _row)
store_words = _storer(_INTS, _words)
store_bytes = _storer(_BYTES, _words, narrow=True)
constant_row = _operation(_row, _splat(_FLOATS), types.float32)
constant_words = _operation(_words, _splat(_INTS), types.uint32)
# lane_numbers(first): first, first + 1, ... first + LANES - 1
lane_numbers = _operation(
    _words,
    lambda builder, first: builder.add(_splat(_INTS)(builder, first), ir.Constant(_INTS, list(range(LANES)))),
    types.uint32,
)
as_words = _operation(_words, lambda builder, a: builder.bitcast(a, _INTS), _row)
as_row = _operation(_row, lambda builder, a: builder.bitcast(a, _FLOATS), _words)
to_int = _operation(_words, lambda builder, a: builder.fptosi(a, _INTS), _row)
to_float = _operation(_row, lambda builder, a: builder.sitofp(a, _FLOATS), _words)
prefetch = _operation(types.int64, _prefetch(False), types.intp)
prefetch_to_write = _operation(types.int64, _prefetch(True), types.intp)
square_root = _operation(_row, _square_root, _row)
fused = _operation(_row, _fused, _row, _row, _row)  # a b + c, rounded once
# lookup(low, high, index): table[index], index < 16; only where HAS_LOOKUP. The table's first LANES
# entries are low; high holds entries 8 to 15 where LANES is 8, and is not read where it is 16.
lookup = _operation(_row, _lookup, _row, _row, _words)
# bit j of the result: whether a[j] >= b[j]
mask_at_least = _operation(types.int64, _mask_at_least, _words, _words)
trailing_zeros = _operation(types.int64, _trailing_zeros, types.int64)  # zeros below the lowest one; 64 of 0
minimum = _operation(_row, _smaller, _row, _row)
maximum = _operation(_row, _larger, _row, _row)
maximum_words = _operation(
    _words, lambda builder, a, b: builder.select(builder.icmp_unsigned(">", a, b), a, b), _words, _words
)
# select_less(a, b, c, d): c where a < b, else d
select_less = _operation(
    _row,
    lambda builder, a, b, c, d: builder.select(builder.fcmp_ordered("<", a, b), c, d),
    _row,
    _row,
    _row,
    _row,
)
# the unnormalized transform of 16 rows, distances 1, 2, 4, 8: (from, its stride in bytes, to, its stride,
# a row of ones: loaded ones make it faster, see `_hadamard`; the compiler sees through constant ones)
hadamard_rows = _operation(types.int64, _hadamard, *[types.intp] * 4, _row)


def _operator(symbol: Any, kind: Any, method: str) -> None:
    operation = _operation(kind, lambda builder, a, b: getattr(builder, method)(a, b), kind, kind)

    def implement(a: Any, b: Any) -> Any:
        def apply(a: Any, b: Any) -> Any:
            return operation(a, b)

        return apply if a is kind and b is kind else None

    overload(symbol)(implement)


for _symbol, _method in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _operator(_symbol, _row, _method)
for _symbol, _method in (
    (operator.add, "add"),
    (operator.mul, "mul"),
    (operator.xor, "xor"),
    (operator.and_, "and_"),
    (operator.or_, "or_"),
    (operator.lshift, "shl"),
    (operator.rshift, "lshr"),
):
    _operator(_symbol, _words, _method)
