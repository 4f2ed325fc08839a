"""Latencies in turns: what counts is a session called again and again; its first call is kept beside it."""

from __future__ import annotations

import time

import pytest

from gradq.export.timing import TURN_S, Turn, interleave, summarize


def test_a_turn_counts_with_its_later_calls_and_keeps_the_first():
    turned: list[str] = []

    def call(name: str, first_s: float, s: float) -> None:
        time.sleep(s if turned and turned[-1] == name else first_s)
        turned.append(name)

    turns = interleave(
        {"warming": lambda: call("warming", 0.02, 0.001), "steady": lambda: call("steady", 0.004, 0.004)},
        seconds=0,
        min_rounds=3,
    )
    assert {name: len(taken) for name, taken in turns.items()} == {"warming": 3, "steady": 3}
    assert all(t.first_ms >= 20 and 1 <= t.ms < 15 for t in turns["warming"])
    assert all(t.first_ms >= 4 and t.ms >= 4 for t in turns["steady"])


def test_a_long_call_is_a_turn_of_its_own():
    calls: list[int] = []
    turns = interleave({"long": lambda: (calls.append(1), time.sleep(1.2 * TURN_S))}, seconds=0, min_rounds=2)
    assert len(calls) == 1 + 2  # one is not timed
    assert all(t.first_ms == t.ms >= 1200 * TURN_S for t in turns["long"])


def test_ratios_are_those_of_the_rounds():
    turns = {"a": [Turn(8, 4), Turn(80, 40)], "b": [Turn(4, 1), Turn(40, 20)]}
    warm, cold = summarize(turns, "a"), summarize(turns, "a", first=True)
    assert (warm["b"].ratio, cold["b"].ratio) == (pytest.approx((4 + 2) / 2), 2)
    assert (warm["b"].ratio_low, warm["b"].ratio_high) == (2, 4)
    assert (warm["b"].median_ms, warm["b"].rounds, warm["a"].ratio) == (10.5, 2, 1)
