"""Timing side by side: every call once a round, in a new order each time, and so a slow moment hits all.

Speeds are given as a fraction of memcpy of the same buffer in the same rounds: 1 means as fast as copying the
gradient once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

__all__ = ["fastest_copy", "interleave", "least"]

Call = Callable[[], object]


def interleave(
    calls: Mapping[str, Call], *, rounds: int, clock: Callable[[], float] = time.thread_time
) -> dict[str, list[float]]:
    """Time calls against each other.

    Args:
        calls: the functions to time, by name. Each is run once before, so that nothing is compiled in a
            round.
        rounds: the number of samples of each.
        clock: a clock that gives seconds; `time.thread_time` leaves out the time in which other processes had
            the processor.

    Returns:
        Seconds of each call in each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, draw = list(calls), random.Random(0)
    for call in calls.values():
        call()
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            start = clock()
            calls[name]()
            seconds[name].append(clock() - start)
    return seconds


def least(seconds: Mapping[str, list[float]], name: str, than: str) -> float:
    """How many times faster `name` is than `than`, each at its best round: what other load disturbs least."""
    return min(seconds[than]) / max(min(seconds[name]), 1e-9)


def fastest_copy(x: Tensor, out: Tensor) -> tuple[str, Call]:
    """The faster of torch's and NumPy's copy of x to out: what memcpy means here.

    Args:
        x: a CPU tensor.
        out: another tensor of its shape and dtype.

    Returns:
        Its name and the call.
    """
    source, target = x.numpy(), out.numpy()
    copies: dict[str, Call] = {"torch": lambda: out.copy_(x), "numpy": lambda: np.copyto(target, source)}
    seconds = interleave(copies, rounds=9)
    name = min(copies, key=lambda name: min(seconds[name]))
    return name, copies[name]
