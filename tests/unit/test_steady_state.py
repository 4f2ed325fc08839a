"""After the first step a collective allocates no tensor of a bucket's size."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradq import wire
from gradq.collectives import (
    COLLECTIVES,
    Collective,
    LowRank,
    LowRankSegment,
    Segment,
    Setting,
    Step,
    TwoPhase,
)
from gradq.metrics import Metrics
from gradq.policy import FixedPolicy, ParameterInfo, Spec
from gradq.sync.feedback import Feedback

WORLD_SIZE = 3


class Arrived:
    def wait(self) -> None:
        pass


class Loopback:
    """A channel on which every peer sends what this rank has sent to itself."""

    def post(self, send: Sequence[Tensor], receive: Sequence[Tensor], header: wire.Header) -> Arrived:
        for peer in range(1, WORLD_SIZE):
            size = min(receive[peer].numel(), send[0].numel())
            receive[peer][:size].copy_(send[0][:size])
        return Arrived()


class Allocations(TorchDispatchMode):
    """Records operations that return memory none of their arguments had."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.large: list[str] = []
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [*args, *(kwargs or {}).values()]  # out= is among the latter
        before = {a.untyped_storage().data_ptr() for a in given if isinstance(a, Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            if storage.nbytes() > 2048 and storage.data_ptr() not in before | self.known:
                self.large.append(f"{func}: {storage.nbytes()} bytes")
        return result


def run(spec: str, kind: type[Collective], feedback: bool | str) -> tuple[list[str], list[str]]:
    shapes = [(300, 211), (4000,), (64, 64)]
    infos = [
        ParameterInfo(name=f"p{i}", shape=shape, dtype=torch.float32, index=i)
        for i, shape in enumerate(shapes)
    ]
    plan = FixedPolicy(spec=Spec.parse(spec), feedback=feedback).plan(infos)
    segments, start = [], 0
    for info in infos:
        entry = plan[info.name]
        if bool(entry.low_rank) == (kind is LowRank):
            segment = Segment(
                name=info.name,
                start=start,
                numel=info.numel,
                rotation=info.index,
                phase1=entry.phase1,
                phase2=entry.phase2,
                feedback1=entry.feedback1,
                feedback2=entry.feedback2,
            )
            if kind is LowRank:
                segment = LowRankSegment(
                    **vars(segment), matrix=info.matrix, low_rank=entry.low_rank, inner=TwoPhase
                )
            segments.append(segment)
        start += info.numel
    store = Feedback()
    channels = [Loopback(), Loopback()]
    setting = Setting(
        rank=0,
        world_size=WORLD_SIZE,
        seed=0,
        channels=channels,
        feedback=store,
        metrics=Metrics(),
        device=torch.device("cpu"),
    )
    flat = torch.randn(start)
    with Allocations([]) as first:
        collective = kind(segments, torch.float32, setting)
        for index in range(2):  # of low rank two steps differ
            for _ in collective.average(flat, Step(index, 0)):
                pass
            store.finish(True)
    with Allocations([]) as steady:
        for index in range(2, 5):
            for _ in collective.average(flat, Step(index, 0)):
                pass
            store.finish(True)
    return first.large, steady.large


@pytest.mark.parametrize("name", [name for name, entry in COLLECTIVES.items() if entry.for_models])
@pytest.mark.parametrize(
    ("spec", "feedback"),
    [
        ("int8", "auto"),
        ("int4+int4", True),
        ("int3", False),
        ("fp32", "auto"),
        ("bf16", "auto"),
        ("topk", "auto"),
    ],
)
def test_no_large_tensor_is_made_after_the_first_step(spec: str, feedback: bool | str, name: str) -> None:
    first, steady = run(spec, COLLECTIVES[name].of(WORLD_SIZE), feedback)
    assert first, "the test sees no allocation at all"
    assert not steady


def test_no_large_tensor_is_made_after_two_steps_of_low_rank() -> None:
    first, steady = run("powersgd:4", LowRank, "auto")
    assert first, "the test sees no allocation at all"
    assert not steady
