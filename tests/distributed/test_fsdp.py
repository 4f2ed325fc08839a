"""FSDP2 and HSDP: every shard gets what FSDP's own reduction gives, exactly or within the codec's error."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

import gradq
from gradq import rng
from gradq.policy import FixedPolicy, ParameterInfo, Spec
from gradq.testing import run_ranks


class Poison(torch.autograd.Function):
    """Identity forward; backward plants NaN or Inf in one column."""

    @staticmethod
    def forward(ctx, x, column, value):
        ctx.planted = column, value
        return x

    @staticmethod
    def backward(ctx, gradient):
        column, value = ctx.planted
        gradient = gradient.clone()
        gradient[:, column] = value
        return gradient, None, None


class Net(nn.Module):
    """Awkward sizes: dimensions that no number of ranks divides, a layer with fewer rows than ranks."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(50, 70), nn.Linear(70, 91)
        self.norm, self.third = nn.LayerNorm(91), nn.Linear(91, 50)
        self.unused = nn.Linear(91, 50)
        self.last = nn.Linear(50, 2)
        if tied:
            self.third = nn.Linear(70, 50)
            self.third.weight = nn.Parameter(self.first.weight.T.contiguous())
            self.second = nn.Sequential(nn.Linear(70, 70), nn.Linear(70, 70))
            self.second[1].weight = self.second[0].weight
            self.norm = nn.LayerNorm(70)
            del self.unused
        self.plant: tuple[int, float] | None = None
        self.twice = self.branch = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.plant is not None:
            hidden = Poison.apply(hidden, *self.plant)
        hidden = torch.tanh(hidden)
        if self.twice:
            hidden = self.second(hidden)
        hidden = self.norm(self.second(hidden))
        hidden = self.unused(hidden) if self.branch else self.third(hidden)
        return self.last(hidden)


def sharded(job: dict[str, Any]) -> Net:
    """The model with fully_shard applied as the job says."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    model = Net(job.get("tied", False)).to(job.get("dtype", torch.float32))
    if job.get("frozen"):
        model.second.requires_grad_(False)
    if job.get("checkpointing"):
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        model.second = checkpoint_wrapper(model.second)
    shape = job.get("mesh") or (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=job.get("param_dtype"), reduce_dtype=job.get("reduce_dtype")
        ),
        "reshard_after_forward": job.get("reshard", True),
    }
    if job.get("shard_dim"):
        options["shard_placement_fn"] = lambda p: Shard(1) if p.shape in ((70, 60), (60, 60)) else None
    for name in ("first", "second"):
        fully_shard(getattr(model, name), **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if job.get("divide"):
                module.set_gradient_divide_factor(job["divide"])
            if job.get("force_sum"):
                module.set_force_sum_reduction_for_comms(True)
    if job.get("zeros"):
        model.set_reduce_scatter_unused_params(True)
    model.twice = job.get("twice", False)
    return model


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(6, 50, generator=torch.Generator().manual_seed(100 * step + rank))


def backward(model: Net, rank: int, step: int, job: dict[str, Any]) -> dict[str, Tensor | None]:
    """One step; returns this rank's shards of the gradients."""
    model.zero_grad(set_to_none=True)
    model.branch = rank == 1 and job.get("branch", False)
    dtype = job.get("dtype", torch.float32)
    micros = job.get("accumulate", 1)
    for micro in range(micros):
        if job.get("accumulate"):
            if job.get("all_reduce_last"):
                model.set_requires_all_reduce(micro == micros - 1)
            else:
                model.set_requires_gradient_sync(micro == micros - 1)
        model(batch(rank, 10 * step + micro).to(dtype)).float().square().mean().backward()
    return shards(model)


def shards(model: nn.Module) -> dict[str, Tensor | None]:
    """Local gradients by name."""
    return {
        name: None if p.grad is None else p.grad.to_local().clone() for name, p in model.named_parameters()
    }


def summed(rank: int, step: int, job: dict[str, Any]) -> dict[str, float]:
    """How large is what the ranks add up in this rank's shards, by name: the mean over ranks of its norm.

    An error of rounding is relative to this, not to a mean which may nearly cancel: then the order in which
    Gloo adds, which is another on another processor, shows in the mean's leading digits.
    """
    twin = Net(job.get("tied", False)).to(job.get("dtype", torch.float32))
    twin.twice, twin.branch = job.get("twice", False), rank == 1 and job.get("branch", False)
    for micro in range(job.get("accumulate", 1)):
        inputs = batch(rank, 10 * step + micro).to(job.get("dtype", torch.float32))
        twin(inputs).float().square().mean().backward()
    world_size = dist.get_world_size()
    num_shards = (job.get("mesh") or (world_size,))[-1]
    sizes = {}
    for name, p in twin.named_parameters():
        norms = torch.zeros(num_shards, dtype=torch.float64)
        for number, rows in enumerate(() if p.grad is None else p.grad.chunk(num_shards)):
            norms[number] = rows.double().norm()
        dist.all_reduce(norms)
        sizes[name] = float(norms[rank % num_shards]) / job.get("divide", world_size)
    return sizes


def error_of(got: Tensor, want: Tensor, size: float) -> float:
    """The norm of the difference, relative to size."""
    return float((got.double() - want.double()).norm()) / max(size, 1e-30)


def plain_name(name: str) -> str:
    """A parameter's name in a model without checkpointing."""
    return name.replace("_checkpoint_wrapped_module.", "")


def compare(rank: int, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each job: two models, one compressed; the shards of both over some steps."""
    outcomes = []
    for job in jobs:
        dense, model = sharded(job), sharded(job)
        options = dict(job.get("compress", {}))
        if job.get("replicate"):
            grid = init_device_mesh("cpu", job["replicate"], mesh_dim_names=("replicate", "shard"))
            options["replicate_group"] = grid.get_group("replicate")
        handle = gradq.compress(model, job["spec"], **options)
        pairs = [
            (backward(dense, rank, step, job), backward(model, rank, step, job))
            for step in range(job.get("steps", 2))
        ]
        stats = handle.stats(parameters=True)
        handle.close()
        closed = (backward(dense, rank, 90, job), backward(model, rank, 90, job))
        sizes = [summed(rank, step, job) for step in range(len(pairs))]
        outcomes.append({"pairs": pairs, "stats": stats, "closed": closed, "sizes": sizes})
    return outcomes


# name: (job, tolerance at 2 ranks; and at 3 and 4), relative to what is summed or, of codecs, to the mean
JOBS: dict[str, tuple[dict[str, Any], float, float]] = {
    "fp32": ({}, 0, 0),
    "sum": ({"force_sum": True}, 0, 0),
    "divided by 3": ({"force_sum": True, "divide": 3.0}, 0, 0),
    "no reshard": ({"reshard": False}, 0, 0),
    "accumulated": ({"accumulate": 3}, 0, 0),
    "tied": ({"tied": True}, 0, 0),
    "activation checkpointing": ({"checkpointing": True}, 0, 0),
    "frozen": ({"frozen": True}, 0, 0),
    "zeros for unused": ({"zeros": True, "branch": True}, 0, 0),
    "used twice": ({"twice": True, "tied": True}, 0, 0),
    "fp64": ({"dtype": torch.float64}, 0, 0),
    "reduced in bf16": ({"reduce_dtype": torch.bfloat16}, 0, 2e-2),
    "reduced in fp16": ({"reduce_dtype": torch.float16}, 0, 2e-3),
    "bf16 weights": ({"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}, 0, 0),
    "int8": ({"spec": "int8"}, 0.02, 0.02),
    "int8 summed": ({"spec": "int8", "force_sum": True}, 0.02, 0.02),
    "int8 of bf16": ({"spec": "int8", "reduce_dtype": torch.bfloat16}, 0.02, 0.03),
    "int4": ({"spec": "int4"}, 0.4, 0.4),
    "int4 with feedback": ({"spec": "int4", "compress": {"feedback": True}}, 0.3, 0.3),
    "none": ({"spec": "none"}, 0, 0),
}
if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):  # torch 2.9
    del JOBS["zeros for unused"]


@pytest.mark.parametrize(
    "world_size", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_shards_are_those_of_dense_fsdp(world_size: int) -> None:
    """Also after close(). From 3 ranks on Gloo adds in an order of its own: exact specs round otherwise."""
    check_shards(run_ranks(compare, world_size, shard_jobs(JOBS)), list(JOBS))


def shard_jobs(names: Iterable[str]) -> list[dict[str, Any]]:
    """What `compare` takes."""
    return [{"spec": "fp32"} | JOBS[name][0] for name in names]


def check_shards(results: list[list[dict[str, Any]]], names: list[str]) -> None:
    """Shards are dense FSDP's, within the tolerance of each job."""
    world_size, jobs = len(results), dict(zip(names, shard_jobs(names), strict=True))
    for rank, outcomes in enumerate(results):
        for name, outcome in zip(names, outcomes, strict=True):
            _, first, others = JOBS[name]
            tolerance = first if world_size == 2 else others
            assert outcome["stats"].steps == len(outcome["pairs"]), name
            is_codec = jobs[name]["spec"] in ("int8", "int4")
            for (dense, ours), sizes in zip(
                [*outcome["pairs"], outcome["closed"]], [*outcome["sizes"], None], strict=True
            ):
                for parameter, want in dense.items():
                    got = ours[parameter]
                    where = f"{name}, rank {rank} of {world_size}, {parameter}"
                    assert (got is None) == (want is None), where
                    if want is None:
                        continue
                    if (tolerance == 0 and world_size == 2) or sizes is None:
                        assert torch.equal(got, want), f"{where}: off by {(got - want).abs().max()}"
                    else:
                        size = float(want.norm()) if is_codec else sizes[plain_name(parameter)]
                        error = error_of(got, want, size)
                        assert error <= max(tolerance, 1e-6), f"{where}: {error}"
            halves = 2 if jobs[name].get("reduce_dtype") in (torch.bfloat16, torch.float16) else 1
            ratio = halves * outcome["stats"].ratio
            assert ratio > {"int8": 3, "int4": 5}.get(jobs[name]["spec"], 0.9), (name, ratio)


def exact_sums(rank: int, specs: list[str]) -> list[tuple[Tensor, Tensor]]:
    """Gradients that are small integers: any order of adding gives the same sum; W of 3 divides it once."""
    from torch.distributed.fsdp import fully_shard

    pairs = []
    for spec in specs:
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            models.append(fully_shard(nn.Linear(40, 70, bias=False)))
        gradq.compress(models[1], spec)
        for model in models:
            x = torch.randint(-8, 9, (4, 40), generator=torch.Generator().manual_seed(rank)).float()
            model(x).sum().backward()
        pairs.append(tuple(model.weight.grad.to_local().clone() for model in models))
    return pairs


@pytest.mark.parametrize("world_size", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_all_ranks_are_exact_where_sums_are(world_size: int) -> None:
    for pairs in run_ranks(exact_sums, world_size, ["fp32", "bf16", "fp16"]):
        for dense, ours in pairs:
            assert torch.equal(dense, ours)


def odd_layouts(rank: int):
    """Materialized after compress; sharded along dimension 1; a mesh of 1 by W."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    with torch.device("meta"):
        late = nn.Sequential(nn.Linear(40, 70), nn.Linear(70, 30))
    for part in (*late, late):
        fully_shard(part)
    handle = gradq.compress(late, "int8")
    late.to_empty(device="cpu")
    with torch.no_grad():
        for p in late.parameters():
            p.to_local().fill_(0.01)
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(rank))
    late(x).square().mean().backward()
    steps = handle.stats().steps
    handle.close()

    rows = []
    by_columns = {"shard_placement_fn": lambda p: Shard(1) if p.ndim == 2 else None}
    one_row = {"mesh": init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))}
    for options in (by_columns, one_row):
        for spec in ("", "fp32", "int8"):
            torch.manual_seed(0)
            model = fully_shard(nn.Sequential(nn.Linear(40, 70), nn.Linear(70, 30)), **options)
            handle = gradq.compress(model, spec) if spec else None
            model(x).square().mean().backward()
            rows.append((shards(model), handle.stats().ratio if handle else 0))
            if handle:
                handle.close()
        if options is by_columns:
            try:
                gradq.compress(model, "int4", feedback=True)
            except gradq.UnsupportedError as error:
                message = str(error)
    return steps, rows, message


def test_odd_layouts() -> None:
    for steps, rows, message in run_ranks(odd_layouts, 2):
        assert steps == 1
        for dense, full, eight in (rows[:3], rows[3:]):
            for name, want in dense[0].items():
                assert torch.equal(full[0][name], want)
                assert float((eight[0][name] - want).norm()) < 0.02 * float(want.norm())
            assert eight[1] > 3
        assert "dimension 1" in message


# --- to the bit ----------------------------------------------------------------------------------------


def against_twin(rank: int, spec: str, options: dict[str, Any], steps: int):
    """What this rank put in, by a model that is not sharded, and the shard it got."""
    model, twin = sharded({"spec": spec}), Net()
    handle = gradq.compress(model, spec, **options)
    put_in, came_out = [], []
    for step in range(steps):
        came_out.append(backward(model, rank, step, {}))
        twin.zero_grad(set_to_none=True)
        twin(batch(rank, 10 * step)).square().mean().backward()
        put_in.append({n: p.grad.clone() for n, p in twin.named_parameters() if p.grad is not None})
    handle.close()
    return put_in, came_out


@pytest.mark.parametrize(("spec", "options"), [("int8", {"seed": 5}), ("int4", {"feedback": True})])
def test_bytes_are_those_of_the_oracle(spec: str, options: dict[str, Any]) -> None:
    world_size, steps = 3, 3
    results = run_ranks(against_twin, world_size, spec, options, steps)
    put_in = [result[0] for result in results]
    infos = [
        ParameterInfo(name=name, shape=tuple(p.shape), dtype=p.dtype, index=0)
        for name, p in Net().named_parameters()
    ]
    feedback = options.get("feedback", False)
    plan = FixedPolicy(spec=Spec.parse(spec), feedback=feedback).plan(infos)
    for info in infos:
        if info.name.startswith("unused"):
            continue
        entry, rows = plan[info.name], -(-info.shape[0] // world_size)
        chunk = rows * info.numel // info.shape[0]
        codec = entry.phase1
        residuals = [torch.zeros(info.numel) for _ in range(world_size)]
        for step in range(steps):
            for owner in range(world_size):
                here = slice(min(owner * chunk, info.numel), min((owner + 1) * chunk, info.numel))
                decoded = []
                for rank in range(world_size):
                    x = put_in[rank][step][info.name].reshape(-1)[here].clone()
                    payload = torch.zeros(codec.nbytes(x.numel()), dtype=torch.uint8)
                    context = rng.EncodeContext(
                        key=rng.dither_key(options.get("seed", 0), step, rng.name_id(info.name), 1),
                        shift=rng.dither_shift(rank, world_size),
                        first_block=owner * -(-chunk // codec.block_size),
                    )
                    old = residuals[rank][here].clone() if entry.feedback1 else None
                    new = residuals[rank][here] if entry.feedback1 else None
                    codec.encode(x, payload, context=context, residual=old, new_residual=new)
                    decoded.append(torch.empty_like(x))
                    codec.decode(payload, decoded[-1])
                total = decoded[0].clone()
                for row in decoded[1:]:
                    total += row
                got = results[owner][1][step][info.name]
                assert torch.equal(got.reshape(-1), total / world_size), (info.name, step, owner)


# --- non-finite ----------------------------------------------------------------------------------------


def poisoned(rank: int, spec: str, mesh: tuple[int, ...] | None, options: dict[str, Any]):
    job = {"mesh": mesh}
    dense, model = sharded(job), sharded(job)
    handle = gradq.compress(model, spec, **options)
    outcomes = []
    for value in (float("nan"), float("inf"), float("-inf")):
        backward(model, rank, 1, job)
        before = {name: handle.sync.feedback.local.current(name).clone() for name in residual_names(handle)}
        for net in (dense, model):
            net.plant = (33, value) if rank == 1 else None
        ours = backward(model, rank, 2, job)
        theirs = backward(dense, rank, 2, job)
        after = {name: handle.sync.feedback.local.current(name).clone() for name in residual_names(handle)}
        for net in (dense, model):
            net.plant = None
        good = backward(model, rank, 3, job)
        outcomes.append((finite(ours), finite(theirs), finite(good), before, after))
    handle.close()
    return outcomes


def residual_names(handle: gradq.HookState) -> list[str]:
    return handle.sync.feedback.local.names()


def finite(gradients: dict[str, Tensor | None]) -> dict[str, bool]:
    return {name: bool(g is None or torch.isfinite(g).all()) for name, g in gradients.items()}


@pytest.mark.parametrize(
    ("world_size", "mesh", "spec", "options"),
    [
        (3, None, "int8", {}),
        (2, None, "int4", {"feedback": True}),
        (4, (2, 2), "int4", {"shard_spec": "int8"}),
    ],
)
def test_non_finite_is_seen_by_the_owner_and_never_remembered(world_size, mesh, spec, options) -> None:
    results = run_ranks(poisoned, world_size, spec, mesh, options)
    seen = set()
    for outcomes in results:
        for ours, theirs, good, before, after in outcomes:
            assert ours == theirs, "other shards are not finite than in dense FSDP"
            seen |= {name for name, is_finite in ours.items() if not is_finite}
            assert all(good.values())
            assert before.keys() == after.keys()
            assert bool(before) == (spec == "int4")
            for name, residual in before.items():
                assert torch.equal(residual, after[name]), f"a step that was not finite changed {name}"
                assert torch.isfinite(residual).all()
    assert seen == {"first.weight", "first.bias"}


# --- replicas ------------------------------------------------------------------------------------------


HSDP: dict[str, dict[str, Any]] = {
    "fp32": {},
    "sum": {"force_sum": True},
    "divided by 4": {"force_sum": True, "divide": 4.0},
    "accumulated": {"accumulate": 2},
    "reduced twice, averaged once": {"accumulate": 2, "all_reduce_last": True},
    "shards too": {"compress": {"shard_spec": "fp32"}},
    "no reshard": {"reshard": False},
    "int8": {"spec": "int8"},
    "int8 everywhere": {"spec": "int8", "compress": {"shard_spec": "int8"}},
    "int4 with feedback": {"spec": "int4"},
    "none": {"spec": "none"},
}


@pytest.mark.parametrize(
    ("world_size", "mesh"), [(2, (2, 1)), pytest.param(3, (3, 1), marks=pytest.mark.slow), (4, (2, 2))]
)
def test_replicas_of_shards(world_size: int, mesh: tuple[int, int]) -> None:
    """A mesh of two dimensions against FSDP's own HSDP; replicas equal to the bit."""
    check_replicas(run_ranks(compare, world_size, replica_jobs(mesh)), mesh)


def replica_jobs(mesh: tuple[int, int]) -> list[dict[str, Any]]:
    """What `compare` takes."""
    return [{"spec": "fp32", "mesh": mesh} | job for job in HSDP.values()]


def check_replicas(results: list[list[dict[str, Any]]], mesh: tuple[int, int]) -> None:
    """Shards are those of FSDP's own HSDP, within the tolerance of each job; replicas are equal."""
    world_size = len(results)
    for number, (name, job) in enumerate(zip(HSDP, replica_jobs(mesh), strict=True)):
        tolerance = {"int8": 0.04, "int4": 0.4}.get(job["spec"], 1e-6)
        for rank in range(world_size):
            outcome, replica = results[rank][number], results[rank % mesh[1]][number]
            assert outcome["stats"].steps == 2 * (2 if "all_reduce_last" in job else 1), name
            for step, (dense, ours) in enumerate(outcome["pairs"]):
                for parameter, want in dense.items():
                    if want is None:
                        continue
                    where = f"{name}, rank {rank} of {world_size}, {parameter}"
                    sizes, is_codec = outcome["sizes"][step], job["spec"] in ("int8", "int4")
                    size = float(want.norm()) if is_codec else sizes[parameter]
                    error = error_of(ours[parameter], want, size)
                    assert error <= tolerance, f"{where}: {error}"
                    assert torch.equal(ours[parameter], replica["pairs"][step][1][parameter]), where
            dense, ours = outcome["closed"]
            assert all(want is None or torch.equal(ours[p], want) for p, want in dense.items()), name


def own_replicas(rank: int, job: dict[str, Any]):
    """A mesh of one dimension over half the ranks, and a replica group of our own."""
    from torch.distributed.fsdp import fully_shard

    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    models = []
    for mesh in (grid, grid["shard"]):
        model = Net()
        for part in (model.first, model.second, model):
            fully_shard(part, mesh=mesh)
        models.append(model)
    handle = gradq.compress(models[1], job["spec"], replicate_group=grid.get_group("replicate"))
    pairs = [tuple(backward(model, rank, step, job) for model in models) for step in range(2)]
    stats = handle.stats()
    handle.close()
    pairs.append(tuple(backward(model, rank, 7, job) for model in models))  # averaged all the same
    sizes = [summed(rank, step, {"mesh": (2, 2)}) for step in (0, 1, 7)]
    return pairs, stats, sizes


@pytest.mark.parametrize("spec", ["fp32", "int8"])
def test_a_replica_group_of_ones_own(spec: str) -> None:
    results = run_ranks(own_replicas, 4, {"spec": spec})
    for rank, (pairs, stats, sizes) in enumerate(results):
        for step, (dense, ours) in enumerate(pairs):
            for name, want in dense.items():
                if want is None:
                    continue
                is_codec = spec == "int8" and step < 2
                error = error_of(ours[name], want, float(want.norm()) if is_codec else sizes[step][name])
                assert error <= (0.03 if is_codec else 1e-6), (name, error)
                assert torch.equal(ours[name], results[rank % 2][0][step][1][name])
        assert stats.ratio > (2.5 if spec == "int8" else 0.9)


# --- checkpoints ---------------------------------------------------------------------------------------


def save(rank: int, folder: str, job: dict[str, Any]):
    model = sharded(job)
    handle = gradq.compress(model, "int4", **job["compress"])
    for step in range(4):
        backward(model, rank, step, job)
    dcp.save({"gradq": handle.state_dict()}, checkpoint_id=folder)
    gathered = handle.gathered_state_dict()
    if rank == 0:
        torch.save(gathered, folder + ".pt")
    saved = {n: handle.sync.feedback.local.current(n).clone() for n in residual_names(handle)}
    history = [backward(model, rank, step, job) for step in (4, 5)]
    handle.close()
    return saved, history


def resume(rank: int, folder: str, job: dict[str, Any]):
    model = sharded(job)
    handle = gradq.compress(model, "int4", **job["compress"])
    gradq.load_checkpoint(handle, folder)
    step = handle.sync.step
    loaded = {n: handle.sync.feedback.local.current(n).clone() for n in residual_names(handle)}
    handle.sync.feedback.local.clear()
    handle.load_state_dict(torch.load(folder + ".pt", weights_only=True))
    assert all(torch.equal(handle.sync.feedback.local.current(name), row) for name, row in loaded.items())
    history = [backward(model, rank, index, job) for index in (4, 5)]
    handle.close()
    return loaded, history, step


@pytest.mark.parametrize(
    ("world_size", "job"),
    [(2, {"compress": {"feedback": True}}), (4, {"compress": {"shard_spec": "int8"}, "mesh": (2, 2)})],
)
def test_a_resumed_run_continues_bit_for_bit(tmp_path: Path, world_size: int, job: dict[str, Any]) -> None:
    before = run_ranks(save, world_size, str(tmp_path / "c"), job)
    after = run_ranks(resume, world_size, str(tmp_path / "c"), job)
    for (
        saved,
        history,
    ), (loaded, replayed, step) in zip(before, after, strict=True):
        assert step == 4
        assert saved
        assert loaded.keys() - saved.keys() <= {"unused.weight"}  # never reduced: saved as zeros
        assert all(torch.equal(loaded[name], value) for name, value in saved.items())
        for want, got in zip(history, replayed, strict=True):
            assert all(w is None or torch.equal(w, got[name]) for name, w in want.items())


def test_resume_on_other_ranks_takes_the_mean(tmp_path: Path) -> None:
    job = {"compress": {"feedback": True}}
    before = run_ranks(save, 2, str(tmp_path / "c"), job)
    means = {name: (before[0][0][name] + before[1][0][name]) / 2 for name in before[0][0]}
    for loaded, _, step in run_ranks(resume, 3, str(tmp_path / "c"), job):
        assert step == 4
        assert all(torch.equal(means[name], loaded[name]) for name in means)


# --- what cannot work ----------------------------------------------------------------------------------


def wrong(rank: int, cases: list[str]) -> list[str]:
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    messages = []
    for case in cases:
        model: nn.Module = sharded({})
        try:
            if case == "group":
                gradq.compress(model, group=dist.group.WORLD)
            elif case == "collective":
                gradq.compress(model, collective="direct")
            elif case == "shard_spec":
                gradq.compress(model, shard_spec="int8")
            elif case == "biased gather":
                gradq.compress(model, gather_spec="int4(rounding=nearest)")
            elif case == "twice":
                handle = gradq.compress(model)
                try:
                    gradq.compress(model)
                finally:
                    handle.close()
            elif case == "ddp":
                gradq.compress(DistributedDataParallel(Net()), gather_spec="int8")
            elif case == "two meshes":
                model = Net()
                alone = dist.new_group([rank], use_local_synchronization=True)
                from torch.distributed.device_mesh import DeviceMesh

                fully_shard(model.first, mesh=DeviceMesh.from_group(alone, "cpu"))
                fully_shard(model)
                gradq.compress(model)
            elif case == "ranks disagree":
                gradq.compress(model, "int8" if rank == 0 else "int4")
            elif case == "one rank is wrong":
                gradq.compress(model, "int8" if rank == 0 else "int9")
            elif case == "layout":
                handle = gradq.compress(model)
                handle._units[0].shards.pop()
                backward(model, rank, 0, {})
            elif case == "another dtype":
                handle = gradq.compress(model)
                model.to(torch.bfloat16)
                backward(model, rank, 0, {"dtype": torch.bfloat16})
            messages.append("no error")
        except gradq.GradqError as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


WRONG = {
    "group": ["ConfigError", "group=", "mesh"],
    "collective": ["ConfigError", "direct", "without replicas"],
    "shard_spec": ["ConfigError", "shard_spec=", "replicas"],
    "biased gather": ["ConfigError", "gather_spec", "bias"],
    "twice": ["UnsupportedError", "custom reduce-scatter"],
    "ddp": ["ConfigError", "gather_spec=", "FSDP2"],
    "two meshes": ["UnsupportedError", "other ranks"],
    "ranks disagree": ["MismatchError", "'int8'", "'int4'", "rank 1"],
    "one rank is wrong": ["int9"],
    "another dtype": ["UnsupportedError", "bfloat16", "float32", "second.weight"],
    "layout": ["UnsupportedError", "elements"],
}


def test_what_cannot_work_is_named() -> None:
    for messages in run_ranks(wrong, 2, list(WRONG)):
        for (case, words), message in zip(WRONG.items(), messages, strict=True):
            for word in words:
                assert word in message, f"{case}: {message}"


def lose_a_peer(rank: int) -> str:
    model = sharded({})
    handle = gradq.compress(model)
    for step in range(5):
        if rank == 1 and step == 2:
            model.second.register_full_backward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        try:
            backward(model, rank, step, {})
        except gradq.PeerError as error:
            return str(error) if handle.failure is error else f"another: {handle.failure!r}"
        except RuntimeError as error:
            return f"FSDP's own: {error}"
    return "no error"


def test_a_killed_peer_raises() -> None:
    message, _ = run_ranks(lose_a_peer, 2, expect_exit=(1,), group_timeout=20)
    assert "rank 1" in message or message.startswith("FSDP's own: "), message


def switching(rank: int):
    """Specs change between steps; parameters of no unit are mentioned."""
    model = sharded({})
    handle = gradq.compress(model, "int8")
    sizes = []
    for step, spec in enumerate(["int8", "int4", "none", "fp32"]):
        handle.set_spec(spec)
        before = handle.stats().wire_bytes
        backward(model, rank, step, {})
        sizes.append(handle.stats().wire_bytes - before)
    handle.measure_next_step()
    handle.set_spec("int8")
    backward(model, rank, 9, {})
    stats = handle.stats(parameters=True)
    shown = repr(handle)
    handle.close()
    handle.close()
    return sizes, stats, shown


def test_specs_switch_and_stats_count() -> None:
    for sizes, stats, shown in run_ranks(switching, 2):
        eight, four, none, full = sizes
        assert four < eight < none
        assert none <= 1.01 * full
        assert stats.steps == 5
        assert 1e-6 < stats.nmse < 1e-3
        assert stats.parameters["first.weight"].codec.startswith("int8")
        assert stats.parameters["first.bias"].codec == "fp32+fp32"
        assert "gradq int8 over 2 ranks" in shown
