"""The low-rank kernels: Numba equals the reference bit for bit; bases are orthonormal, whatever comes in."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradq import rng
from gradq.collectives.low_rank import cpu as cpu_low_rank
from gradq.collectives.low_rank import reference as reference_low_rank

BOTH = (cpu_low_rank, reference_low_rank)
KEY = rng.dither_key(1, 2, 3, 3)
SHAPES = [(1, 1, 1), (5, 7, 3), (33, 17, 4), (16, 16, 16), (40, 131, 9), (3, 64, 3), (100, 48, 5)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits(x):
    """All NaNs being one."""
    return torch.where(x.isnan(), torch.full_like(x, math.nan), x).view(torch.int32)


def bases(factor, key=KEY):
    """By both, and equal."""
    outcomes = []
    for kernels in BOTH:
        basis = torch.full_like(factor, 7.0)
        kernels.orthonormalize(factor, basis, key=key)
        outcomes.append(basis)
    assert torch.equal(bits(outcomes[0]), bits(outcomes[1]))
    return outcomes[0]


def is_orthonormal(basis):
    return torch.allclose(basis.double() @ basis.double().T, torch.eye(len(basis)).double(), atol=1e-5)


FACTORS = {
    "random": normal(5, 23),
    "zeros": torch.zeros(5, 23),
    "denormals": 1e-40 * normal(5, 23),
    "tiny": 1e-37 * normal(5, 23),
    "huge": 1e38 * normal(5, 23).clamp(-3, 3),
    "all scales": normal(5, 23) * torch.tensor([1e-30, 1.0, 1e30, 1e-15, 0.0])[:, None],
    "equal rows": torch.ones(5, 23),
    "nearly equal rows": torch.ones(5, 23) + 1e-6 * normal(5, 23),
    "rank 2": normal(5, 2) @ normal(2, 23, seed=1),
    "a NaN": torch.where(torch.arange(115).view(5, 23) == 30, math.nan, normal(5, 23)),
    "Inf": torch.full((5, 23), math.inf),
    "as many rows as elements": normal(9, 9),
    "one element": torch.tensor([[-3.0]]),
}


@pytest.mark.parametrize("name", FACTORS)
def test_a_basis_is_orthonormal_and_never_nan(name):
    basis = bases(FACTORS[name])
    assert is_orthonormal(basis), basis @ basis.T


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 6),
    extra=st.integers(0, 40),
    exponent=st.integers(-44, 37),
    rank=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_every_basis_is_orthonormal(rows, extra, exponent, rank, seed):
    """Of any scale and of any rank, down to denormals."""
    length = rows + extra
    factor = normal(rows, rank, seed=seed) @ normal(rank, length, seed=seed + 1) * 10.0**exponent
    assert is_orthonormal(bases(factor, key=seed))


def test_a_basis_spans_what_the_factor_spans_and_does_not_depend_on_its_scale():
    factor = normal(4, 50)
    basis = bases(factor)
    assert torch.allclose(factor @ basis.T @ basis, factor, atol=1e-4)
    assert torch.equal(basis, bases(factor * 2.0**20))


def test_random_vectors_follow_the_key():
    zeros = torch.zeros(2, 40)
    assert not torch.equal(bases(zeros, key=1), bases(zeros, key=2))
    assert not torch.equal(bases(zeros, key=1 << 32), bases(zeros, key=2 << 32))
    assert abs(float(bases(torch.zeros(1, 4000)).mean())) < 0.05 / math.sqrt(4000) * 10


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_the_references(shape, left):
    m, n, r = shape
    x, residual, basis = normal(m * n), normal(m * n, seed=1), normal(r, m if left else n, seed=2)
    outcomes = []
    for kernels in BOTH:
        value, factor, out = torch.empty(m * n), torch.empty(r, n if left else m), torch.empty(m * n)
        kernels.project(x, residual, value, basis, factor, left=left, loss_scale=8.0)
        sides = (basis, factor) if left else (factor, basis)
        kernels.reconstruct(*sides, out)
        lost = value.clone()
        kernels.remove(*sides, lost, loss_scale=8.0)
        outcomes.append((value, factor, out, lost))
    for ours, truth in zip(*outcomes, strict=True):
        assert torch.equal(bits(ours), bits(truth))
    value, factor, out, lost = outcomes[0]
    matrix = (x + 8 * residual).view(m, n)
    assert torch.allclose(factor, basis @ matrix if left else basis @ matrix.T, atol=1e-3)
    assert torch.allclose(out, (sides[0].T @ sides[1]).view(-1), atol=1e-3)
    assert torch.equal(lost, (value - out) / 8)


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reaches_a_row_or_a_column(kernels, left, value):
    m, n, r = 12, 37, 3
    for element in (0, 36, 37, 200, m * n - 1):
        x = normal(m * n)
        x[element] = value
        basis = torch.empty(r, m if left else n)
        kernels.orthonormalize(normal(*basis.shape), basis, key=KEY)
        factor, out = torch.empty(r, n if left else m), torch.empty(m * n)
        kernels.project(x, None, torch.empty(m * n), basis, factor, left=left, loss_scale=1.0)
        kernels.reconstruct(*((basis, factor) if left else (factor, basis)), out)
        i, j = divmod(element, n)
        hit = ~out.view(m, n).isfinite()
        assert hit[:, j].all() if left else hit[i].all()
        assert hit.sum() == (m if left else n)


def test_a_projection_never_makes_the_error_larger_than_the_whole():
    """What error feedback needs, on a matrix of any spectrum; a matrix of rank r is kept whole."""
    for rank in (1, 3, 8, 20):
        matrix = normal(40, rank) @ normal(rank, 30, seed=1)
        basis = bases(normal(8, 30, seed=2))
        for _ in range(2):  # a power iteration: from the right, then from the left
            value, factor = torch.empty(1200), torch.empty(8, 40)
            cpu_low_rank.project(matrix.view(-1), None, value, basis, factor, left=False, loss_scale=1.0)
            lost = value.clone()
            cpu_low_rank.remove(factor, basis, lost, loss_scale=1.0)
            assert lost.square().sum() <= value.square().sum() * 1.0001
            across = torch.empty(8, 30)
            side = bases(factor)
            cpu_low_rank.project(matrix.view(-1), None, value, side, across, left=True, loss_scale=1.0)
            cpu_low_rank.remove(side, across, value, loss_scale=1.0)
            basis = bases(across)
        if rank <= 8:
            assert value.abs().max() < 1e-3
