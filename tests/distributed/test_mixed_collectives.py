"""Parameters of one bucket that travel by different collectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from oracle import Net, expected, plan_for, run, slow_down
from test_contracts import backward, gradients, make, residuals

import gradq
from gradq.policy import Assignment, FixedPolicy, ParameterInfo, Spec
from gradq.testing import run_ranks


class Mixed:
    """The plan of a spec, its parameters by turns direct, two_phase and the model's own."""

    def plan(self, parameters: list[ParameterInfo]) -> dict[str, Assignment]:
        plan = FixedPolicy(spec=Spec.parse("int4+int4")).plan(parameters)
        names = ("direct", "two_phase", "auto")
        return {
            name: replace(entry, collective=names[index % 3])
            for index, (name, entry) in enumerate(plan.items())
        }


def on_real_ranks(world_size: int, job: dict) -> list:
    return run_ranks(run, world_size, job)


@pytest.mark.parametrize(
    ("world_size", "bucket_cap_mb"),
    [
        (3, 0.001),
        pytest.param(2, 0.001, marks=pytest.mark.slow),
        pytest.param(3, 25, marks=pytest.mark.slow),
        pytest.param(4, 0.02, marks=pytest.mark.slow),
    ],
)
def test_every_parameter_takes_its_own_collective(world_size: int, bucket_cap_mb: float) -> None:
    """A skew shuffles the timing. In one process all of them are in test_collectives.py."""
    check_mixed(world_size, bucket_cap_mb, on_real_ranks)


def check_mixed(world_size: int, bucket_cap_mb: float, run_job: Callable[[int, dict], list]) -> None:
    """Every layout gives what the oracle says, which knows of no buckets."""
    collective = "two_phase" if world_size == 3 else "direct"
    job = {"spec": Mixed(), "compress": {"collective": collective}, "skew": world_size, "steps": 4}
    job["ddp"] = {"find_unused_parameters": True, "bucket_cap_mb": bucket_cap_mb}
    results = run_job(world_size, job)
    plan = plan_for(Net(), Mixed())
    assert len({entry.collective for _, entry in plan.values()}) == 3
    want = expected([put_in for put_in, _, _ in results], plan, two_phase=collective == "two_phase")
    for rank, (_, came_out, _) in enumerate(results):
        for step, reduced in enumerate(came_out):
            for name, gradient in reduced.items():
                if not name.startswith("branch"):
                    assert torch.equal(gradient, want[step][name]), f"rank {rank}, step {step}, {name}"


class LastIsDirect:
    """Everything by two phases, but for the first layer, whose bucket DDP fills last."""

    def plan(self, parameters: list[ParameterInfo]) -> dict[str, Assignment]:
        plan = FixedPolicy(spec=Spec.parse("int4+int4")).plan(parameters)
        names = {True: "direct", False: "two_phase"}
        return {name: replace(entry, collective=names[name[0] == "0"]) for name, entry in plan.items()}


def poisoned_early(rank: int):
    model = make()
    handle = gradq.compress(model, LastIsDirect())
    backward(model, rank, 0)
    backward(model, rank, 1)
    slow_down(handle.sync.channels[1], 0.2)
    before = residuals(handle)
    if rank == 1:
        plant = dict(model.module.named_parameters())["2.weight"].register_hook(lambda g: g * float("nan"))
    backward(model, rank, 2)
    during, seen = residuals(handle), gradients(model)
    if rank == 1:
        plant.remove()
    backward(model, rank, 3)
    step = handle.sync.step
    handle.close()
    return before, during, seen, gradients(model), step


def test_the_last_bucket_waits_for_the_others_before_it_ends_the_step() -> None:
    """Its own exchange is over long before phase 2 brings the NaN of an earlier bucket."""
    results = run_ranks(poisoned_early, 3)
    for before, during, seen, after, step in results:
        assert step == 4
        assert sorted(before) == ["local 0.weight", "local 2.weight", "shard 2.weight"]
        assert not torch.isfinite(seen["module.2.weight"]).all()
        for name, residual in before.items():
            assert torch.equal(residual, during[name]), f"a step with a NaN changed the residual {name}"
        for name, gradient in after.items():
            assert torch.isfinite(gradient).all()
            assert torch.equal(gradient, results[0][3][name])
