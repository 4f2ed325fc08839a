"""allocate_bits: what it refuses; `tests/properties/test_allocate_properties.py` holds it to brute force."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch

from gradq import codecs
from gradq.errors import ConfigError
from gradq.policy import GradientStatistics, MixedPolicy, ParameterInfo, allocate_bits
from gradq.policy.allocate import solve

INTS = [f"int{bits}" for bits in range(2, 9)]


def statistics(numel=4096, energy=1.0, specs=INTS):
    return GradientStatistics(
        numel=numel, energy=energy, errors={s: energy * 4.0 ** -int(s[3:]) for s in specs}
    )


def test_loud_parameters_get_more_bits():
    model = {f"p{k}": statistics(energy=16.0**k) for k in range(4)}
    budget = 4 * codecs.from_spec("int5").nbytes(4096)
    allocation = allocate_bits(model, INTS, budget_bytes=budget)
    assert list(allocation.specs.values()) == ["int2", "int4", "int6", "int8"]
    assert allocation.nbytes <= budget
    assert allocation.error == pytest.approx(4 * 16**-1, rel=1e-9)
    assert allocation.lower_bound == allocation.error


def test_the_two_budgets_are_two_sides_of_one_front():
    rng = np.random.default_rng(1)
    model = {f"p{k}": statistics(int(rng.integers(1000, 90000)), 10 ** rng.normal()) for k in range(30)}
    for budget in (400_000, 600_000, 900_000):
        by_bytes = allocate_bits(model, INTS, budget_bytes=budget)
        by_error = allocate_bits(model, INTS, error_budget=by_bytes.error)
        assert by_error.nbytes <= by_bytes.nbytes <= budget
        assert by_error.error <= by_bytes.error * (1 + 1e-9)


def test_the_allocation_is_a_mixed_policy():
    model = {"a": statistics(energy=9.0), "b[0]": statistics()}
    specs = allocate_bits(model, INTS, budget_bytes=5000).specs
    infos = [ParameterInfo(name=n, shape=(64, 64), dtype=torch.float32, index=i) for i, n in enumerate(model)]
    plan = MixedPolicy(rules=specs).plan(infos)
    assert [str(plan[n].phase1).partition("(")[0] for n in model] == [specs[n] for n in model]


def test_impossible_budgets_name_the_least_that_is_possible():
    model = {"a": statistics(), "b": statistics(5000)}
    least = sum(codecs.from_spec("int2").nbytes(n) for n in (4096, 5000))
    assert allocate_bits(model, INTS, budget_bytes=least).nbytes == least
    with pytest.raises(ConfigError, match=rf"budget_bytes={least - 1} cannot be met: .* reach is {least}"):
        allocate_bits(model, INTS, budget_bytes=least - 1)
    floor = 2 * 4.0**-8
    assert allocate_bits(model, INTS, error_budget=floor).error == floor
    with pytest.raises(ConfigError, match=rf"error_budget=1e-06 cannot be met: .* reach is {floor!r}"):
        allocate_bits(model, INTS, error_budget=1e-6)
    with pytest.raises(ConfigError, match="error_budget=nan cannot be met"):
        allocate_bits(model, INTS, error_budget=math.nan)


@pytest.mark.parametrize(
    ("model", "candidates", "budgets", "words"),
    [
        ({"a": statistics()}, INTS, {}, "one of them"),
        ({"a": statistics()}, INTS, {"budget_bytes": 1, "error_budget": 1}, "one of them"),
        ({"a": statistics()}, [], {"budget_bytes": 1}, "needs candidates"),
        (
            {"a": statistics(specs=["int4"])},
            ["int4", "int8"],
            {"budget_bytes": 9e9},
            "'a' have no error of int8",
        ),
        ({"a": statistics(energy=-1.0)}, ["int4"], {"budget_bytes": 9e9}, "'a' have a negative error"),
        ({"a": statistics(energy=math.inf)}, ["int4"], {"budget_bytes": 9e9}, "finite error on 'a'"),
    ],
)
def test_what_cannot_be_allocated(model, candidates, budgets, words):
    with pytest.raises(ConfigError, match=words):
        allocate_bits(model, candidates, **budgets)


def test_a_candidate_that_overflowed_is_never_chosen():
    entry = GradientStatistics(numel=4096, energy=1.0, errors={"int4": 0.1, "fp16": math.inf, "fp32": 0.0})
    chosen = allocate_bits({"a": entry}, ["int4", "fp16", "fp32"], budget_bytes=2 * 4096).specs
    assert chosen == {"a": "int4"}


def test_nothing_to_allocate():
    assert allocate_bits({}, INTS, budget_bytes=0).specs == {}


def test_a_thousand_parameters_and_ten_candidates_are_solved_exactly_and_soon():
    rng = np.random.default_rng(0)
    bits = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 16, 32])
    rows = []
    for _ in range(1000):
        numel = int(rng.choice([2**16, 2**20, 3 * 2**18, int(rng.integers(1024, 10**7))]))
        noise = np.exp(0.1 * rng.normal(size=10))
        rows.append((np.ceil(numel * bits / 8), 10 ** rng.normal() * 4.0**-bits * noise))
    budget = 0.12 * sum(float(weight[-1]) for weight, _ in rows)
    start = time.process_time()
    picks, bound = solve(rows, budget)
    assert time.process_time() - start < 20  # 0.3 s on a quiet machine: this bounds the order, not the speed
    assert sum(float(w[p]) for (w, _), p in zip(rows, picks, strict=True)) <= budget
    assert bound == pytest.approx(sum(float(c[p]) for (_, c), p in zip(rows, picks, strict=True)), rel=1e-12)


@pytest.mark.parametrize(("seed", "count"), [(0, 60), (1, 20), (1, 200), (6, 20), (7, 200)])
def test_too_many_states_give_a_solution_with_a_proven_gap(seed, count):
    rng = np.random.default_rng(seed)
    rows = [(rng.integers(1, 50, 6).astype(float), rng.random(6)) for _ in range(count)]
    budget = 12.0 * count
    picks, bound = solve(rows, budget, max_states=3)
    _, best = solve(rows, budget)
    cost = sum(float(c[p]) for (_, c), p in zip(rows, picks, strict=True))
    assert sum(float(w[p]) for (w, _), p in zip(rows, picks, strict=True)) <= budget
    assert bound < best < cost
    assert cost <= 1.04 * bound
