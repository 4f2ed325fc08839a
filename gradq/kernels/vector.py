"""Vector code for the Numba kernels, written as LLVM IR: what a loop vectorizer cannot be relied on to find.

A row is 16 consecutive fp32 numbers; LLVM maps a row to whatever registers the machine has (one of AVX-512,
two of AVX2, four of NEON). Adds and subtracts keep the order in which they are written, so results equal
those of plain loops bit for bit.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

__all__ = ["hadamard_rows", "hadamard_rows_of_4"]

_ROW = ir.VectorType(ir.FloatType(), 16)


def _rows_hadamard(count: int) -> Any:
    """An intrinsic (address, stride): the unnormalized Hadamard transform of `count` rows, in place.

    The rows stand `stride` bytes apart; stages of distance 1, 2, 4, ... in that order.
    """

    def typed(_typing: Any, address: Any, stride: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            base, step = args
            pointers = []
            for k in range(count):
                offset = builder.mul(step, ir.Constant(step.type, k))
                pointers.append(builder.inttoptr(builder.add(base, offset), _ROW.as_pointer()))
            rows = [builder.load(pointer, align=4) for pointer in pointers]
            distance = 1
            while distance < count:
                for k in range(count):
                    if k & distance == 0:
                        a, b = rows[k], rows[k + distance]
                        rows[k], rows[k + distance] = builder.fadd(a, b), builder.fsub(a, b)
                distance *= 2
            for row, pointer in zip(rows, pointers, strict=True):
                builder.store(row, pointer, align=4)
            return ir.Constant(ir.IntType(64), 0)

        return types.int64(types.intp, types.intp), generate

    return intrinsic(typed)


hadamard_rows = _rows_hadamard(16)
hadamard_rows_of_4 = _rows_hadamard(4)
