"""Latencies of several sessions, run in turns, so that what else the machine does weighs on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

__all__ = ["Latency", "Turn", "interleave", "summarize"]

TURN_S = 0.05  # so long a contender is called again before the next one's turn


@dataclass(frozen=True)
class Turn:
    """One contender's turn: calls in a row.

    Attributes:
        first_ms: the first call, whose weights the other contenders have pushed out of the caches.
        ms: median of the later half of the calls (of the only one): a session that is called again and again.
    """

    first_ms: float
    ms: float


@dataclass(frozen=True)
class Latency:
    """One contender.

    Attributes:
        median_ms: of its turns.
        low_ms: a tenth of the turns was faster.
        high_ms: a tenth was slower.
        ratio: median over the rounds of baseline time over its time in the same round; above 1 is faster.
        ratio_low: a tenth of the rounds had a lower ratio.
        ratio_high: a tenth had a higher one.
        rounds: how many there were.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    min_rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Turn]]:
    """Give every contender a turn a round, of `TURN_S` seconds or one call, until the time is up.

    Args:
        contenders: name → what to time.
        seconds: for all rounds together.
        min_rounds: at least so many, however long they take.
        clock: seconds; `time.thread_time` leaves out what other processes took from a single-threaded call.

    Returns:
        name → its turn in every round. One untimed call of each goes first.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or time.perf_counter() < end:
        for name, call in contenders.items():  # always in this order: no one follows itself, with warm caches
            turns[name].append(_turn(call, clock))
        rounds += 1
    return turns


def summarize(
    turns: Mapping[str, Sequence[Turn]], baseline: str, *, first: bool = False
) -> dict[str, Latency]:
    """Medians and spreads, and ratios paired round by round with the baseline.

    Args:
        turns: as from `interleave`.
        baseline: the contender that ratios compare with.
        first: of the first calls of the turns, with cold caches.
    """
    times = {n: [turn.first_ms if first else turn.ms for turn in taken] for n, taken in turns.items()}
    out = {}
    for name, values in times.items():
        ratios = [b / v for b, v in zip(times[baseline], values, strict=True)]
        out[name] = Latency(
            median(values), _tenth(values, 0.1), _tenth(values, 0.9),
            median(ratios), _tenth(ratios, 0.1), _tenth(ratios, 0.9), len(values),
        )  # fmt: skip
    return out


def _turn(call: Callable[[], object], clock: Callable[[], float]) -> Turn:
    times: list[float] = []
    end = time.perf_counter() + TURN_S
    while not times or time.perf_counter() < end:
        start = clock()
        call()
        times.append(1e3 * (clock() - start))
    return Turn(times[0], median(times[len(times) // 2 :]))


def _tenth(values: Sequence[float], fraction: float) -> float:
    ordered = sorted(values)
    return ordered[round(fraction * (len(ordered) - 1))]
