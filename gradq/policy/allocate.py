"""Bits where they pay: the codec of every parameter that gives the least error for a number of bytes.

This is the problem of L-GreCo, a multiple-choice knapsack: of every row (a parameter) take one option (a
codec), minimise the summed cost while the summed weight stays in a budget. It is solved in three steps:

1. With a price λ on weight every row decides alone. The λ at which the budget is just reached gives a lower
   bound on the cost, and rounding that solution down an upper bound; both by one sort over the steps of the
   rows' convex hulls.
2. An option whose Lagrangian cost exceeds the best of its row by more than the gap is in no better solution.
3. What is left, usually a few rows, goes through dynamic programming over undominated (weight, cost) pairs,
   with the same bound. If they become too many, the best solution so far is returned with its proven gap.

References:
    Markov, Alim, Alistarh, "L-GreCo: Layerwise-adaptive gradient compression", MLSys 2024 (the problem).
    Dyer, "An O(n) algorithm for the multiple-choice knapsack linear program", 1984 (the bound).
    Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", 1995 (steps 2 and 3).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradq.codecs import Codec, from_spec
from gradq.errors import ConfigError

__all__ = ["Allocation", "GradientStatistics", "allocate_bits", "solve"]

_MAX_STATES = 200_000
_LARGEST_PRICE = 1e300  # a step of a denormal weight would have an infinite one
_Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class GradientStatistics:
    """What was measured of one parameter's gradients.

    Attributes:
        numel: the number of elements.
        energy: the sum of squares, over the sampled steps and the ranks.
        errors: ‖x - Q(x)‖² by candidate spec, over the same; inf or nan rules a candidate out.
    """

    numel: int
    energy: float
    errors: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A codec for every parameter.

    Attributes:
        specs: codec specs by parameter name; they also serve as rules of a `MixedPolicy`.
        nbytes: the payload bytes of phase 1 of all parameters.
        error: the error of all parameters, summed.
        lower_bound: proven: no allocation within the budget has less error (given `budget_bytes`) or fewer
            bytes (given `error_budget`). Equal to error or nbytes if this one is optimal.
    """

    specs: dict[str, str]
    nbytes: int
    error: float
    lower_bound: float


def allocate_bits(
    statistics: Mapping[str, GradientStatistics],
    candidates: Sequence[str | Codec],
    *,
    budget_bytes: float | None = None,
    error_budget: float | None = None,
) -> Allocation:
    """Choose a codec for every parameter: the least error in a number of bytes, or the other way round.

    A parameter of n elements costs `codec.nbytes(n)`. Errors of different parameters add up because all stand
    in one gradient vector; errors of ranks add up to W² times that of their mean, if they are independent.

    Args:
        statistics: the statistics that were measured, by parameter name.
        candidates: codecs or their specs; every parameter's errors must have them.
        budget_bytes: the largest number of payload bytes of phase 1.
        error_budget: the largest summed error. Give one of the two.

    Returns:
        The allocation; the optimal one but for instances beyond 200 000 undominated states.

    Raises:
        ConfigError: not exactly one budget, one that cannot be met (naming the least that can), no
            candidates, or a parameter without a measured candidate.

    Example:
        >>> loud = GradientStatistics(numel=1 << 20, energy=9.0, errors={"int4": 0.1, "int8": 0.001})
        >>> quiet = GradientStatistics(numel=1 << 20, energy=1.0, errors={"int4": 0.01, "int8": 0.0001})
        >>> allocate_bits({"a": loud, "b": quiet}, ["int4", "int8"], budget_bytes=1_600_000).specs
        {'a': 'int8', 'b': 'int4'}
    """
    if (budget_bytes is None) == (error_budget is None):
        raise ConfigError("allocate_bits takes budget_bytes or error_budget, one of them")
    codecs = {str(c): c for c in (from_spec(c) if isinstance(c, str) else c for c in candidates)}
    if not codecs:
        raise ConfigError("allocate_bits needs candidates, such as ['int2', 'int4', 'int8']")
    options = {name: _options(name, entry, codecs) for name, entry in statistics.items()}
    rows = [(np.array([o[1] for o in row]), np.array([o[2] for o in row])) for row in options.values()]
    if budget_bytes is not None:
        _check_budget("budget_bytes", budget_bytes, [nbytes for nbytes, _ in rows], "bytes")
        picks, bound = solve([(nbytes, error) for nbytes, error in rows], budget_bytes)
    else:
        assert error_budget is not None
        _check_budget("error_budget", error_budget, [error for _, error in rows], "error")
        picks, bound = solve([(error, nbytes) for nbytes, error in rows], error_budget * (1 + 1e-12))
    chosen = {name: row[pick] for (name, row), pick in zip(options.items(), picks, strict=True)}
    return Allocation(
        specs={name: spec for name, (spec, _, _) in chosen.items()},
        nbytes=sum(int(nbytes) for _, nbytes, _ in chosen.values()),
        error=math.fsum(error for _, _, error in chosen.values()),
        lower_bound=bound,
    )


def _options(
    name: str, entry: GradientStatistics, codecs: Mapping[str, Codec]
) -> list[tuple[str, float, float]]:
    """Spec, bytes and error of the candidates that can carry a parameter."""
    missing = codecs.keys() - entry.errors.keys()
    if missing:
        raise ConfigError(f"the statistics of {name!r} have no error of {', '.join(sorted(missing))}")
    found = [
        (spec, float(codec.nbytes(entry.numel)), float(entry.errors[spec])) for spec, codec in codecs.items()
    ]
    finite = [option for option in found if math.isfinite(option[2])]
    if not finite:
        raise ConfigError(f"no candidate has a finite error on {name!r}; add one such as 'fp32'")
    if min(error for _, _, error in finite) < 0:
        raise ConfigError(f"the statistics of {name!r} have a negative error")
    return finite


def _check_budget(name: str, budget: float, weights: list[_Vector], unit: str) -> None:
    least = math.fsum(float(row.min()) for row in weights)
    if not budget >= least:
        shown = f"{least:.0f}" if unit == "bytes" else f"{least!r}"
        raise ConfigError(f"{name}={budget!r} cannot be met: the least these candidates reach is {shown}")


# --- the multiple-choice knapsack ----------------------------------------------------------------------


def solve(
    rows: Sequence[tuple[_Vector, _Vector]], budget: float, max_states: int = _MAX_STATES
) -> tuple[list[int], float]:
    """One option a row: the least summed cost of a summed weight of at most budget.

    Args:
        rows: weights and costs of the options of each row, [m] and [m], finite and at least 0.
        budget: largest sum of weights; at least the sum of the rows' least weights.
        max_states: number of states that the dynamic programming keeps.

    Returns:
        The option chosen in every row, and a lower bound on the cost of any choice; the cost itself, if the
        choice is proven optimal.
    """
    if not rows:
        return [], 0.0
    price, picks = _greedy(rows, budget)
    reduced = [cost + price * weight for weight, cost in rows]
    best = [int(np.lexsort((row[0], r))[0]) for row, r in zip(rows, reduced, strict=True)]
    excess = [r - r[pick] for r, pick in zip(reduced, best, strict=True)]
    bound = math.fsum(float(r[pick]) for r, pick in zip(reduced, best, strict=True)) - price * budget
    upper = _total(rows, picks, 1)
    slop = 1e-12 * max(abs(upper), abs(bound), price * budget)  # rounding of these very sums
    open_rows = [i for i, e in enumerate(excess) if np.count_nonzero(bound + e <= upper + slop) > 1]
    if upper <= bound + slop or not open_rows:
        return picks, upper
    search = _Search(rows, excess, best, price, budget, bound, upper, slop)
    found, complete = search.run(open_rows, max_states)
    picks = found if found is not None else picks
    upper = _total(rows, picks, 1)
    return picks, upper if complete else min(bound, upper)


def _total(rows: Sequence[tuple[_Vector, _Vector]], picks: Sequence[int], which: int) -> float:
    return math.fsum(float(row[which][pick]) for row, pick in zip(rows, picks, strict=True))


def _greedy(rows: Sequence[tuple[_Vector, _Vector]], budget: float) -> tuple[float, list[int]]:
    """The price at which the budget is reached, and a good solution: steps of the hulls, the best first."""
    steps: list[tuple[float, int, int, int]] = []  # gain a weight, row, place on the hull, option
    picks = []
    for index, (weight, cost) in enumerate(rows):
        hull = _hull(weight, cost)
        picks.append(hull[0])
        for place, (a, b) in enumerate(itertools.pairwise(hull)):
            gain = min(float(cost[a] - cost[b]) / float(weight[b] - weight[a]), _LARGEST_PRICE)
            steps.append((gain, index, place, b))
    steps.sort(key=lambda step: (-step[0], step[1], step[2]))
    used, price, full = _total(rows, picks, 0), 0.0, False
    for gain, index, _, option in steps:
        more = float(rows[index][0][option] - rows[index][0][picks[index]])
        if used + more <= budget:
            used += more
            picks[index] = option
        elif not full:
            price, full = gain, True
    while _total(rows, picks, 0) > budget:  # the running sum was rounded down; rare, and one step mends it
        index = max(range(len(rows)), key=lambda i: rows[i][0][picks[i]] - rows[i][0].min())
        picks[index] = int(rows[index][0].argmin())
    return price, picks


def _hull(weight: _Vector, cost: _Vector) -> list[int]:
    """The options on the lower convex hull, the lightest first."""
    hull: list[int] = []
    for option in np.lexsort((cost, weight)).tolist():
        if hull and cost[option] >= cost[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            turn = (cost[b] - cost[a]) * (weight[option] - weight[a])
            if turn < (cost[option] - cost[a]) * (weight[b] - weight[a]):
                break
            hull.pop()
        if hull and weight[hull[-1]] == weight[option]:
            hull[-1] = option
        else:
            hull.append(option)
    return hull


@dataclass
class _Search:
    """Dynamic programming over the rows that the price leaves open; the others keep their best option."""

    rows: Sequence[tuple[_Vector, _Vector]]
    excess: list[_Vector]
    best: list[int]
    price: float
    budget: float
    bound: float
    upper: float
    slop: float

    def run(self, open_rows: list[int], max_states: int) -> tuple[list[int] | None, bool]:
        """The best choice if one beats `upper`, and whether nothing better can exist.

        A state is a choice in the rows so far, the others at their best: its weight w, and the excess x over
        the lower bound. If w fits, it is a solution of cost bound + x + price * (budget - w).
        """
        order = sorted(open_rows, key=lambda i: float(np.sort(self.excess[i])[1]))
        weight = np.array([_total(self.rows, self.best, 0)])
        excess = np.zeros(1)
        history: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []  # parent, option
        winner: tuple[int, int] | None = self._improve(weight, excess, -1, None)
        for depth, index in enumerate(order):
            row_weight, row_excess = self.rows[index][0], self.excess[index]
            options = np.flatnonzero(self.bound + row_excess <= self.upper + self.slop)
            shift = row_weight[options] - row_weight[self.best[index]]
            new_weight = (weight[:, None] + shift[None, :]).reshape(-1)
            new_excess = (excess[:, None] + row_excess[options][None, :]).reshape(-1)
            parent = np.repeat(np.arange(len(weight)), len(options))
            option = np.tile(options, len(weight))
            keep = np.flatnonzero(self.bound + new_excess <= self.upper + self.slop)
            keep = keep[self._undominated(new_weight[keep], new_excess[keep])]
            if len(keep) > max_states:
                return self._unwind(order, history, winner), False
            weight, excess = new_weight[keep], new_excess[keep]
            history.append((parent[keep], option[keep]))
            winner = self._improve(weight, excess, depth, winner)
        return self._unwind(order, history, winner), True

    def _improve(
        self, weight: _Vector, excess: _Vector, depth: int, winner: tuple[int, int] | None
    ) -> tuple[int, int] | None:
        """Lower `upper` if a state is a better solution; the winner is (depth, state)."""
        cost = self.bound + excess + self.price * (self.budget - weight)
        cost[weight > self.budget] = math.inf
        state = int(cost.argmin())
        if cost[state] < self.upper - self.slop:
            self.upper = float(cost[state])
            return depth, state
        return winner

    def _undominated(self, weight: _Vector, excess: _Vector) -> npt.NDArray[np.int64]:
        """States no other beats: with less weight and less cost, that is excess - price * weight."""
        cost = excess - self.price * weight
        order = np.lexsort((cost, weight))
        least = np.minimum.accumulate(cost[order])
        fresh = np.ones(len(order), dtype=bool)
        fresh[1:] = cost[order][1:] < least[:-1]
        return order[fresh]

    def _unwind(
        self,
        order: list[int],
        history: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]],
        winner: tuple[int, int] | None,
    ) -> list[int] | None:
        """The choice that ended in the winner."""
        if winner is None:
            return None
        picks = list(self.best)
        depth, state = winner
        for level in range(depth, -1, -1):
            parent, option = history[level]
            picks[order[level]] = int(option[state])
            state = int(parent[state])
        return picks
