"""Plans that change during training, on real ranks: in lockstep, nothing lost, resumed bit for bit."""

from __future__ import annotations

import contextlib
import itertools
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_checkpoint import Records, equal
from test_contracts import residuals
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradq
from gradq.testing import run_ranks

RANGE = ("int2", "int3", "int4", "int5", "int6", "int8")


class Net(nn.Module):
    """Gradients of very different sizes, buffers that DDP broadcasts, and a branch not always used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(40, 40) for _ in range(4))
        self.norm = nn.BatchNorm1d(40)
        self.branch = nn.Linear(40, 40)

    def forward(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Layer 0 is the loudest in steps 0 to 3, layer 3 in steps 4 to 7, and so on."""
        x = self.norm(sum(10.0 ** -((k + index // 4) % 4) * layer(x) for k, layer in enumerate(self.layers)))
        return self.branch(x) if index % 2 == 0 else x


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def make() -> DistributedDataParallel:
    return DistributedDataParallel(Net(), bucket_cap_mb=0.01, find_unused_parameters=True)


def policy(**options) -> gradq.BitAllocation:
    return gradq.BitAllocation(
        **{"bytes_of": "int4", "candidates": RANGE, "every": 3, "samples": 2, "weighting": "energy"} | options
    )


def step(model: DistributedDataParallel, rank: int, index: int, micros: int = 1) -> None:
    """Backward, the batch in several parts, late on the higher ranks."""
    model.zero_grad(set_to_none=True)
    for micro in range(micros):
        generator = torch.Generator().manual_seed(1000 * index + 10 * micro + rank)
        x = torch.randn(6, 40, generator=generator)
        time.sleep(0.004 * rank * (index % 3))
        with model.no_sync() if micro < micros - 1 else contextlib.nullcontext():
            model(x, index).square().mul(torch.arange(40)).mean().backward()


def train(rank: int, micros: int, options: dict):
    model, own = make(), policy(**options)
    events: list[gradq.Event] = []
    handle = gradq.compress(model, own, collective=options.pop("collective", "auto"))
    handle.add_sink(events.append)
    rows = []
    for index in range(10):
        step(model, rank, index, micros)
        rows.append((own.allocation, gradients(model.module), handle.stats().wire_bytes))
    handle.close()
    replans = [(e.step, e.value) for e in events if e.kind == "replan"]
    sampled = sorted({e.step for e in events if e.kind == "candidate_error"})
    return rows, replans, sampled


@pytest.mark.parametrize(("world_size", "micros"), [(2, 1), (3, 2), (4, 1)])
def test_plans_change_in_lockstep(world_size: int, micros: int) -> None:
    results = run_ranks(train, world_size, micros, {})
    rows, replans, sampled = results[0]
    assert [at for at, _ in replans] == [3, 6, 9]
    assert replans[0][1] > 0, "the first plan from measurements is the one for all: the test sees nothing"
    assert sampled == [1, 2, 4, 5, 7, 8]
    assert set(rows[2][0].values()) == {"int4"}
    for index, loud, quiet in ((3, 0, 3), (9, 3, 0)):  # planned by steps 1 and 2, by 7 and 8
        bits = {name: int(spec[3]) for name, spec in rows[index][0].items()}
        assert bits[f"layers.{loud}.weight"] > bits[f"layers.{quiet}.weight"], index
    sent = [b - a for (_, _, a), (_, _, b) in itertools.pairwise(rows)]
    assert max(sent) == sent[0], "a plan spends more than its budget"
    for other, other_replans, _ in results[1:]:
        assert other_replans == replans
        for (mine, reduced, _), (theirs, same, _) in zip(rows, other, strict=True):
            assert mine == theirs
            assert equal(reduced, same)


def account(rank: int):
    """What was put in, what came out, and what is still owed."""
    model, plain = make(), make()
    handle = gradq.compress(model, policy(feedback=True))
    owed = {name: torch.zeros_like(p) for name, p in model.module.named_parameters()}
    plans, rounding = [], dict.fromkeys(owed, 0.0)
    for index in range(10):
        step(model, rank, index)
        step(plain, rank, index)
        for name in owed:
            exact = gradients(plain.module)[name]
            owed[name] += exact - gradients(model.module)[name]
            rounding[name] += 1e-6 * float(exact.abs().max())
        plans.append(handle.spec.allocation)
    kept = residuals(handle)
    handle.close()
    return owed, kept, plans, rounding


def test_no_residual_is_lost_when_plans_change() -> None:
    """In one phase with feedback: all that was not sent stands in the residuals, whatever the plans were."""
    results = run_ranks(account, 2)
    _, _, plans, rounding = results[0]
    assert len({tuple(plan.values()) for plan in plans}) > 1
    for name in (n for n in plans[0] if n.startswith("layers")):  # DDP drops what comes of unused ones
        owed = results[0][0][name]
        held = sum(kept[f"local {name}"] for _, kept, _, _ in results).view_as(owed) / 2
        assert float(owed.abs().max()) > 20 * rounding[name]
        assert float((owed - held).abs().max()) < rounding[name]


def keep_shards(rank: int):
    """Blocks of one size: the pieces stay. A codec with larger blocks cuts elsewhere."""
    model = make()
    handle = gradq.compress(model, "int4+int4", collective="two_phase")
    step(model, rank, 0)
    before = residuals(handle)
    handle.set_spec("int3+int4")
    same = residuals(handle)
    handle.set_spec("int3(block_size=1024)+int4")
    step(model, rank, 1)
    return before, same, residuals(handle)


def test_shard_residuals_stay_where_the_pieces_are_the_same() -> None:
    for before, same, after in run_ranks(keep_shards, 3):
        assert equal(before, same)
        assert any(name.startswith("shard") for name in before)
        assert any(before[name].shape != after[name].shape for name in before if name in after) or (
            before.keys() != after.keys()
        )


# --- checkpoints ---------------------------------------------------------------------------------------


def save(rank: int, folder: str):
    """Stop in the middle of a period, after a plan has changed; go on."""
    model, own = make(), policy()
    handle = gradq.compress(model, own, collective="two_phase")
    for index in range(5):
        step(model, rank, index)
    dcp.save({"model": model.module.state_dict(), "gradq": handle.state_dict()}, checkpoint_id=folder)
    at = own.allocation
    history = []
    for index in range(5, 10):
        step(model, rank, index)
        history.append((own.allocation, gradients(model.module)))
    handle.close()
    return at, history


def resume(rank: int, folder: str, spec: str = ""):
    import logging

    records = Records()
    logging.getLogger("gradq").addHandler(records)
    model, own = make(), policy()
    handle = gradq.compress(model, spec or own, collective="two_phase")
    weights = {"model": model.module.state_dict()}
    dcp.load(weights, checkpoint_id=folder)
    model.module.load_state_dict(weights["model"])
    gradq.load_checkpoint(handle, folder)
    at, loaded = own.allocation, residuals(handle)
    history = []
    for index in range(5, 10):
        step(model, rank, index)
        history.append((own.allocation, gradients(model.module)))
    handle.close()
    return at, history, records.lines, len(loaded)


def test_resume_continues_the_plan_and_the_measurements_bit_for_bit(tmp_path: Path) -> None:
    before = run_ranks(save, 3, str(tmp_path / "c"))
    after = run_ranks(resume, 3, str(tmp_path / "c"))
    assert len(set(before[0][0].values())) > 1, "no plan had changed: the test sees nothing"
    plans = {tuple(allocation.values()) for allocation, _ in before[0][1]}
    assert len(plans | {tuple(before[0][0].values())}) > 1
    for (at, history), (resumed_at, replayed, lines, _) in zip(before, after, strict=True):
        assert resumed_at == at
        for (want_plan, want), (got_plan, got) in zip(history, replayed, strict=True):
            assert got_plan == want_plan
            assert equal(want, got)
        assert not lines

    for at, history, lines, _ in run_ranks(resume, 2, str(tmp_path / "c")):  # on fewer ranks
        assert at == before[0][0]
        assert len(history) == 5
        assert any("resumed on 2 ranks from 3" in line for line in lines)

    for _, _, lines, kept in run_ranks(resume, 3, str(tmp_path / "c"), "int4"):  # without the policy
        assert kept
        assert any("saved plan" in line and "not used" in line for line in lines)


def save_without(rank: int, folder: str) -> None:
    model = make()
    handle = gradq.compress(model, "int4", collective="two_phase")
    for index in range(5):
        step(model, rank, index)
    dcp.save({"model": model.module.state_dict(), "gradq": handle.state_dict()}, checkpoint_id=folder)
    handle.close()


def test_resume_of_a_run_without_a_plan_says_so(tmp_path: Path) -> None:
    run_ranks(save_without, 2, str(tmp_path / "c"))
    for at, _, lines, kept in run_ranks(resume, 2, str(tmp_path / "c")):
        assert set(at.values()) == {"int4"}
        assert kept == 5
        assert any("no plan was saved" in line for line in lines)


# --- disagreement --------------------------------------------------------------------------------------


def disagree(rank: int, options: dict) -> tuple[str, float]:
    model = make()
    start = time.monotonic()
    try:
        gradq.compress(model, policy(**(options if rank == 1 else {})))
    except gradq.MismatchError as error:
        return str(error), time.monotonic() - start
    return "no error", 0.0


@pytest.mark.parametrize("options", [{"every": 4}, {"samples": 1}, {"candidates": RANGE[1:]}])
def test_ranks_with_other_settings_are_told_at_the_start(options: dict) -> None:
    (name,) = options
    for message, seconds in run_ranks(disagree, 3, options):
        assert "spec is " in message
        assert "on rank 1" in message
        assert f"{name}=" in message
        assert seconds < 10


def wrong_plan(rank: int) -> str:
    """Rank 1 comes to another plan, as a fault in its memory might have it."""
    model, own = make(), policy()
    handle = gradq.compress(model, own)
    learn = own.learn

    def differ(everyone):
        learn(everyone)
        if rank == 1:
            own._choice["layers.0.weight"] = "int2"

    own.learn = differ
    try:
        for index in range(5):
            step(model, rank, index)
    except gradq.MismatchError as error:
        return f"step {index}: {error}"
    finally:
        handle.close()
    return "no error"


def test_a_rank_that_plans_otherwise_is_an_error_on_every_rank() -> None:
    for message in run_ranks(wrong_plan, 3):
        assert message.startswith("step 3: ranks disagree: parameters['layers.0.weight'] is ")
        assert "int2" in message
        assert "rank 1" in message


# --- rules ---------------------------------------------------------------------------------------------


def rules(rank: int):
    model = make()
    handle = gradq.compress(model, {"role:matmul": "int4"})
    step(model, rank, 0)
    handle.set_spec({"branch*": "int8", "*.2.*": "bf16", "*": "int3"})
    step(model, rank, 1)
    codecs = {name: entry.codec for name, entry in handle.stats(parameters=True).parameters.items()}
    handle.close()
    return codecs, gradients(model.module)


def test_rules_as_a_mapping() -> None:
    results = run_ranks(rules, 2)
    codecs, reduced = results[0]
    for name, start in {
        "branch.weight": "int8",
        "layers.2.weight": "bf16",
        "layers.0.weight": "int3",
    }.items():
        assert codecs[name].startswith(start)
    assert codecs["norm.weight"] == "fp32+fp32"
    assert equal(reduced, results[1][1])
