"""The knapsack behind allocate_bits is exact: brute force over every choice finds nothing better."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gradq.policy.allocate import solve

whole = st.integers(0, 40).map(float)
# on a grid, so that sums are exact: what fits a budget must not depend on rounding
real = st.integers(0, 2**30).map(lambda i: i / 1024)
tiny = st.integers(0, 2**20).map(lambda i: i * 2.0**-50)


@st.composite
def instances(draw):
    number = st.sampled_from([whole, real, tiny])
    weights, costs = draw(number), draw(number)
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        count = draw(st.integers(1, 5))
        pair = (draw(st.lists(kind, min_size=count, max_size=count)) for kind in (weights, costs))
        rows.append(tuple(np.array(values) for values in pair))
    least, most = (math.fsum(float(f(w)) for w, _ in rows) for f in (np.min, np.max))
    budget = draw(st.one_of(st.just(least), st.just(most), st.floats(least, max(least, most))))
    return rows, max(budget, least)


def total(rows, picks, which):
    return math.fsum(float(row[which][pick]) for row, pick in zip(rows, picks, strict=True))


@settings(max_examples=400, deadline=None)
@given(instances())
@example(([(np.array([0.0, 5e-324]), np.array([1.0, 0.0]))], 0.0))  # the price of a step overflows
def test_solve_equals_brute_force(instance):
    rows, budget = instance
    picks, bound = solve(rows, budget)
    choices = itertools.product(*(range(len(weight)) for weight, _ in rows))
    best = min(total(rows, choice, 1) for choice in choices if total(rows, choice, 0) <= budget)
    cost = total(rows, picks, 1)
    scale = math.fsum(float(np.max(cost)) for _, cost in rows)
    assert total(rows, picks, 0) <= budget
    assert best <= cost <= best + 1e-9 * scale
    assert bound == cost  # and it says so


@settings(max_examples=200, deadline=None)
@given(instances(), st.integers(1, 4))
def test_the_bound_holds_when_the_search_is_cut_short(instance, max_states):
    rows, budget = instance
    picks, bound = solve(rows, budget, max_states=max_states)
    choices = itertools.product(*(range(len(weight)) for weight, _ in rows))
    best = min(total(rows, choice, 1) for choice in choices if total(rows, choice, 0) <= budget)
    scale = math.fsum(float(np.max(cost)) for _, cost in rows)
    assert total(rows, picks, 0) <= budget
    assert bound <= best + 1e-9 * scale
    assert total(rows, picks, 1) >= best
