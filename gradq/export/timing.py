"""Latencies of several sessions that run in turns, so that other work on the machine slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

__all__ = ["Latency", "Turn", "interleave", "summarize"]

TURN_S = 0.05  # seconds for which one contender is called before it is the next one's turn


@dataclass(frozen=True)
class Turn:
    """The turn of one contender: calls in a row.

    Attributes:
        first_ms: time of the first call in milliseconds, with caches that the other contenders have emptied.
        ms: median time of the later half of the calls in milliseconds, as of a session that is called often.
    """

    first_ms: float
    ms: float


@dataclass(frozen=True)
class Latency:
    """The latency of one contender.

    Attributes:
        median_ms: median time of the turns in milliseconds.
        low_ms: time that a tenth of the turns stayed below.
        high_ms: time that a tenth of the turns exceeded.
        ratio: median over the rounds of the baseline's time divided by this contender's; above 1 is faster.
        ratio_low: ratio that a tenth of the rounds stayed below.
        ratio_high: ratio that a tenth of the rounds exceeded.
        rounds: number of rounds.
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
    """Give every contender one turn in each round, of `TURN_S` seconds or one call, until the time is up.

    Args:
        contenders: name → function to time.
        seconds: time for all rounds together.
        min_rounds: smallest number of rounds, whatever time they take.
        clock: function that gives the time in seconds; `time.thread_time` does not count the time that other
            processes took from a single-threaded call.

    Returns:
        Name → the turns of that contender, one for each round. One untimed call of each goes first.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or time.perf_counter() < end:
        for (
            name,
            call,
        ) in contenders.items():  # the order is fixed: no contender follows itself with warm caches
            turns[name].append(_turn(call, clock))
        rounds += 1
    return turns


def summarize(
    turns: Mapping[str, Sequence[Turn]], baseline: str, *, first: bool = False
) -> dict[str, Latency]:
    """Medians and spreads, and ratios paired round by round with the baseline.

    Args:
        turns: name → turns, from `interleave`.
        baseline: name of the contender that the ratios compare with.
        first: whether the first calls of the turns count, with cold caches, in the place of the later half.
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
