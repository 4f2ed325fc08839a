"""Vectors as LLVM instructions: what `operations` and `blocks` make Numba operations of.

`emit` functions take a builder and values and return a value. Rows are `FLOATS`, words `INTS`, of `LANES`
elements each.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any, cast

from llvmlite import ir
from numba.core import cgutils, codegen, config, types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

__all__ = [
    "BYTES",
    "FLOATS",
    "HALVES",
    "HAS_FMA",
    "HAS_LOOKUP",
    "INTS",
    "LANES",
    "ROW",
    "VOID",
    "WORDS",
    "fused",
    "larger",
    "load",
    "lookup",
    "lookup_pair",
    "operation",
    "prefetch",
    "smaller",
    "splat",
    "square_root",
    "store",
    "stream",
]

# what Numba lets machine code use: NUMBA_CPU_FEATURES, else what there is (less with NUMBA_ENABLE_AVX=0)
_CHOSEN: str | None = cast(Any, config).CPU_FEATURES
_FEATURES = set((cast(Any, codegen).get_host_cpu_features() if _CHOSEN is None else _CHOSEN).split(","))
LANES = 16 if "+avx512f" in _FEATURES else 8
HAS_LOOKUP = bool({"+avx512f", "+avx2"} & _FEATURES)  # whether there is `lookup`
HAS_FMA = "+fma" in _FEATURES

FLOATS = ir.VectorType(ir.FloatType(), LANES)
INTS = ir.VectorType(ir.IntType(32), LANES)
HALVES = ir.VectorType(ir.IntType(16), LANES)
BYTES = ir.VectorType(ir.IntType(8), LANES)
_NARROW = (HALVES, BYTES)
VOID = ir.Constant(ir.IntType(64), 0)


class _Row(types.Type):
    pass


class _Words(types.Type):
    pass


_declare: Any = cgutils.get_or_insert_function
ROW, WORDS = _Row("Row"), _Words("Words")


@register_model(_Row)
class _RowModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        cast(Any, super()).__init__(dmm, fe_type, FLOATS)


@register_model(_Words)
class _WordsModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        cast(Any, super()).__init__(dmm, fe_type, INTS)


def operation(result: Any, emit: Callable[..., Any], *operands: Any) -> Any:
    """An intrinsic of fixed types; emit(builder, *values) gives its value."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return emit(builder, *args)

    def typed(_typing: Any, *_args: Any) -> Any:
        return result(*operands), generate

    names = ["typing", *(f"operand{k}" for k in range(len(operands)))]
    parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    cast(Any, typed).__signature__ = Signature(parameters)  # Numba reads it
    return intrinsic(cast(Any, typed))


def load(builder: Any, at: Any, kind: Any = FLOATS) -> Any:
    """A vector in memory; bytes and halves become words."""
    value = builder.load(builder.inttoptr(at, kind.as_pointer()), align=1 if kind in _NARROW else 4)
    return builder.zext(value, INTS) if kind in _NARROW else value


def store(builder: Any, at: Any, value: Any, kind: Any = FLOATS) -> Any:
    """Write a vector; of words as bytes or halves the lowest bits."""
    value = builder.trunc(value, kind) if kind in _NARROW else value
    builder.store(value, builder.inttoptr(at, kind.as_pointer()), align=1 if kind in _NARROW else 4)
    return VOID


def stream(builder: Any, at: Any, value: Any) -> Any:
    """Write a row past the cache, to a multiple of 4 LANES bytes."""
    store = builder.store(value, builder.inttoptr(at, FLOATS.as_pointer()), align=4 * LANES)
    store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
    return VOID


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """A b + c, rounded once."""
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    return builder.call(_declare(builder.module, kind, f"llvm.fma.v{LANES}f32"), [a, b, c])


def square_root(builder: Any, a: Any) -> Any:
    """Of a row."""
    kind = ir.FunctionType(FLOATS, [FLOATS])
    return builder.call(_declare(builder.module, kind, f"llvm.sqrt.v{LANES}f32"), [a])


def lookup(builder: Any, low: Any, high: Any, index: Any) -> Any:
    """table[index], index < 16; only where HAS_LOOKUP.

    The table's first LANES entries are low; high holds entries 8 to 15 where LANES is 8, and is not read
    where it is 16.
    """
    kind = ir.FunctionType(FLOATS, [FLOATS, INTS])
    if LANES == 16:
        function = _declare(builder.module, kind, "llvm.x86.avx512.permvar.sf.512")
        return builder.call(function, [low, index])
    function = _declare(builder.module, kind, "llvm.x86.avx2.permps")  # of an index it reads three bits
    eighth = builder.shl(index, ir.Constant(INTS, [28] * LANES))
    is_high = builder.icmp_signed("<", eighth, ir.Constant(INTS, [0] * LANES))
    return builder.select(
        is_high, builder.call(function, [high, index]), builder.call(function, [low, index])
    )


def lookup_pair(builder: Any, low: Any, high: Any, index: Any) -> Any:
    """table[index] of 32 numbers, index < 32; only where LANES is 16."""
    kind = ir.FunctionType(FLOATS, [FLOATS, INTS, FLOATS])
    function = _declare(builder.module, kind, "llvm.x86.avx512.vpermi2var.ps.512")
    return builder.call(function, [low, index, high])


def smaller(builder: Any, a: Any, b: Any) -> Any:
    """A where a < b, else b."""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def larger(builder: Any, a: Any, b: Any) -> Any:
    """A where a > b, else b."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def prefetch(builder: Any, at: Any, for_writing: bool = False) -> Any:
    """Ask for a cache line, into the second level: a hint, harmless at any address."""
    pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
    function = _declare(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(function, [builder.inttoptr(at, pointer), number(int(for_writing)), number(2), number(1)])
    return VOID


def splat(builder: Any, scalar: Any) -> Any:
    """A scalar, fp32 or a 32-bit integer, in all lanes."""
    kind = FLOATS if isinstance(scalar.type, ir.FloatType) else INTS
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.IntType(32)(0))
    mask = ir.Constant(INTS, [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), mask)
