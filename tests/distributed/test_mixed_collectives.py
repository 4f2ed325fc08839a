"""Parameters of one bucket that travel by different collectives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracle import Net, expected, plan_for, run

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


LAYOUTS = {"tiny buckets": 0.001, "small buckets": 0.02, "one bucket": 25}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_parameter_takes_its_own_collective(world_size: int, layout: str) -> None:
    """Every layout gives what the oracle says, which knows of no buckets.

    A skew shuffles the timing, and phase 2 is slow: a bucket without one must not end the step before others.
    """
    collective = "two_phase" if world_size == 3 else "direct"
    job = {"spec": Mixed(), "compress": {"collective": collective}, "skew": world_size, "steps": 4}
    job["slow_phase2"] = 0.01
    job["ddp"] = {"find_unused_parameters": True, "bucket_cap_mb": LAYOUTS[layout]}
    results = run_ranks(run, world_size, job)
    plan = plan_for(Net(), Mixed())
    assert len({entry.collective for _, entry in plan.values()}) == 3
    want = expected([put_in for put_in, _, _ in results], plan, two_phase=collective == "two_phase")
    for rank, (_, came_out, _) in enumerate(results):
        for step, gradients in enumerate(came_out):
            for name, gradient in gradients.items():
                if not name.startswith("branch"):
                    assert torch.equal(gradient, want[step][name]), f"rank {rank}, step {step}, {name}"
