"""The low-rank kernels in Numba: bit for bit what `gradq.collectives.low_rank.reference` computes.

A row of the matrix at a time, while it stays in the L1 cache; the matrix is read once and written once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradq.collectives.low_rank.format import ATTEMPTS, INDEPENDENT, vector_seed
from gradq.kernels.numba_compile import inline, jit
from gradq.kernels.numba_tools import (
    address,
    as_bits,
    as_float,
    f32_at,
    keep,
    mix32,
)
from gradq.kernels.vector.operations import LANES, constant_row, load_row, store_row

__all__ = ["orthonormalize", "project", "reconstruct", "remove"]


@inline
def _tail(a_at: Any, b_at: Any, length: Any, scratch: Any) -> Any:
    """Add to the 16 sums in scratch what whole rows of 16 leave, and add the sums."""
    whole = length // 16 * 16
    a, b = f32_at(a_at + 4 * whole, length - whole), f32_at(b_at + 4 * whole, length - whole)
    for j in range(length - whole):
        scratch[j] += a[j] * b[j]
    for apart in (8, 4, 2, 1):
        for j in range(apart):
            scratch[j] += scratch[j + apart]
    return scratch[0]


@inline
def _inner(a_at: Any, b_at: Any, length: Any, scratch: Any) -> Any:
    for part in range(0, 64, 4 * LANES):
        sums = constant_row(np.float32(0))
        for at in range(part, length // 16 * 64, 64):
            sums = sums + load_row(a_at + at) * load_row(b_at + at)
        store_row(scratch.ctypes.data + part, sums)
    return _tail(a_at, b_at, length, scratch)


@inline
def _inner_4(a_at: Any, b_at: Any, stride: Any, length: Any, scratch_4: Any, out: Any) -> None:
    """Inner products of one vector with four: their additions overlap."""
    for part in range(0, 64, 4 * LANES):
        zero = constant_row(np.float32(0))
        s0, s1, s2, s3 = zero, zero, zero, zero
        for at in range(part, length // 16 * 64, 64):
            a, there = load_row(a_at + at), b_at + at
            s0 = s0 + a * load_row(there)
            s1 = s1 + a * load_row(there + stride)
            s2 = s2 + a * load_row(there + 2 * stride)
            s3 = s3 + a * load_row(there + 3 * stride)
        to = scratch_4.ctypes.data + part
        store_row(to, s0)
        store_row(to + 64, s1)
        store_row(to + 128, s2)
        store_row(to + 192, s3)
    for k in range(4):
        out[k] = _tail(a_at, b_at + k * stride, length, scratch_4[16 * k : 16 * k + 16])


@jit
def _orthonormalize(
    factor_at: int, basis_at: int, r: int, length: int, seeds: Any, independent: float
) -> None:
    factor, basis = f32_at(factor_at, r * length), f32_at(basis_at, r * length)
    scratch_C, u = np.empty(16, np.float32), np.empty(length, np.float32)
    u_at = u.ctypes.data
    for k in range(r):
        given, chosen = factor[k * length : (k + 1) * length], basis[k * length : (k + 1) * length]
        for j in range(length):
            chosen[j] = np.float32(0)
        for attempt in range(seeds.shape[1]):
            if attempt == 0:
                for j in range(length):
                    u[j] = given[j]
            else:
                start = mix32(np.uint32(seeds[k, attempt]))
                for j in range(length):
                    bits = mix32(np.uint32(np.uint32(j) + start))
                    u[j] = np.float32(np.int32(bits)) * np.float32(2.0**-31)
            most = np.uint32(0)
            for j in range(length):
                most = np.uint32(max(most, np.uint32(as_bits(u[j]) & np.uint32(0x7FFFFFFF))))
            if most < np.uint32(0x00800000) or most >= np.uint32(0x7F800000):
                continue
            largest = as_float(most)
            for j in range(length):
                u[j] /= largest
            before = _inner(u_at, u_at, length, scratch_C)
            for _ in range(2):
                for p in range(k):
                    other = basis[p * length : (p + 1) * length]
                    along = _inner(u_at, basis_at + 4 * p * length, length, scratch_C)
                    for j in range(length):
                        u[j] = u[j] - along * other[j]
            energy = _inner(u_at, u_at, length, scratch_C)
            if energy > before * np.float32(independent):
                norm = np.float32(np.sqrt(energy))
                for j in range(length):
                    chosen[j] = u[j] / norm
                break
    keep(u)
    keep(scratch_C)


@inline
def _sum_row(x_at: Any, residual_at: Any, value_at: Any, unscale: Any, n: Any) -> None:
    x, residual, value = f32_at(x_at, n), f32_at(residual_at, n), f32_at(value_at, n)
    if residual_at != 0:
        for j in range(n):
            value[j] = x[j] + residual[j] * unscale
    else:
        for j in range(n):
            value[j] = x[j]


@jit
def _project_right(
    x_at: int,
    residual_at: int,
    value_at: int,
    basis_at: int,
    factor_at: int,
    m: int,
    n: int,
    r: int,
    loss_scale: float,
) -> None:
    factor = f32_at(factor_at, r * m)
    scratch_C, four = np.empty(64, np.float32), np.empty(4, np.float32)
    unscale = np.float32(loss_scale)
    for i in range(m):
        row = 4 * i * n
        _sum_row(x_at + row, 0 if residual_at == 0 else residual_at + row, value_at + row, unscale, n)
        for k in range(0, r & ~3, 4):
            _inner_4(value_at + row, basis_at + 4 * k * n, 4 * n, n, scratch_C, four)
            for q in range(4):
                factor[(k + q) * m + i] = four[q]
        for k in range(r & ~3, r):
            factor[k * m + i] = _inner(value_at + row, basis_at + 4 * k * n, n, scratch_C)
    keep(scratch_C)


@jit
def _project_left(
    x_at: int,
    residual_at: int,
    value_at: int,
    basis_at: int,
    factor_at: int,
    m: int,
    n: int,
    r: int,
    loss_scale: float,
) -> None:
    basis, factor = f32_at(basis_at, r * m), f32_at(factor_at, r * n)
    unscale = np.float32(loss_scale)
    for j in range(r * n):
        factor[j] = np.float32(0)
    for i in range(m):
        row = 4 * i * n
        _sum_row(x_at + row, 0 if residual_at == 0 else residual_at + row, value_at + row, unscale, n)
        value = f32_at(value_at + row, n)
        for k in range(r):
            sums, weight = factor[k * n : (k + 1) * n], basis[k * m + i]
            for j in range(n):
                sums[j] += weight * value[j]


@inline
def _product_row(left: Any, right: Any, product: Any, i: Any, m: Any, n: Any, r: Any) -> None:
    first, weight = right[:n], left[i]
    for j in range(n):
        product[j] = weight * first[j]
    for k in range(1, r):
        vector, weight = right[k * n : (k + 1) * n], left[k * m + i]
        for j in range(n):
            product[j] += weight * vector[j]


@jit
def _combine(
    left_at: int, right_at: int, value_at: int, m: int, n: int, r: int, remove: bool, rescale: float
) -> None:
    left, right, value = f32_at(left_at, r * m), f32_at(right_at, r * n), f32_at(value_at, m * n)
    product, factor = np.empty(n, np.float32), np.float32(rescale)
    for i in range(m):
        row = value[i * n : (i + 1) * n]
        if remove:
            _product_row(left, right, product, i, m, n, r)
            for j in range(n):
                row[j] = (row[j] - product[j]) * factor
        else:
            _product_row(left, right, row, i, m, n, r)


def orthonormalize(factor: Tensor, basis: Tensor, *, key: int) -> None:
    """An orthonormal basis of the rows of factor, fp32 [r, length]."""
    r, length = factor.shape
    seeds = np.array([[vector_seed(key, k, a) for a in range(ATTEMPTS)] for k in range(r)], np.uint32)
    _orthonormalize(
        address(factor, torch.float32, r * length),
        address(basis, torch.float32, r * length),
        r,
        length,
        seeds,
        INDEPENDENT,
    )


def project(
    x: Tensor,
    residual: Tensor | None,
    value: Tensor,
    basis: Tensor,
    factor: Tensor,
    *,
    left: bool,
    loss_scale: float,
) -> None:
    """Write the sum to value, and its product with the basis to factor."""
    r = basis.shape[0]
    m, n = (basis if left else factor).shape[1], (factor if left else basis).shape[1]
    (_project_left if left else _project_right)(
        address(x, torch.float32, m * n),
        0 if residual is None else address(residual, torch.float32, m * n),
        address(value, torch.float32, m * n),
        address(basis, torch.float32, r * (m if left else n)),
        address(factor, torch.float32, r * (n if left else m)),
        m,
        n,
        r,
        float(loss_scale),
    )


def reconstruct(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write left.T @ right to out."""
    _combine(*_addresses(left, right, out), False, 1.0)


def remove(left: Tensor, right: Tensor, value: Tensor, *, loss_scale: float) -> None:
    """Replace value by (value - left.T @ right) / loss_scale."""
    _combine(*_addresses(left, right, value), True, 1.0 / loss_scale)


def _addresses(left: Tensor, right: Tensor, matrix: Tensor) -> tuple[int, int, int, int, int, int]:
    (r, m), n = left.shape, right.shape[1]
    return (
        address(left, torch.float32, r * m),
        address(right, torch.float32, r * n),
        address(matrix, torch.float32, m * n),
        m,
        n,
        r,
    )
