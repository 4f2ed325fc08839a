"""Hierarchical: exact inside a node, compressed between nodes, to the bit what the oracle predicts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from oracle import Net, expected, plan_for, run
from test_contracts import PLACES, backward, gradients, make, residuals
from torch.nn.parallel import DistributedDataParallel

import gradq
from gradq.collectives import ranks_per_node
from gradq.testing import run_ranks

# ranks, ranks a node; in one process all of them are in test_collectives.py
GRID = [(4, 2), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((2, 2), (3, 1), (6, 2), (6, 3)))]


def layouts(rank: int, jobs: list[dict]) -> list:
    return [run(rank, job) for job in jobs]


def node_sums(results, plan, local_world_size: int):
    """What the nodes put in, piece by piece: the sums over their ranks, in rank order."""
    steps, nodes = len(results[0][0]), len(results) // local_world_size
    sums = [[{} for _ in range(steps)] for _ in range(nodes)]
    for node in range(nodes):
        members = range(node * local_world_size, (node + 1) * local_world_size)
        for step in range(steps):
            for name in plan:
                total = None
                for member in members:
                    x = results[member][0][step][name]
                    total = x.clone() if total is None else total + x
                sums[node][step][name] = total
    return sums


def hierarchical_jobs(local_world_size: int) -> list[dict]:
    options = {"collective": "hierarchical", "local_world_size": local_world_size}
    ddp = {"find_unused_parameters": True, "bucket_cap_mb": 0.02}
    jobs = [
        {"spec": spec, "compress": options, "ddp": ddp, "steps": 3, "skew": skew}
        for skew, spec in enumerate(["fp32", "int8", "int4+int4"])
    ]
    return [*jobs, {"spec": "fp32", "compress": options, "ddp": ddp, "steps": 2, "mixed": True}]


@pytest.mark.parametrize(("world_size", "local_world_size"), GRID)
def test_replicas_are_equal_and_near_the_mean(world_size: int, local_world_size: int) -> None:
    jobs = hierarchical_jobs(local_world_size)
    by_rank = run_ranks(layouts, world_size, jobs)
    for number, job in enumerate(jobs):
        check_near_the_mean(job, [outcomes[number] for outcomes in by_rank])


def check_near_the_mean(job: dict, results: list) -> None:
    bound, world_size = {"fp32": 1e-6, "int8": 0.03, "int4+int4": 0.6}[job["spec"]], len(results)
    for step in range(job["steps"]):
        for name, got in results[0][1][step].items():
            if name.startswith("branch"):
                continue
            put_in = [result[0][step][name].double() for result in results]
            want = sum(put_in) / world_size
            # of an exact spec relative to what is summed: the mean may nearly cancel
            exact = job["spec"] == "fp32"
            size = sum(x.norm() for x in put_in) / world_size if exact else want.norm()
            error = float((got.double() - want).norm() / size.clamp(min=1e-30))
            assert error <= bound, f"{job['spec']}, step {step}, {name}: {error}"
            for result in results[1:]:
                assert torch.equal(result[1][step][name], got)


def on_real_ranks(world_size: int, job: dict) -> list:
    return run_ranks(run, world_size, job)


def test_two_nodes_to_the_bit() -> None:
    """With 8 bits too in test_collectives.py."""
    check_two_nodes("int4", on_real_ranks)


def check_two_nodes(spec: str, run_job: Callable[[int, dict], list]) -> None:
    """2 nodes of 2: one phase between nodes, dithers by position in the parameter, residuals of node sums."""
    job = {"spec": spec, "compress": {"collective": "hierarchical", "local_world_size": 2}, "steps": 4}
    job |= {"ddp": {"find_unused_parameters": True}}
    results = run_job(4, job)
    plan = plan_for(Net(), spec)
    want = expected(node_sums(results, plan, 2), plan, two_phase=False)
    for rank, (_, came_out, _) in enumerate(results):
        for step, outcome in enumerate(came_out):
            for name, got in outcome.items():
                if not name.startswith("branch"):
                    assert torch.equal(got, want[step][name] / 2), (rank, step, name)


def test_nodes_of_one_rank_are_the_flat_form() -> None:
    jobs = [{"collective": "hierarchical", "local_world_size": 1}, {"collective": "two_phase"}]
    ddp = {"find_unused_parameters": True}
    jobs = [{"spec": "int4+int4", "compress": options, "ddp": ddp, "steps": 3} for options in jobs]
    for hierarchical, flat in run_ranks(layouts, 3, jobs):
        for step in range(3):
            for name, got in hierarchical[1][step].items():
                assert torch.equal(got, flat[1][step][name])


def count(rank: int, spec: str, jobs: list[tuple[str, int | None]]):
    totals = []
    for collective, local_world_size in jobs:
        torch.manual_seed(0)
        model = DistributedDataParallel(torch.nn.Linear(700, 500))
        handle = gradq.compress(model, spec, collective=collective, local_world_size=local_world_size)
        model(torch.randn(2, 700)).square().mean().backward()
        stats = handle.stats()
        handle.close()
        totals.append((stats.wire_bytes, stats.inter_node_bytes, stats.intra_node_bytes, str(stats)))
    return totals


@pytest.mark.parametrize(
    ("world_size", "local_world_size"),
    [(4, 2), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((6, 2), (6, 3)))],
)
def test_between_nodes_travels_a_share_of_the_flat_form(world_size: int, local_world_size: int) -> None:
    jobs = [("two_phase", None), ("hierarchical", local_world_size)]
    exact = 4 * 700 * 500  # and a bias
    check_share(world_size, local_world_size, run_ranks(count, world_size, "int8", jobs), exact)


def check_share(world_size: int, local_world_size: int, results: list, exact: int) -> None:
    """By rank: bytes of the flat and of the hierarchical form (total, between nodes, inside, as shown)."""
    flat = sum(rows[0][0] for rows in results)  # of these, what crosses from node to node:
    flat = flat * (world_size - local_world_size) / (world_size - 1)
    between = sum(rows[1][1] for rows in results)
    assert between == pytest.approx(flat / local_world_size, rel=0.02)
    for _, (total, between_nodes, inside, shown) in results:
        assert total == between_nodes + inside
        assert inside == pytest.approx(
            2 * exact * (local_world_size - 1) / local_world_size, rel=0.02
        )  # what a ring over the node would send
        assert "inside the node" in shown


# --- contracts -----------------------------------------------------------------------------------------

OPTIONS = {"collective": "hierarchical", "local_world_size": 2}


def poison(rank: int, spec: str):
    model = make()
    handle = gradq.compress(model, spec, feedback=True, **OPTIONS)
    outcomes = []
    for target, element in PLACES[:3]:
        parameter = dict(model.module.named_parameters())[target]

        def plant(gradient: torch.Tensor, element=element) -> torch.Tensor:
            planted = gradient.clone()
            planted.view(-1)[element] = float("nan")
            return planted

        backward(model, rank, 1)
        before = residuals(handle)
        removable = parameter.register_hook(plant) if rank == 1 else None
        backward(model, rank, 2)
        poisoned, during = gradients(model.module), residuals(handle)
        if removable is not None:
            removable.remove()
        backward(model, rank, 3)
        outcomes.append((target, before, poisoned, during, gradients(model.module)))
    handle.close()
    return outcomes


def test_non_finite_is_seen_everywhere_and_never_remembered() -> None:
    for outcomes in run_ranks(poison, 4, "int4+int4"):
        for target, before, poisoned, during, after in outcomes:
            assert not torch.isfinite(poisoned[target]).all()
            assert all(torch.isfinite(g).all() for name, g in poisoned.items() if name != target)
            assert before
            assert before.keys() == during.keys()
            assert all(torch.equal(residual, during[name]) for name, residual in before.items())
            assert all(torch.isfinite(g).all() for g in after.values())


def train(rank: int, folder: str, resume: bool, world: dict):
    model = make()
    handle = gradq.compress(model, "int4+int4", **world)
    if resume:
        gradq.load_checkpoint(handle, folder)
    else:
        for step in range(4):
            backward(model, rank, step)
        dcp.save({"gradq": handle.state_dict()}, checkpoint_id=folder)
    kept = residuals(handle)
    history = []
    for step in (4, 5):
        backward(model, rank, step)
        history.append(gradients(model.module))
    handle.close()
    return kept, history


@pytest.mark.parametrize("world_size", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_a_resumed_run_continues_bit_for_bit(tmp_path: Path, world_size: int) -> None:
    """Two nodes keep local residuals only, three shard residuals as well."""
    before = run_ranks(train, world_size, str(tmp_path / "c"), False, OPTIONS)
    after = run_ranks(train, world_size, str(tmp_path / "c"), True, OPTIONS)
    for (saved, history), (loaded, replayed) in zip(before, after, strict=True):
        assert {name.split()[0] for name in saved} == ({"local"} if world_size == 4 else {"local", "shard"})
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)
        for want, got in zip(history, replayed, strict=True):
            assert all(torch.equal(want[name], got[name]) for name in want)


def test_the_correction_owed_survives_a_change_to_the_flat_form(tmp_path: Path) -> None:
    """Mean over ranks of the saved rows = what the mean gradient still lacks, in either form."""
    before = run_ranks(train, 4, str(tmp_path / "c"), False, OPTIONS)
    owed = {
        name: torch.stack([saved[name] for saved, _ in before]).mean(0)
        for name in before[0][0]
        if name.startswith("local")
    }
    for loaded, _ in run_ranks(train, 2, str(tmp_path / "c"), True, {"collective": "two_phase"}):
        assert all(torch.equal(loaded[name], value) for name, value in owed.items())


def disagree(rank: int, sizes: list[int]) -> str:
    try:
        gradq.compress(make(), "int8", collective="hierarchical", local_world_size=sizes[rank])
    except gradq.GradqError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ([1, 3, 3], ["MismatchError", "local_world_size", "1", "3", "rank 1"]),
        ([2, 2, 2], ["does not divide"]),
    ],
)
def test_unequal_nodes_are_refused(sizes: list[int], words: list[str]) -> None:
    for message in run_ranks(disagree, 3, sizes):
        for word in words:
            assert word in message, message


def test_the_layout_comes_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(gradq.ConfigError, match="LOCAL_WORLD_SIZE"):
        ranks_per_node(None, 0, 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert ranks_per_node(None, 3, 4) == 2
    assert ranks_per_node(4, 3, 4) == 4
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(gradq.ConfigError, match="node by node"):
        ranks_per_node(None, 3, 4)
    with pytest.raises(gradq.ConfigError, match="positive"):
        ranks_per_node(0, 0, 4)
