"""Blocks of numbers in Numba: into scratch with their largest magnitude, and out of it past the cache.

L elements of a block, P = L padded to 8; `_at` is an address.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from gradq.kernels.numba_compile import inline
from gradq.kernels.numba_tools import as_bits, as_float, f32_at

__all__ = ["STREAM_FROM", "load_absmax", "load_copy", "load_sum", "next_blocks", "write", "write_mean"]

STREAM_FROM = 4096  # from this many elements outputs are written past the cache: nobody reads them soon


@inline
def next_blocks(left: Any, block_size: Any, together: Any) -> Any:
    """How many blocks come next, and of how many elements each: a shorter last one comes alone."""
    count = min(together, left // block_size)
    return (1, left) if count == 0 else (count, block_size)


@inline
def load_absmax(x_at: Any, L: Any) -> Any:
    """The largest magnitude of L elements."""
    x, most = f32_at(x_at, L), np.uint32(0)
    for j in range(L):
        most = np.uint32(max(most, np.uint32(as_bits(x[j]) & np.uint32(0x7FFFFFFF))))
    return as_float(most)


@inline
def load_copy(x_at: Any, value_at: Any, L: Any, P: Any) -> Any:
    """As `load_absmax`; the elements go to scratch, padded with zeros."""
    x, value = f32_at(x_at, L), f32_at(value_at, P)
    for j in range(L):
        value[j] = x[j]
    for j in range(L, P):
        value[j] = np.float32(0)
    return load_absmax(x_at, L)


@inline
def load_sum(x_at: Any, residual_at: Any, value_at: Any, unscale: Any, L: Any, P: Any) -> Any:
    """As `load_copy`, of x + unscale * residual."""
    x, residual, value = f32_at(x_at, L), f32_at(residual_at, L), f32_at(value_at, P)
    most = np.uint32(0)
    for j in range(L):
        v = x[j] + residual[j] * unscale
        value[j] = v
        most = np.uint32(max(most, np.uint32(as_bits(v) & np.uint32(0x7FFFFFFF))))
    for j in range(L, P):
        value[j] = np.float32(0)
    return as_float(most)


def _stream_8(_typing: Any, _to: Any, _source: Any, _factor: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> None:
        eight = ir.VectorType(ir.FloatType(), 8)
        undefined, lanes = ir.Constant(eight, ir.Undefined), ir.VectorType(ir.IntType(32), 8)
        factor = builder.insert_element(undefined, args[2], ir.Constant(ir.IntType(32), 0))
        factors = builder.shuffle_vector(factor, undefined, ir.Constant(lanes, [0] * 8))
        source, to = (builder.inttoptr(args[k], eight.as_pointer()) for k in (1, 0))
        store = builder.store(builder.fmul(builder.load(source, align=32), factors), to, align=32)
        hint = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        store.set_metadata("nontemporal", hint)

    return types.void(types.intp, types.intp, types.float32), generate


_stream: Any = intrinsic(_stream_8)  # 8 floats times a factor, written past the cache


@inline
def write(scratch_at: Any, out_at: Any, factor: Any, L: Any, stream: Any) -> None:
    """L numbers of scratch times factor to out; stream: past the cache, to a multiple of 32 bytes."""
    done = 0
    if stream:
        done = L // 8 * 8
        for j in range(0, done, 8):
            _stream(out_at + 4 * j, scratch_at + 4 * j, factor)
    scratch, out = f32_at(scratch_at + 4 * done, L - done), f32_at(out_at + 4 * done, L - done)
    for j in range(L - done):  # a range from 0: of others Numba does not know that they stay positive
        out[j] = scratch[j] * factor


@inline
def write_mean(sum_at: Any, out_at: Any, num_rows: Any, L: Any, stream: Any) -> None:
    """The quotient of sums and the number of rows to out, as `write` does."""
    factor = np.float32(1)
    if num_rows & (num_rows - 1) == 0:  # a product with a power of two equals the quotient
        factor /= np.float32(num_rows)
    else:
        total = f32_at(sum_at, L)
        for j in range(L):
            total[j] /= np.float32(num_rows)
    write(sum_at, out_at, factor, L, stream)
