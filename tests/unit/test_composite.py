"""Composite: stage by stage, and every chunk as many stages."""

from __future__ import annotations

import pytest
import torch

from gradq.collectives import Composite, Step
from gradq.collectives.base import Collective


class Posted:
    def __init__(self, log, what):
        self.log, self.what = log, what

    def wait(self):
        self.log.append(f"wait {self.what}")


class Member(Collective):
    """Logs what it does; num_channels exchanges."""

    def __init__(self, name, num_channels, log, num_stages=None):
        self.name, self.num_channels, self.log = name, num_channels, log
        self.segments, self.dtype, self.setting = (), torch.float32, None
        self.num_stages = num_channels if num_stages is None else num_stages

    def average(self, flat, step):
        for stage in range(self.num_stages):
            self.log.append(f"{self.name}{stage}")
            yield Posted(self.log, f"{self.name}{stage}")
        self.log.append(f"{self.name} ends")


def drive(composite):
    for pending in composite.average(torch.zeros(1), Step(0, 0)):
        pending.wait()


def test_stages_run_together_and_who_sends_most_goes_first():
    log = []
    drive(Composite([Member("a", 1, log), Member("b", 2, log), Member("c", 1, log)], 2))
    assert log == [
        *("b0", "a0", "c0", "wait b0", "wait a0", "wait c0"),
        *("b1", "a ends", "c ends", "wait b1"),
        "b ends",
    ]


@pytest.mark.parametrize("num_channels", [1, 2, 3])
def test_every_chunk_takes_as_many_stages(num_channels):
    composite = Composite([Member("a", num_channels, [])], 3)
    assert sum(1 for _ in composite.average(torch.zeros(1), Step(0, 0))) == 3


def test_a_member_with_fewer_stages_than_channels_is_fine_and_one_with_more_is_a_bug():
    log = []
    drive(Composite([Member("a", 2, log, num_stages=0), Member("b", 2, log)], 2))
    assert log[0] == "a ends"
    assert log[-1] == "b ends"
    with pytest.raises(AssertionError, match="more stages than it has channels"):
        drive(Composite([Member("a", 2, log, num_stages=3)], 2))


def test_what_a_member_raises_is_raised():
    class Broken(Member):
        def average(self, flat, step):
            yield Posted([], "")
            raise ValueError("deliberate")

    with pytest.raises(ValueError, match="deliberate"):
        drive(Composite([Member("a", 2, []), Broken("b", 2, [])], 2))
