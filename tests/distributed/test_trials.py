"""Random trials: buckets, ranks, specs and timing. No hang, no wrong byte, equal replicas."""

from __future__ import annotations

import random
import time

import pytest
import torch
from oracle import expected
from torch import Tensor

from gradq.options import SyncConfig
from gradq.policy import Assignment, FixedPolicy, ParameterInfo, Spec
from gradq.sync.gradient_sync import GradientSync
from gradq.testing import run_ranks

SPECS = ["int8", "int4", "int4+int4", "int3+int8", "int5", "int6+int2", "bf16", "fp32", "int4(block_size=64)"]
SPECS += ["topk(percent=5,block_size=256)", "powersgd:2", "powersgd:3+int4+int4"]


def trial(rng: random.Random) -> dict:
    """One random model, split into buckets at random, differently in every step."""
    shapes = [
        (rng.choice([1, 3, 31, 64, 257]), rng.choice([1, 17, 64, 300]))
        if rng.random() < 0.7
        else (rng.randrange(1, 3000),)
        for _ in range(rng.randrange(1, 9))
    ]
    steps = rng.randrange(1, 4)
    layouts = []
    for _ in range(steps):
        order = list(range(len(shapes)))
        rng.shuffle(order)
        cuts = (
            sorted(rng.sample(range(1, len(order)), rng.randrange(0, len(order)))) if len(order) > 1 else []
        )
        layouts.append([order[a:b] for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True)])
    return {
        "shapes": shapes,
        "layouts": layouts,
        "spec": rng.choice(SPECS),
        "collective": rng.choice(["direct", "two_phase"]),
        "exact": rng.choice(["default", "nothing"]),
        "seed": rng.randrange(1 << 40),
        "chunk_numel": rng.choice([40, 500, 1 << 19]),
        "skew_ms": rng.choice([0, 2, 10]),
    }


def nothing(parameter: ParameterInfo) -> bool:
    return False


def infos_and_policy(job: dict) -> tuple[list[ParameterInfo], FixedPolicy]:
    infos = [
        ParameterInfo(name=f"p{i}", shape=shape, dtype=torch.float32, index=i)
        for i, shape in enumerate(job["shapes"])
    ]
    exact = nothing if job["exact"] == "nothing" else ()
    return infos, FixedPolicy(spec=Spec.parse(job["spec"]), exact=exact)


def gradient(job: dict, rank: int, step: int, index: int, numel: int) -> Tensor:
    generator = torch.Generator().manual_seed(hash((job["seed"], rank, step, index)) & 0x7FFFFFFF)
    return torch.randn(numel, generator=generator) * 10.0 ** ((index * 7 + step) % 9 - 6)


def run(rank: int, jobs: list[dict]) -> list[list[dict[str, Tensor]]]:
    group = torch.distributed.group.WORLD
    outcomes = []
    for job in jobs:
        infos, policy = infos_and_policy(job)
        config = SyncConfig(seed=job["seed"], collective=job["collective"], chunk_numel=job["chunk_numel"])
        sync = GradientSync(infos, policy, job["spec"], group, config)
        delays = random.Random(job["seed"] + rank)
        collectives = []
        steps = []
        for step, layout in enumerate(job["layouts"]):
            futures = []
            sync.begin_step()
            for index, members in enumerate(layout):
                flat = torch.cat([gradient(job, rank, step, i, infos[i].numel) for i in members])
                sleep(delays, job["skew_ms"])
                names = [infos[i].name for i in members]
                futures.append(sync.average(flat, names, index=index))
                for bucket in sync._layouts.values():  # sleeps between the stages, too
                    for chunk in bucket.chunks:
                        if chunk.collective not in collectives:
                            collectives.append(chunk.collective)
                            slow_down(chunk.collective, delays, job["skew_ms"])
            futures[-1] = sync.end_step(futures[-1])
            step_outcome = {}
            for members, future in zip(layout, futures, strict=True):
                parts = future.wait().split([infos[i].numel for i in members])
                step_outcome |= {infos[i].name: part.clone() for i, part in zip(members, parts, strict=True)}
            steps.append(step_outcome)
        sync.close()
        outcomes.append(steps)
    return outcomes


def sleep(delays: random.Random, most_ms: float) -> None:
    if most_ms and delays.random() < 0.5:
        time.sleep(delays.random() * most_ms / 1e3)


def slow_down(collective, delays: random.Random, most_ms: float) -> None:
    inner = collective.post

    def post(*args):
        sleep(delays, most_ms)
        return inner(*args)

    collective.post = post


def check(world_size: int, count: int, seed: int) -> None:
    rng = random.Random(seed)
    jobs = [trial(rng) for _ in range(count)]
    results = run_ranks(run, world_size, jobs, timeout=300 + count)
    for number, job in enumerate(jobs):
        infos, policy = infos_and_policy(job)
        put_in = [
            [
                {info.name: gradient(job, rank, step, info.index, info.numel) for info in infos}
                for step in range(len(job["layouts"]))
            ]
            for rank in range(world_size)
        ]
        plan: dict[str, tuple[ParameterInfo, Assignment]] = {}
        for info in infos:
            plan[info.name] = (info, policy.plan(infos)[info.name])
        want = expected(put_in, plan, two_phase=job["collective"] == "two_phase", seed=job["seed"])
        for rank in range(world_size):
            for step, outcome in enumerate(results[rank][number]):
                for name, value in outcome.items():
                    assert torch.equal(value, want[step][name]), (seed, number, job, rank, step, name)
                    assert torch.equal(value, results[0][number][step][name])


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_random_trials(world_size: int) -> None:
    check(world_size, 12, seed=world_size)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_three_hundred_random_trials(world_size: int) -> None:
    check(world_size, 100, seed=1000 + world_size)
