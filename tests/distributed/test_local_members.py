"""Local steps where what is trained changes: frozen at first, unfrozen, frozen, added, removed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import gradq
from gradq.testing import run_ranks

WIDTH, EVERY = 40, 4


class Odd(nn.Module):
    """A frozen layer, a scalar, an empty parameter, statistics, a buffer of whole numbers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.scale = nn.Parameter(torch.tensor(1.0 + 0.1 * seed))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.codes = nn.Parameter(torch.randint(0, 99, (5, 3), dtype=torch.uint8), requires_grad=False)
        self.register_buffer("mask", torch.rand(WIDTH) > 0.5)
        self.register_buffer("phase", torch.randn(3, dtype=torch.complex64), persistent=False)
        self.first.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x)))) * self.scale * self.mask


def everything(model: nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 * step + rank)
        optimizer.zero_grad()
        model(torch.randn(8, WIDTH, generator=generator)).square().mean().backward()
        optimizer.step()


def started(rank: int, spec: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Ranks that built their models by seeds of their own."""
    model = Odd(seed=rank)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    local = gradq.LocalSGD(model, optimizer, spec, every=EVERY)
    start = everything(model)
    train(model, optimizer, rank, range(EVERY))
    end = everything(model)
    local.close()
    return start, end


@pytest.mark.parametrize("spec", ["fp32", "int4"])
def test_all_start_with_what_rank_0_has(spec: str) -> None:
    """Frozen parameters and buffers of any dtype too. Buffers are each rank's own afterwards."""
    first, second = run_ranks(started, 2, spec)
    for name, value in first[0].items():
        assert torch.equal(value, second[0][name]), name
        if name.startswith(("first", "codes", "nothing", "mask", "phase")):
            assert torch.equal(value, first[1][name]), name
    for name in ("second.weight", "scale", "norm.weight"):
        assert torch.equal(first[1][name], second[1][name]), name
        assert not torch.equal(first[1][name], first[0][name]), name
    assert not torch.equal(first[1]["norm.running_mean"], second[1]["norm.running_mean"])


# --- changes on the way -----------------------------------------------------------------------------------


class Net(nn.Module):
    """Three layers; `extra` is added on the way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.extra: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x if self.extra is None else self.extra(x)


def change(model: Net, what: str, optimizer: torch.optim.Optimizer) -> None:
    if what == "unfreeze":
        model.layers[0].requires_grad_(True)
    elif what == "freeze":
        model.layers[2].requires_grad_(False)
    elif what == "swap":
        model.layers[0].requires_grad_(True)
        model.layers[2].requires_grad_(False)
    elif what == "add":
        model.extra = nn.Linear(WIDTH, WIDTH)
        optimizer.add_param_group({"params": list(model.extra.parameters())})
    elif what == "remove":
        del model.layers[2]
    elif what == "replace":
        model.layers[1].weight = nn.Parameter(model.layers[1].weight.detach().clone())
        optimizer.add_param_group({"params": [model.layers[1].weight]})
    elif what == "all frozen":
        model.requires_grad_(False)


def changed(rank: int, whats: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """Train, change what is trained between two averages, train on; the same on all ranks."""
    outcomes = {}
    for what in whats:
        model = Net()
        model.layers[0].requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        local = gradq.DiLoCo(model, optimizer, every=EVERY, **options)
        frozen = model.layers[0].weight.detach().clone()
        train(model, optimizer, rank, range(EVERY + 2))
        change(model, what, optimizer)
        if what == "all frozen":
            local.synchronize()
        else:
            train(model, optimizer, rank, range(EVERY + 2, 4 * EVERY + 2))
            local.synchronize()
        moved = not torch.equal(frozen, model.layers[0].weight)
        outcomes[what] = everything(model), local.stats(), moved, sorted(local.parameters())
        local.close()
    return outcomes


WHATS = ["unfreeze", "freeze", "swap", "add", "remove", "replace", "all frozen", "nothing"]
OPTIONS = {
    "int4": {"spec": "int4"},
    "streaming": {"spec": "int4", "fragments": 2, "delay": 1},
    "two phases": {"spec": "int4+int4", "collective": "two_phase"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_trained_may_change(name: str) -> None:
    """Replicas are equal at the end, and what was unfrozen has been averaged, not left alone."""
    results = run_ranks(changed, 2, WHATS, OPTIONS[name])
    for what in WHATS:
        first, second = (result[what] for result in results)
        for parameter, value in first[0].items():
            assert torch.isfinite(value).all()
            assert torch.equal(value, second[0][parameter]), (what, parameter)
        assert first[2] == (what in ("unfreeze", "swap")), what
        members = {entry.removeprefix("layers.").split(".")[0] for entry in first[3]}
        want = {"unfreeze": "012", "freeze": "1", "swap": "01", "remove": "1"}.get(what, "12")
        assert members - {"extra"} == set(want), (what, members)
        assert ("extra" in members) == (what == "add")
        assert first[1].steps == (EVERY + 2 if what == "all frozen" else 4 * EVERY + 2)
        assert first[1].wire_bytes > 0


def mean_of_unfrozen(rank: int) -> tuple[Tensor, Tensor]:
    """What one layer is just before and just after the average that follows its unfreezing."""
    model = Net()
    model.layers[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    local = gradq.DiLoCo(model, None, "int4", every=EVERY)
    train(model, optimizer, rank, range(1))
    local.step()
    model.layers[0].requires_grad_(True)
    train(model, optimizer, rank, range(1, EVERY))
    before = model.layers[0].weight.detach().clone()
    for _ in range(EVERY - 1):
        local.step()
    after = model.layers[0].weight.detach().clone()
    local.close()
    return before, after


def test_an_unfrozen_parameter_gets_the_mean_of_all_ranks_first() -> None:
    results = run_ranks(mean_of_unfrozen, 3)
    mean = torch.stack([before for before, _ in results]).mean(0)
    assert not torch.equal(results[0][0], results[1][0])
    for _, after in results:
        assert torch.equal(after, results[0][1])
        torch.testing.assert_close(after, mean)


def disagreeing(rank: int, what: str) -> str:
    model = Net()
    model.layers[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    local = gradq.LocalSGD(model, optimizer, "int8", every=EVERY)
    try:
        if what == "one rank unfreezes":
            model.layers[0].requires_grad_(rank == 1)
            train(model, optimizer, rank, range(EVERY))
        else:  # rank 1 leaves out a step, as scripts do that look for NaN in the loss
            train(model, optimizer, rank, range(EVERY - rank))
            local.synchronize()
    except gradq.MismatchError as error:
        return str(error)
    finally:
        local.close()
    return "no error"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("one rank unfreezes", ["rank 1 trains other parameters", "same inner step"]),
        ("one rank skips", ["rank 0 averages after 4", "rank 1 calls synchronize() after 3", "step()"]),
    ],
)
def test_ranks_that_differ_are_told(what: str, words: list[str]) -> None:
    for message in run_ranks(disagreeing, 2, what, group_timeout=20):
        for word in words:
            assert word in message, message


# --- checkpoints ------------------------------------------------------------------------------------------


def make(trained: str) -> tuple[Net, torch.optim.Optimizer]:
    """The layers that trained names are trained; the optimizer has only those."""
    model = Net()
    for index, layer in enumerate(model.layers):
        layer.requires_grad_(str(index) in trained)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def save(rank: int, folder: str, trained: str, steps: int) -> dict[str, Tensor]:
    model, optimizer = make(trained)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1  # not what the next run starts with
    local = gradq.DiLoCo(model, optimizer, "int8", every=EVERY)
    train(model, optimizer, rank, range(steps))
    dcp.save({"gradq": local.state_dict()}, checkpoint_id=folder)
    saved = everything(model)
    local.close()
    return saved


def resume(rank: int, folder: str, trained: str, steps: int) -> tuple[Any, ...]:
    model, optimizer = make(trained)
    local = gradq.DiLoCo(model, optimizer, "int8", every=EVERY)
    gradq.load_checkpoint(local, folder)
    loaded = everything(model)
    known = sum(bool(optimizer.state[p]) for p in optimizer.param_groups[0]["params"])
    train(model, optimizer, rank, range(steps, 3 * EVERY))
    local.synchronize()
    end, step = everything(model), local.inner_step
    local.close()
    return loaded, end, known, step


@pytest.mark.parametrize(
    ("before", "after", "known"), [("12", "12", 4), ("12", "1", 2), ("12", "012", 4), ("12", "01", 2)]
)
def test_checkpoints_have_what_is_frozen_and_load_after_freezing(
    tmp_path: Path, before: str, after: str, known: int
) -> None:
    steps = EVERY + 1  # between two averages: ranks differ
    saved = run_ranks(save, 2, str(tmp_path / "c"), before, steps)
    results = run_ranks(resume, 2, str(tmp_path / "c"), after, steps)
    for rank, (loaded, end, states, step) in enumerate(results):
        assert (states, step) == (known, 3 * EVERY)
        for name, value in loaded.items():
            index = name.removeprefix("layers.")[0]
            if index not in before or index in after:
                assert torch.equal(value, saved[rank][name]), name
            else:
                torch.testing.assert_close(value, (saved[0][name] + saved[1][name]) / 2)
                assert torch.equal(value, results[0][0][name]), name
        assert all(torch.equal(value, results[0][1][name]) for name, value in end.items())


def left(rank: int) -> str:
    model, optimizer = make("012")
    gradq.LocalSGD(model, optimizer, "int8", every=EVERY)
    try:
        train(model, optimizer, rank, range(EVERY if rank == 0 else 1))
        if rank == 1:
            os._exit(0)
    except gradq.PeerError as error:
        dist.destroy_process_group()
        return str(error)
    return "no error"


def test_a_rank_that_leaves_is_an_error() -> None:
    message, _ = run_ranks(left, 2, expect_exit=(1,), group_timeout=20)
    assert "rank 1" in message
