"""LocalSGD and DiLoCo on real ranks, against an outer loop written out in plain words."""

from __future__ import annotations

import functools
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from oracle import expected, plan_for
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradq
from gradq.local_steps.fragments import cut
from gradq.testing import run_ranks

EVERY = 6
# name: outer optimizer, spec, fragments, delay, other options
JOBS = {
    "mean fp32": ("LocalSGD", "fp32", 1, 0, {}),
    "mean int8": ("LocalSGD", "int8", 2, 0, {}),
    "outer fp32": ("DiLoCo", "fp32", 1, 0, {}),
    "outer int4": ("DiLoCo", "int4", 1, 0, {"outer_lr": 0.5, "outer_momentum": 0.8}),
    "outer int4 delayed": ("DiLoCo", "int4", 1, 4, {}),
    "streaming int4": ("DiLoCo", "int4", 3, 0, {}),
    "streaming int4 delayed": ("DiLoCo", "int4", 3, 2, {}),
    "streaming int8 with feedback": ("DiLoCo", "int8", 3, 1, {"feedback": True}),
    "two phases": ("DiLoCo", "int4+int4", 2, 1, {"collective": "two_phase"}),
    "plain all-reduce": ("DiLoCo", "none", 2, 1, {}),
}


def make(width: int = 70) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(50, width), nn.Tanh(), nn.Linear(width, 90), nn.Tanh(), nn.Linear(90, 8))


def wrap(model: nn.Module, optimizer: torch.optim.Optimizer | None, job: tuple) -> gradq.LocalSGD:
    outer, spec, fragments, delay, options = job
    kind = {"LocalSGD": gradq.LocalSGD, "DiLoCo": gradq.DiLoCo}[outer]
    return kind(model, optimizer, spec, every=EVERY, fragments=fragments, delay=delay, **options)


def inner_step(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(100 * step + rank)
    model(torch.randn(6, 50, generator=generator)).square().mean().backward()
    optimizer.step()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def spy(local: gradq.LocalSGD) -> tuple[list[dict], list[dict]]:
    """Note what goes into the average and what comes out, by step of the sync and parameter."""
    put_in: list[dict[str, Tensor]] = []
    came_out: list[dict[str, Tensor]] = []
    average = local.sync.average

    def watched(flat, names, *, index):
        numels = [local.sync.parameters[name].numel for name in names]
        put_in.append({n: part.clone() for n, part in zip(names, flat.split(numels), strict=True)})
        future = average(flat, names, index=index)
        future.wait()
        came_out.append({n: part.clone() for n, part in zip(names, flat.split(numels), strict=True)})
        return future

    local.sync.average = watched
    return put_in, came_out


def train(rank: int, jobs: dict[str, tuple], steps: int = 3 * EVERY + 1) -> dict[str, tuple]:
    """Train with every job; returns the averages, the parameters after every step, and the end."""
    outcomes = {}
    for name, job in jobs.items():
        model = make()
        if rank:
            with torch.no_grad():
                for p in model.parameters():
                    p += rank  # rank 0's are given to all
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        local = wrap(model, optimizer, job)
        put_in, came_out = spy(local)
        history = [snapshot(model)]
        for step in range(steps):
            inner_step(model, optimizer, rank, step)
            history.append(snapshot(model))
        local.synchronize()
        end, stats = snapshot(model), local.stats()
        local.close()
        optimizer.step()  # no longer averaged
        outcomes[name] = (put_in, came_out, history, end, stats)
    return outcomes


def check_averages(results: list[tuple], job: tuple) -> None:
    """Every average is, to the bit, what the oracle makes of what all ranks put in."""
    _, spec, _, _, options = job
    world_size = len(results)
    put_in, came_out = [result[0] for result in results], [result[1] for result in results]
    if spec == "none":
        for step, averages in enumerate(came_out[0]):
            for name, mean in averages.items():
                rows = torch.stack([p[step][name] for p in put_in])
                atol = 1e-6 * float(rows.abs().max())  # the mean may nearly cancel
                torch.testing.assert_close(mean, rows.mean(0), rtol=1e-6, atol=atol)
    else:
        plan = plan_for(make(), spec, **{k: v for k, v in options.items() if k == "feedback"})
        two_phase = options.get("collective") == "two_phase"
        want = expected(put_in, plan, two_phase=two_phase)
        for step, averages in enumerate(came_out[0]):
            for name, mean in averages.items():
                assert torch.equal(mean, want[step][name]), (world_size, job, step, name)
    for other in came_out[1:]:
        for mine, theirs in zip(came_out[0], other, strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


class Reference:
    """All ranks in one process: W models, their inner optimizers, and the outer loop in plain words."""

    def __init__(self, world_size: int, job: tuple) -> None:
        outer, _, self.fragments, self.delay, options = job
        self.models = [make() for _ in range(world_size)]
        self.optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in self.models]
        self.anchors = snapshot(self.models[0])
        owners = cut([p.numel() for p in self.anchors.values()], self.fragments)
        self.names = [
            [name for name, owner in zip(self.anchors, owners, strict=True) if owner == fragment]
            for fragment in range(self.fragments)
        ]
        lr, momentum = options.get("outer_lr", 0.7), options.get("outer_momentum", 0.9)
        if outer == "LocalSGD":
            lr, momentum = 1.0, 0.0
        self.outer = [
            torch.optim.SGD([self.anchors[n] for n in names], lr=lr, momentum=momentum, nesterov=momentum > 0)
            for names in self.names
        ]
        self.under_way: tuple[int, int, list[dict[str, Tensor]]] | None = None

    def step(self, step: int, put_in: list[dict[str, Tensor]], means: list[dict[str, Tensor]]) -> None:
        """One inner step; fills put_in with what is averaged now, takes the outcome from means."""
        for rank, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
            inner_step(model, optimizer, rank, step)
        if self.under_way and self.under_way[1] == step + 1:
            self.apply(means.pop(0))
        for fragment in range(self.fragments):
            if (step + 1) % EVERY == (fragment + 1) * EVERY // self.fragments % EVERY:
                names = self.names[fragment]
                sent = [{n: p for n, p in snapshot(model).items() if n in names} for model in self.models]
                put_in.append([{n: (self.anchors[n] - p).flatten() for n, p in own.items()} for own in sent])
                self.under_way = (fragment, step + 1 + self.delay, sent)
                if not self.delay:
                    self.apply(means.pop(0))

    def apply(self, mean: dict[str, Tensor]) -> None:
        fragment, _, sent = self.under_way
        self.under_way = None
        for name in self.names[fragment]:
            self.anchors[name].grad = mean[name].view_as(self.anchors[name])
        self.outer[fragment].step()
        for model, own in zip(self.models, sent, strict=True):
            for name, p in model.named_parameters():
                if name in own:
                    learned = p.detach() - own[name] if self.delay else torch.zeros_like(p)
                    p.data = learned + self.anchors[name]


def check_steps(results: list[tuple], job: tuple) -> None:
    """Every parameter of every rank after every step is, to the bit, the reference's."""
    torch.set_num_threads(1)
    reference = Reference(len(results), job)
    means = [dict(mean) for mean in results[0][1]]
    put_in: list[list[dict[str, Tensor]]] = []
    for step in range(len(results[0][2]) - 1):
        reference.step(step, put_in, means)
        for rank, (model, result) in enumerate(zip(reference.models, results, strict=True)):
            for name, p in snapshot(model).items():
                assert torch.equal(p, result[2][step + 1][name]), (job, rank, step, name)
    for number, everyone in enumerate(put_in):
        for rank, own in enumerate(everyone):
            for name, sent in own.items():
                assert torch.equal(sent, results[rank][0][number][name]), (job, rank, number, name)
    for result in results:
        assert all(torch.equal(p, results[0][3][name]) for name, p in result[3].items())


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow), 3])
def test_every_average_and_every_step_is_predicted_to_the_bit(world_size: int) -> None:
    results = run_ranks(train, world_size, JOBS)
    for name, job in JOBS.items():
        check_averages([result[name] for result in results], job)
        check_steps([result[name] for result in results], job)


def bytes_sent(rank: int) -> gradq.Stats:
    model = nn.Linear(512, 300)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    local = gradq.DiLoCo(model, optimizer, "int4", every=30)
    for _ in range(60):
        model(torch.randn(4, 512)).square().mean().backward()
        optimizer.step()
    stats = local.stats()
    local.close()
    return stats


def test_int4_sends_a_hundredth_of_dense_steps_and_less() -> None:
    for stats in run_ranks(bytes_sent, 2):
        assert stats.steps == 60
        assert stats.dense_bytes == 60 * 4 * (512 * 300 + 300)
        assert 30 * 7 < stats.ratio < 30 * 8


def poisoned(rank: int, spec: str, value: float) -> tuple[bool, bool, list[bool]]:
    """One rank's parameter turns NaN or Inf."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    local = gradq.LocalSGD(model, optimizer, spec, every=2, fragments=2, feedback=spec == "int4")
    for step in range(4):
        inner_step(model, optimizer, rank, step)
    kept = {n: local.sync.feedback.local.current(n).clone() for n in local.sync.feedback.local.names()}
    if rank == 1:
        with torch.no_grad():
            model[2].weight[3, 4] = value
    for _ in range(2):
        local.step()
    same = {n: torch.equal(r, local.sync.feedback.local.current(n)) for n, r in kept.items()}
    finite = [bool(torch.isfinite(p).all()) for p in model.parameters()]
    local.close()
    return finite[2], same.get("2.weight", True), finite


@pytest.mark.parametrize(
    "spec",
    [pytest.param("fp32", marks=pytest.mark.slow), pytest.param("int8", marks=pytest.mark.slow), "int4"],
)
def test_non_finite_is_seen_everywhere_and_never_remembered(spec: str) -> None:
    for value in (float("nan"), float("inf")) if spec == "int4" else (float("nan"),):
        for weight_is_finite, same, finite in run_ranks(poisoned, 3, spec, value):
            assert not weight_is_finite
            assert same, "the residual of the poisoned step was kept"
            assert finite.count(False) == 1, "other parameters were poisoned"


# --- checkpoints ---------------------------------------------------------------------------------------

RESUMED = {
    "between outer steps": (("DiLoCo", "int4", 1, 0, {}), 8),
    "streaming, with an average under way": (("DiLoCo", "int4+int4", 3, 2, {"collective": "two_phase"}), 9),
    "the plain mean": (("LocalSGD", "int8", 2, 0, {}), 7),
}


def save(rank: int, folder: str, job: tuple, steps: int) -> tuple:
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.7)
    local = wrap(model, optimizer, job)
    for step in range(steps):
        inner_step(model, optimizer, rank, step)
        scheduler.step()
    dcp.save({"gradq": local.state_dict()}, checkpoint_id=folder)
    under_way = local.pending is not None
    before = snapshot(model)
    for step in range(steps, steps + 2 * EVERY):
        inner_step(model, optimizer, rank, step)
    local.close()
    return before, snapshot(model), under_way


def resume(rank: int, folder: str, job: tuple, steps: int) -> tuple:
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)  # the saved rate counts
    local = wrap(model, optimizer, job)
    gradq.load_checkpoint(local, folder)
    before = snapshot(model)
    for step in range(steps, steps + 2 * EVERY):
        inner_step(model, optimizer, rank, step)
    residual = local.sync.feedback.local.names()
    local.synchronize()
    local.close()
    return before, snapshot(model), local.inner_step, residual


@pytest.mark.parametrize("what", RESUMED)
def test_resume_continues_bit_for_bit(tmp_path: Path, what: str) -> None:
    job, steps = RESUMED[what]
    saved = run_ranks(save, 3, str(tmp_path / "c"), job, steps)
    assert all(under_way == (job[3] > 0) for _, _, under_way in saved)
    assert not torch.equal(saved[0][0]["0.weight"], saved[1][0]["0.weight"])
    resumed = run_ranks(resume_exactly, 3, str(tmp_path / "c"), job, steps)
    for (before, after, _), (before_again, after_again) in zip(saved, resumed, strict=True):
        for name in before:
            assert torch.equal(before[name], before_again[name]), name
            assert torch.equal(after[name], after_again[name]), name


def resume_exactly(rank: int, folder: str, job: tuple, steps: int) -> tuple:
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    local = wrap(model, optimizer, job)
    gradq.load_checkpoint(local, folder)
    before = snapshot(model)
    for step in range(steps, steps + 2 * EVERY):
        inner_step(model, optimizer, rank, step)
    local.close()
    return before, snapshot(model)


@pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_ranks_join_and_leave_between_runs(tmp_path: Path, world_size: int) -> None:
    job, steps = RESUMED["streaming, with an average under way"]
    saved = run_ranks(save, 3, str(tmp_path / "c"), job, steps)
    results = run_ranks(resume, world_size, str(tmp_path / "c"), job, steps)
    for before, after, inner_step_count, residual in results:
        for name, p in before.items():
            mean = torch.stack([own[0][name] for own in saved]).mean(0)
            assert torch.equal(p, mean), f"{name} is not the mean of the old ranks'"
        assert inner_step_count == steps + 2 * EVERY
        assert residual or world_size == 1
        for name, p in after.items():
            assert torch.isfinite(p).all()
            assert torch.equal(p, results[0][1][name])


def load_flipped(rank: int, folder: str, count: int) -> int:
    """Load copies of a checkpoint with one flipped byte each: it is refused, or loaded as it was saved."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    local = wrap(model, optimizer, RESUMED["streaming, with an average under way"][0])
    gradq.load_checkpoint(local, f"{folder}/good")
    good, refused = snapshot(model), 0
    for number in range(count):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        message = ""
        try:
            gradq.load_checkpoint(local, f"{folder}/{number}")
        except gradq.CheckpointError as error:
            message = str(error)
        found = snapshot(model)
        if message:
            refused += 1
            assert f"{folder}/{number}" in message
            assert not any(parameter.any() for parameter in found.values()), "nothing is changed"
        else:
            assert all(torch.equal(parameter, good[name]) for name, parameter in found.items()), number
    local.close()
    return refused


def test_a_flipped_byte_of_any_entry_is_found(tmp_path: Path) -> None:
    job, steps = RESUMED["streaming, with an average under way"]
    run_ranks(save, 2, str(tmp_path / "good"), job, steps)
    count = 24
    for number in range(count):
        shutil.copytree(tmp_path / "good", tmp_path / str(number))
        shard = tmp_path / str(number) / f"__{number % 2}_0.distcp"
        data = bytearray(shard.read_bytes())
        data[random.Random(number).randrange(len(data))] ^= 8
        shard.write_bytes(data)
    first, second = run_ranks(load_flipped, 2, str(tmp_path), count)
    assert first == second
    assert first > count // 2, "most bytes are of tensors"


# --- what cannot work ----------------------------------------------------------------------------------


def all_odd(rank: int, cases: list[str]) -> dict[str, str]:
    return {what: odd(rank, what) for what in cases}


@functools.cache
def odd_messages() -> list[dict[str, str]]:
    """What each rank was told in each case."""
    return run_ranks(all_odd, 2, list(WORDS))


def odd(rank: int, what: str) -> str:
    model = make()
    optimizer: object = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict = {"every": 4}
    try:
        if what == "ddp":
            gradq.DiLoCo(DistributedDataParallel(model), optimizer, **options)
        elif what == "frozen":
            gradq.DiLoCo(model.requires_grad_(False), optimizer, **options)
        elif what == "complex":
            gradq.DiLoCo(nn.Linear(4, 4).to(torch.complex64), optimizer, **options)
        elif what == "optimizer":
            gradq.DiLoCo(model, model.parameters(), **options)
        elif what == "sharded":
            from torch.distributed.fsdp import fully_shard

            gradq.DiLoCo(fully_shard(model), None, **options)
        elif what == "disagree":
            gradq.DiLoCo(model, optimizer, every=4 + rank)
        elif what == "outer":
            gradq.DiLoCo(model, optimizer, outer_lr=0.7 if rank else 0.5, **options)
        elif what == "one rank":
            gradq.DiLoCo(model, optimizer, **(options | ({"delay": 9} if rank else {})))
        elif what == "load":
            local = gradq.DiLoCo(model, optimizer, **options)
            gradq.load_checkpoint(local, "nowhere")
        else:
            gradq.DiLoCo(model, optimizer, **(options | WRONG[what]))
    except gradq.GradqError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


WRONG = {
    "every": {"every": 0},
    "fragments": {"fragments": 5},
    "too many fragments": {"every": 40, "fragments": 7},
    "delay": {"fragments": 2, "delay": 3},
    "spec": {"spec": "int9"},
}


WORDS = {
    "ddp": ["UnsupportedError", "DistributedDataParallel", "plain module"],
    "frozen": ["UnsupportedError", "nothing to average"],
    "complex": ["UnsupportedError", "weight", "complex64"],
    "optimizer": ["UnsupportedError", "generator", "step()"],
    "sharded": ["UnsupportedError", "0.weight", "DTensor"],
    "disagree": ["MismatchError", "every=4", "every=5", "rank 1"],
    "outer": ["MismatchError", "outer_lr=0.5", "outer_lr=0.7"],
    "one rank": ["rank 1 cannot start", "delay=9"],
    "load": ["CheckpointError", "nowhere"],
    "every": ["ConfigError", "every=0"],
    "fragments": ["ConfigError", "fragments=5", "every=4"],
    "too many fragments": ["ConfigError", "fragments=7", "6 parameters"],
    "delay": ["ConfigError", "delay=3", "every // fragments = 2"],
    "spec": ["SpecError", "int9"],
}


@pytest.mark.parametrize("what", WORDS)
def test_what_cannot_work_is_named(what: str) -> None:
    messages = [message[what] for message in odd_messages()]
    for message in messages[: 1 if what == "one rank" else 2]:
        for word in WORDS[what]:
            assert word in message, message


def test_no_process_group_is_named() -> None:
    model = make()
    with pytest.raises(gradq.ConfigError, match="init_process_group"):
        gradq.DiLoCo(model, torch.optim.SGD(model.parameters(), lr=0.1), every=2)


@pytest.mark.parametrize(
    ("numels", "count"), [([1], 1), ([5, 5, 5, 5], 2), ([1000, 1, 1], 3), ([1, 1, 1000], 3)]
)
def test_fragments_are_in_order_and_none_is_empty(numels: list[int], count: int) -> None:
    owners = cut(numels, count)
    assert owners == sorted(owners)
    assert set(owners) == set(range(count))


def test_fragments_are_about_equal() -> None:
    assert cut([10] * 12, 4) == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


def half(rank: int) -> tuple:
    """A bf16 model, manual steps, a buffer, a frozen and an fp64 parameter."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(50, 70), nn.BatchNorm1d(70), nn.Linear(70, 40)).bfloat16()
    model[2].double()
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    local = gradq.DiLoCo(model, None, "int8", every=2, fragments=2)
    start = {name: t.clone() for name, t in model.state_dict().items()}
    for step in range(4):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(10 * step + rank)
        hidden = model[1](model[0](torch.randn(6, 50, generator=generator).bfloat16()))
        model[2](hidden.double()).square().mean().backward()
        optimizer.step()
        local.step()
    local.synchronize()
    end, name = {name: t.clone() for name, t in model.state_dict().items()}, repr(local)
    local.close()
    return start, end, name


def test_other_dtypes_buffers_and_steps_of_ones_own() -> None:
    first, second = run_ranks(half, 2)
    assert all(torch.equal(t, second[0][name]) for name, t in first[0].items() if name != "0.bias")
    for name, t in first[1].items():
        if name != "0.bias" and "running" not in name:
            assert torch.equal(t, second[1][name]), name
    assert not torch.equal(first[1]["1.running_mean"], second[1]["1.running_mean"])
    assert not torch.equal(first[1]["2.weight"], first[0]["2.weight"])
    assert "DiLoCo, every=2, fragments=2" in first[2]


def lost(rank: int) -> str:
    """A peer dies between two averages."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradq.LocalSGD(model, optimizer, "int8", every=3)
    for step in range(3):
        if rank == 1 and step == 2:
            os._exit(0)
        try:
            inner_step(model, optimizer, rank, step)
        except gradq.PeerError as error:
            dist.destroy_process_group()
            return str(error)
    return "no error"


def test_a_lost_rank_is_an_error_in_the_inner_optimizers_step() -> None:
    message, _ = run_ranks(lost, 2, expect_exit=(1,), group_timeout=10)
    assert "rank 1 failed in step 0" in message
