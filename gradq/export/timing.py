"""Latencies of two sessions, run in turns, so that what else the machine does weighs on both."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

__all__ = ["Latency", "interleave", "summarize"]


@dataclass(frozen=True)
class Latency:
    """One contender.

    Attributes:
        median_ms: of its runs.
        low_ms: a tenth of the runs was faster.
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
) -> dict[str, list[float]]:
    """Call every contender once a round until the time is up.

    Args:
        contenders: name → what to time.
        seconds: for all rounds together.
        min_rounds: at least so many, however long they take.
        clock: seconds; `time.thread_time` leaves out what other processes took from a single-threaded call.

    Returns:
        name → milliseconds of every round. One untimed call of each goes first.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or time.perf_counter() < end:
        order = list(contenders) if rounds % 2 == 0 else list(contenders)[::-1]
        for name in order:
            start = clock()
            contenders[name]()
            times[name].append(1e3 * (clock() - start))
        rounds += 1
    return times


def summarize(times: Mapping[str, Sequence[float]], baseline: str) -> dict[str, Latency]:
    """Medians and spreads, and ratios paired round by round with the baseline."""
    out = {}
    for name, values in times.items():
        ratios = [b / v for b, v in zip(times[baseline], values, strict=True)]
        out[name] = Latency(
            median(values), _tenth(values, 0.1), _tenth(values, 0.9),
            median(ratios), _tenth(ratios, 0.1), _tenth(ratios, 0.9), len(values),
        )  # fmt: skip
    return out


def _tenth(values: Sequence[float], fraction: float) -> float:
    ordered = sorted(values)
    return ordered[round(fraction * (len(ordered) - 1))]
