"""Golden trajectories: the losses of short training runs, for every trainer and codec, kept in a fixture.

Two runs on one machine are equal to the bit. On another processor matrix products are rounded differently,
and a gradient that falls on the other side of a rounding moves a code by one, so there the curves are held to
a tolerance. A fault moves them by more: `test_a_residual_that_is_lost_is_seen` shows by how much.

To write the fixture again, which is only right after a change that is meant to change what models learn::

    python tests/golden/test_trajectories.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradq
from gradq.testing import run_ranks

FIXTURE = Path(__file__).parents[1] / "fixtures" / "golden_losses.json"
STEPS = 20
# of the first loss; plain code of ATen (no AVX) was at most 5e-4 away from AVX-512 (int8 under FSDP2)
TOLERANCE = 3e-3

SPECS = ("none", "bf16", "int8", "int4", "rot4", "topk", "powersgd:4")
# low rank needs whole matrices; residuals of whole gradients are kept only where that is asked for
SHARDED: dict[str, tuple[tuple[str, Any], ...]] = {
    **dict.fromkeys(("none", "bf16", "int8", "int4", "rot4"), ()),
    "topk": (("feedback", True),),
}


@dataclass(frozen=True)
class Job:
    """One training run: a trainer, a spec, and what `compress` or `DiLoCo` takes besides."""

    trainer: str
    spec: str
    options: tuple[tuple[str, Any], ...] = ()
    loses_residuals: bool = False


GROUPS: dict[str, tuple[int, dict[str, Job]]] = {
    "ddp, direct, 2 ranks": (2, {spec: Job("ddp", spec) for spec in SPECS}),
    "ddp, two phases, 3 ranks": (
        3,
        {spec: Job("ddp", spec, (("collective", "two_phase"),)) for spec in SPECS},
    ),
    "fsdp2, 2 ranks": (2, {spec: Job("fsdp2", spec, options) for spec, options in SHARDED.items()}),
    "diloco, 2 ranks": (2, {spec: Job("diloco", spec, (("every", 4),)) for spec in SPECS}),
}

Curves = dict[str, list[list[float]]]  # of every job: by rank, by step


class Net(nn.Module):
    """A classifier with an embedding, a norm and matrices of unequal shapes: 24,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(64, 48)
        self.hidden, self.norm = nn.Linear(48, 160), nn.LayerNorm(160)
        self.middle, self.head = nn.Linear(160, 72), nn.Linear(72, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.tanh(self.hidden(self.tokens(tokens).mean(1))))
        return self.head(torch.relu(self.middle(x)))


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three tokens a row, two of them noise; the label is a function of the first."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens = torch.randint(64, (32, 3), generator=generator)
    tokens[:, 1:] //= 16
    return tokens, tokens[:, 0] * 7 % 16


def losses(rank: int, job: Job) -> list[float]:
    """One short run: this rank's loss in every step.

    By SGD: the first steps of Adam are the gradients' signs, which would magnify rounding errors.
    """
    model, options = Net(), dict(job.options)
    trained: nn.Module = model
    if job.trainer == "fsdp2":
        for layer in (model.hidden, model.middle, model):
            fully_shard(layer)
    if job.trainer == "ddp":
        trained = DistributedDataParallel(model, bucket_cap_mb=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    handle: gradq.HookState | gradq.DiLoCo
    if job.trainer == "diloco":
        handle = gradq.DiLoCo(model, optimizer, job.spec, seed=3, **options)
    else:
        handle = gradq.compress(trained, job.spec, seed=3, **options)
    if job.loses_residuals:
        feedback = handle.sync.feedback
        handle.sync.feedback.finish = lambda good: type(feedback).finish(feedback, False)
    curve = []
    for step in range(STEPS):
        tokens, labels = batch(rank, step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(trained(tokens), labels)
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
    handle.close()
    return curve


def all_losses(rank: int, jobs: list[Job]) -> list[list[float]]:
    return [losses(rank, job) for job in jobs]


def run(world_size: int, jobs: dict[str, Job], times: int = 1) -> list[Curves]:
    """Train every job some times, one after another."""
    every = [job for _ in range(times) for job in jobs.values()]
    by_rank = run_ranks(all_losses, world_size, every, timeout=500, group_timeout=300)
    return [
        {name: [curves[time * len(jobs) + number] for curves in by_rank] for number, name in enumerate(jobs)}
        for time in range(times)
    ]


def mean(curves: list[list[float]]) -> list[float]:
    """Over ranks, by step: what the fixture holds."""
    return [round(sum(losses) / len(losses), 6) for losses in zip(*curves, strict=True)]


def difference(curve: list[float], other: list[float]) -> float:
    """The largest difference of two curves, relative to where the second one starts."""
    return max(abs(a - b) for a, b in zip(curve, other, strict=True)) / other[0]


def golden(group: str) -> dict[str, list[float]]:
    """The curves of a group, by spec."""
    return json.loads(FIXTURE.read_text())[group]


@pytest.mark.timeout(1100)  # on a machine that has no kernels yet they are compiled here
@pytest.mark.parametrize("group", GROUPS)
def test_losses_are_those_of_the_fixture_and_of_a_second_run(group: str) -> None:
    first, second = run(*GROUPS[group], times=2)
    want = golden(group)
    assert want.keys() == first.keys()
    for name, curves in first.items():
        assert curves == second[name], f"{group}, {name}: two runs on one machine differ"
        far = difference(mean(curves), want[name])
        assert far < TOLERANCE, f"{group}, {name}: off by {far:.1e}"
        assert mean(curves)[-1] < 0.95 * mean(curves)[0], f"{group}, {name}: it does not learn"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("spec", ["topk", "powersgd:4"])
def test_a_residual_that_is_lost_is_seen(spec: str) -> None:
    """What is not sent is discarded in every step: the curve leaves the fixture by several tolerances."""
    job = Job("ddp", spec, (("collective", "two_phase"),), loses_residuals=True)
    curves = run(3, {spec: job})[0][spec]
    assert difference(mean(curves), golden("ddp, two phases, 3 ranks")[spec]) > 5 * TOLERANCE


if __name__ == "__main__":
    groups = {
        group: {name: mean(curves) for name, curves in run(*GROUPS[group])[0].items()} for group in GROUPS
    }
    lines = [
        f"{json.dumps(group)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(curve)}" for name, curve in curves.items())
        + "\n}"
        for group, curves in groups.items()
    ]
    FIXTURE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
