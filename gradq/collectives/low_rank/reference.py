"""The truth of the low-rank kernels, in plain torch. Shapes as in `gradq.collectives.low_rank.format`.

All sums are fp32 and have an order. An inner product has 16 partial sums, of the elements whose index has the
same remainder by 16, each from the first element to the last; they are then added 8 apart, 4, 2 and 1. The
other sums go over rows, or over r, from the first to the last.

`orthonormalize` is Gram-Schmidt, twice, on vectors divided by their largest magnitude: so no norm overflows
or vanishes. A vector that holds NaN, Inf or only denormals, or that is a combination of the ones before it,
gives way to a random one, from a hash; so the basis always spans r dimensions, a zero gradient does no harm,
and a basis may start from zeros.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradq.collectives.low_rank.format import ATTEMPTS, INDEPENDENT, LANES, vector_seed
from gradq.kernels.reference_tools import mix32, value_of

__all__ = ["orthonormalize", "project", "reconstruct", "remove"]

_MIN_NORMAL = 2.0**-126


def _lanes(x: Tensor) -> Tensor:
    """The last dimension in rows of 16, padded with zeros."""
    padding = -x.shape[-1] % LANES
    return torch.nn.functional.pad(x, (0, padding)).reshape(*x.shape[:-1], -1, LANES)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over the last dimension."""
    rows_a, rows_b = _lanes(a), _lanes(b)
    sums = torch.zeros_like(rows_a[..., 0, :] + rows_b[..., 0, :])
    for row in range(rows_a.shape[-2]):
        sums = sums + rows_a[..., row, :] * rows_b[..., row, :]
    for apart in (8, 4, 2, 1):
        sums = sums[..., :apart] + sums[..., apart : 2 * apart]
    return sums[..., 0]


def _random(length: int, seed: int) -> Tensor:
    """Uniform in [-1, 1)."""
    start = mix32(torch.tensor(seed, dtype=torch.int64))
    bits = mix32((torch.arange(length, dtype=torch.int64) + start) & 0xFFFFFFFF)
    return (bits - ((bits >> 31) << 32)).to(torch.float32) * 2.0**-31


def orthonormalize(factor: Tensor, basis: Tensor, *, key: int) -> None:
    """An orthonormal basis of the rows of factor, fp32 [r, length]."""
    for k in range(factor.shape[0]):
        basis[k] = 0
        for attempt in range(ATTEMPTS):
            u = factor[k] if attempt == 0 else _random(factor.shape[1], vector_seed(key, k, attempt))
            largest = u.abs().max()
            if not (largest >= _MIN_NORMAL and largest < torch.inf):
                continue
            u = u / largest
            before = _inner(u, u)
            for _ in range(2):
                for p in range(k):
                    u = u - _inner(u, basis[p]) * basis[p]
            energy = _inner(u, u)
            if energy > before * torch.tensor(INDEPENDENT, dtype=torch.float32):
                basis[k] = u / torch.tensor(math.sqrt(energy))  # torch.sqrt may be off by an ulp
                break


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
    value.copy_(value_of(x, residual, loss_scale))
    m, n = (basis if left else factor).shape[1], (factor if left else basis).shape[1]
    value_mn = value.view(m, n)
    if not left:
        for k, vector in enumerate(basis):
            factor[k] = _inner(value_mn, vector)
        return
    factor.zero_()
    for i, row in enumerate(value_mn):
        factor += basis[:, i, None] * row


def _product(left: Tensor, right: Tensor) -> Tensor:
    product = left[0][:, None] * right[0]
    for k in range(1, left.shape[0]):
        product = product + left[k][:, None] * right[k]
    return product.view(-1)


def reconstruct(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write left.T @ right to out."""
    out.copy_(_product(left, right))


def remove(left: Tensor, right: Tensor, value: Tensor, *, loss_scale: float) -> None:
    """Replace value by (value - left.T @ right) / loss_scale."""
    value.copy_((value - _product(left, right)) * torch.tensor(1.0 / loss_scale, dtype=torch.float32))
