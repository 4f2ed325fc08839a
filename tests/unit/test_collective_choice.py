"""Which collective a name stands for, and the steps of GradientSync, on ranks of one process."""

from __future__ import annotations

import time

import pytest
import torch

from gradq.codecs import from_spec
from gradq.collectives import Direct, Hierarchical, TwoPhase, choose
from gradq.errors import ConfigError
from gradq.options import SyncConfig
from gradq.policy import Assignment, ParameterInfo
from gradq.sync.gradient_sync import GradientSync
from gradq.testing import InProcessGroup, run_in_process

INFOS = [
    ParameterInfo(name=f"p{index}", shape=(64, 64), dtype=torch.float32, index=index) for index in range(2)
]


class Asks:
    """A policy that names a collective for the first parameter."""

    def __init__(self, collective: str) -> None:
        self.collective = collective

    def plan(self, parameters):
        codec = from_spec("int8")
        plain = Assignment(phase1=codec, phase2=codec)
        return {p.name: plain for p in parameters} | {
            "p0": Assignment(phase1=codec, phase2=codec, collective=self.collective)
        }


def test_names() -> None:
    assert choose("auto", 2) is Direct
    assert choose("auto", 3, 1 << 20) is TwoPhase
    assert choose("auto", 3, plain=Hierarchical) is Hierarchical
    assert choose("sparse", 4, plain=TwoPhase) is Direct
    assert choose("hierarchical", 4, plain=Hierarchical) is Hierarchical
    for name in ("sparse", "low_rank", "ring"):
        with pytest.raises(ConfigError, match=r"choose from auto, direct, two_phase, hierarchical$"):
            choose(name, 4)


def refused(group: InProcessGroup, collective: str, config: SyncConfig) -> str:
    try:
        GradientSync(INFOS, Asks(collective), "asks", group, config).close()
    except ConfigError as error:
        return str(error)
    return ""


def test_a_parameter_is_hierarchical_only_where_the_model_is() -> None:
    for text in run_in_process(refused, 4, "hierarchical", SyncConfig()):
        assert 'pass collective="hierarchical" to gradq.compress too' in text
    hierarchical = SyncConfig(collective="hierarchical", local_world_size=2)
    assert run_in_process(refused, 4, "hierarchical", hierarchical) == [""] * 4
    assert run_in_process(refused, 4, "direct", hierarchical) == [""] * 4


def test_a_step_begins_and_ends_when_it_is_said() -> None:
    """Whatever the numbers of the buckets; the residuals are committed when the last future is done."""

    def steps(group: InProcessGroup) -> list[tuple[int, bool]]:
        policy = Asks("direct")
        sync, seen = GradientSync(INFOS, policy, "asks", group, SyncConfig()), []
        for number in (5, 0):
            sync.begin_step()
            with pytest.raises(ConfigError, match="a step that has ended"):
                sync.discard_step()
            for index, name in ((number, "p1"), (number + 1, "p0")):
                last = sync.average(torch.ones(64 * 64), [name], index=index)
            last.wait()
            seen.append((sync.step, sync.stats().steps == sync.step))
            sync.end_step(last).wait()
            sync.discard_step()
            seen.append((sync.step, sync.stats().steps == sync.step))
        sync.close()
        return seen

    for seen in run_in_process(steps, 3):
        assert seen == [(0, True), (1, True), (1, True), (2, True)]


def test_a_bucket_that_cannot_be_made_ends_all_ranks_at_once() -> None:
    def step(group: InProcessGroup) -> str:
        sync = GradientSync(INFOS, Asks("direct"), "asks", group, SyncConfig())

        def buckets():
            yield torch.ones(64 * 64), ["p0"]
            if group.rank() == 1:
                raise ZeroDivisionError("deliberate")
            yield torch.ones(64 * 64), ["p1"]

        try:
            for future in sync.average_buckets(buckets()):
                future.wait()
        except (ZeroDivisionError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    start = time.monotonic()
    told = run_in_process(step, 3, timeout=60)
    assert time.monotonic() - start < 30
    assert told[1] == "ZeroDivisionError: deliberate"
    for rank in (0, 2):
        assert "rank 1 gave up: ZeroDivisionError: deliberate" in told[rank]


@pytest.mark.parametrize("world_size", [1, 2])
def test_none_and_closed_are_two_things(world_size: int) -> None:
    def plain(group: InProcessGroup) -> tuple[bool, ...]:
        none = GradientSync(INFOS, None, "none", group, SyncConfig())
        open_one = GradientSync(INFOS, Asks("direct"), "asks", group, SyncConfig())
        before = (none.is_plain, none.closed, open_one.is_plain, open_one.closed)
        open_one.close()
        flat = torch.full((64 * 64,), 1.0 + group.rank())
        open_one.average_buckets([(flat, [])])[0].wait()
        assert torch.equal(flat, torch.full_like(flat, (1 + world_size) / 2))
        none.close()
        return (*before, open_one.is_plain, open_one.closed, open_one.plan.keys() == {"p0", "p1"})

    for seen in run_in_process(plain, world_size):
        assert seen == (True, False, False, False, True, True, True)
