"""What the ranks must agree on, computed in one process, parameter by parameter, in plain words.

It shares codecs and kernels with the library and nothing else: no buckets, no messages, no threads. `run` is
what every rank of the DDP tests executes, `run_here` does the same with all ranks in this process and without
DDP; `expected` predicts the gradients of both to the bit.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradq
from gradq import rng, wire
from gradq.collectives.low_rank.format import BACKENDS
from gradq.options import SyncConfig
from gradq.policy import Assignment, FixedPolicy, ParameterInfo, Policy, Spec, label, resolve
from gradq.sync.gradient_sync import GradientSync
from gradq.testing import InProcessGroup, Network, run_in_process

Gradients = list[dict[str, Tensor]]  # by step, then by parameter; flat, in memory order


class Net(nn.Module):
    """Matrices of awkward sizes, a convolution in channels-last, biases, a norm and a branch for later."""

    def __init__(self, dtype: torch.dtype = torch.float32, mixed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 11, 7).to(memory_format=torch.channels_last)
        self.first = nn.Linear(44, 67)
        self.norm = nn.LayerNorm(67)
        self.second = nn.Linear(67, 131, bias=False)
        self.branch = nn.Linear(67, 131)
        self.last = nn.Linear(131, 9)
        self.to(dtype)
        if mixed:
            self.last.to(torch.float64)

    def forward(self, x: Tensor, branch: bool = False) -> Tensor:
        hidden = self.norm(self.first(self.conv(x.to(self.conv.weight.dtype)).flatten(1)))
        hidden = self.branch(hidden) if branch else self.second(hidden)
        return self.last(hidden.to(self.last.weight.dtype))


def flat(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A gradient in the memory order of its parameter, as DDP's buckets hold it."""
    laid_out = torch.empty_like(parameter).copy_(gradient)
    return laid_out.as_strided((parameter.numel(),), (1,)).clone()


def batch(rank: int, step: int, micro: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    return torch.randn(5, 3, 8, 8, generator=generator)


def run(rank: int, job: dict[str, Any]) -> tuple[Gradients, Gradients, dict[str, Any]]:
    """Train a few steps; returns what this rank put in, what came out, and some of the handle's numbers."""
    model = Net(job.get("dtype", torch.float32), job.get("mixed", False))
    twin = copy.deepcopy(model)
    ddp = DistributedDataParallel(model, **job.get("ddp", {}))
    handle = gradq.compress(ddp, job["spec"], **job.get("compress", {}))
    put_in, came_out = [], []
    skew = random.Random(job.get("skew", 0) + rank) if "skew" in job else None
    for step in range(job.get("steps", 4)):
        for net in (ddp, twin):
            net.zero_grad(set_to_none=True)
        branches = job.get("branch", "no")
        branch = step % 2 == 1 if branches == "alternate" else branches == f"rank {rank}"
        micros = job.get("accumulate", 1)
        for micro in range(micros):
            x = batch(rank, step, micro)
            twin(x, branch).square().mean().backward()
            with ddp.no_sync() if micro < micros - 1 else contextlib.nullcontext():
                loss = ddp(x, branch).square().mean()
                if skew is not None:
                    time.sleep(skew.random() * 0.02)
                loss.backward()
        put_in.append(_gradients(twin))
        came_out.append(_gradients(model))
    stats = handle.stats(parameters=True)
    handle.close()
    return put_in, came_out, {"stats": stats, "repr": repr(handle)}


def run_here(
    world_size: int, job: dict[str, Any], network: Network | None = None
) -> list[tuple[Gradients, Gradients, dict[str, Any]]]:
    """What `run` gives on every rank, without DDP: its gradients, averaged by `GradientSync` in this process.

    Buckets are cut here, as large as DDP's, and in every step in another order.
    """
    put_in = [_put_in(rank, job) for rank in range(world_size)]
    model = Net(job.get("dtype", torch.float32), job.get("mixed", False))
    infos = [
        ParameterInfo(name=name, shape=tuple(p.shape), dtype=p.dtype, index=index)
        for index, (name, p) in enumerate(model.named_parameters())
    ]
    came_out = run_in_process(_average, world_size, job, infos, put_in, network=network)
    return [(own, *rest) for own, rest in zip(put_in, came_out, strict=True)]


def _put_in(rank: int, job: dict[str, Any]) -> Gradients:
    """The gradients of one rank, which depend on no other: nothing is trained."""
    model = Net(job.get("dtype", torch.float32), job.get("mixed", False))
    steps = []
    for step in range(job.get("steps", 4)):
        model.zero_grad(set_to_none=True)
        for micro in range(job.get("accumulate", 1)):
            model(batch(rank, step, micro)).square().mean().backward()
        steps.append(_gradients(model))
    return steps


def _average(
    group: InProcessGroup, job: dict[str, Any], infos: list[ParameterInfo], put_in: list[Gradients]
) -> tuple[Gradients, dict[str, Any]]:
    options = dict(job.get("compress", {}))
    policy_options = {key: options.pop(key) for key in ("exact", "feedback") if key in options}
    asked, policy = resolve(job["spec"], **policy_options)
    sync = GradientSync(infos, policy, label(asked), group, SyncConfig(**options))
    room = job.get("ddp", {}).get("bucket_cap_mb", 25) * 2**20
    came_out: Gradients = []
    for step, gradients in enumerate(put_in[group.rank()]):
        order = infos[::-1] if step == 0 else random.Random(step).sample(infos, len(infos))
        buckets = list(_buckets(order, room))
        flats = [torch.cat([gradients[info.name] for info in bucket]) for bucket in buckets]
        names = [[info.name for info in bucket] for bucket in buckets]
        for future in sync.average_buckets(zip(flats, names, strict=True)):
            future.wait()
        came_out.append({})
        for bucket, flat in zip(buckets, flats, strict=True):
            parts = flat.split([info.numel for info in bucket])
            came_out[-1] |= {info.name: part for info, part in zip(bucket, parts, strict=True)}
    stats = sync.stats(parameters=True)
    sync.close()
    return came_out, {"stats": stats}


def _buckets(infos: list[ParameterInfo], room: float) -> Iterator[list[ParameterInfo]]:
    """Neighbours of one dtype, until there is no more room."""
    bucket: list[ParameterInfo] = []
    for info in infos:
        nbytes = sum(other.numel * other.dtype.itemsize for other in bucket)
        if bucket and (info.dtype != bucket[0].dtype or nbytes > room):
            yield bucket
            bucket = []
        bucket.append(info)
    yield bucket


def slow_down(channel: Any, seconds: float) -> None:
    """Let everything posted on a channel arrive late."""
    post = channel.post

    class Late:
        def __init__(self, pending: Any) -> None:
            self.pending = pending

        def wait(self) -> None:
            time.sleep(seconds)
            self.pending.wait()

    channel.post = lambda *args: Late(post(*args))


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: flat(p.detach(), p.grad if p.grad is not None else torch.zeros_like(p))
        for name, p in model.named_parameters()
    }


def plan_for(
    model: nn.Module, spec: str | Policy, world_size: int | None = None, **options: Any
) -> dict[str, tuple[ParameterInfo, Assignment]]:
    """The plan a policy makes, a FixedPolicy if only the spec is given, by name."""
    infos = [
        ParameterInfo(name=name, shape=tuple(p.shape), dtype=p.dtype, index=index, world_size=world_size)
        for index, (name, p) in enumerate(model.named_parameters())
    ]
    policy = FixedPolicy(spec=Spec.parse(spec), **options) if isinstance(spec, str) else spec
    plan = policy.plan(infos)
    return {info.name: (info, plan[info.name]) for info in infos}


def expected(
    put_in: list[Gradients],
    plan: dict[str, tuple[ParameterInfo, Assignment]],
    *,
    two_phase: bool,
    seed: int = 0,
    transform: Callable[[Tensor], Tensor] = lambda x: x,
) -> Gradients:
    """The reduced gradients of every step, from what every rank put in."""
    world_size, steps = len(put_in), len(put_in[0])
    outcome: Gradients = [{} for _ in range(steps)]
    for name, (info, entry) in plan.items():
        if entry.low_rank:
            _low_rank(outcome, [[transform(g[name]) for g in one] for one in put_in], info, entry, seed)
            continue
        phases = {"direct": 1, "two_phase": 2, "auto": 1 + two_phase}[entry.collective]
        work = entry.phase1.work_dtype
        local = [torch.zeros(info.numel, dtype=work) for _ in range(world_size)]
        shard = torch.zeros(info.numel, dtype=work)
        for step in range(steps):
            if name not in put_in[0][step]:  # averaged in other steps only
                continue
            xs = [transform(put_in[rank][step][name]).to(work) for rank in range(world_size)]
            out = torch.empty(info.numel, dtype=work)
            for start, stop in _pieces(info, entry, world_size, phases):
                mean = _phase1(name, entry, xs, local, start, stop, step, seed)
                out[start:stop] = (
                    _phase2(name, entry, mean, shard, start, stop, step, seed) if phases == 2 else mean
                )
            outcome[step][name] = out.to(info.dtype)
    return outcome


def _low_rank(
    outcome: Gradients, put_in: list[list[Tensor]], info: ParameterInfo, entry: Assignment, seed: int
) -> None:
    """PowerSGD, a half iteration a step; put_in by rank and step."""
    world_size, m, n = len(put_in), info.shape[0], info.numel // info.shape[0]
    r = min(entry.low_rank, m, n)
    residuals = [torch.zeros(m * n) for _ in range(world_size)]
    kernels = BACKENDS.on(torch.device("cpu"))
    factor, left = torch.zeros(r, n), False
    for step, reduced in enumerate(outcome):
        basis = torch.empty_like(factor)
        kernels.orthonormalize(factor, basis, key=rng.dither_key(seed, step, rng.name_id(info.name), 3))
        factors = torch.zeros(world_size, r, n if left else m)
        for rank in range(world_size):
            value, own = torch.empty(m * n), factors[rank]
            x = put_in[rank][step].float()
            kernels.project(x, residuals[rank], value, basis, own, left=left, loss_scale=1.0)
            kernels.remove(*((basis, own) if left else (own, basis)), value, loss_scale=1.0)
            residuals[rank] = value
        factor = factors[0]
        for other in factors[1:]:
            factor = factor + other
        factor = factor / world_size
        out = torch.empty(m * n)
        kernels.reconstruct(*((basis, factor) if left else (factor, basis)), out)
        reduced[info.name], left = out.to(info.dtype), not left


def _pieces(info: ParameterInfo, entry: Assignment, world_size: int, phases: int) -> list[tuple[int, int]]:
    if phases == 1:
        return [(0, info.numel)]
    grain = math.lcm(entry.phase1.block_size, entry.phase2.block_size)
    pieces = [wire.shard(info.numel, grain, world_size, owner, info.index) for owner in range(world_size)]
    return [(start, stop) for start, stop in pieces if start < stop]


def _phase1(name, entry, xs, local, start, stop, step, seed):
    codec, world_size = entry.phase1, len(xs)
    payloads = torch.zeros(world_size, codec.nbytes(stop - start), dtype=torch.uint8)
    for rank, x in enumerate(xs):
        context = rng.EncodeContext(
            key=rng.dither_key(seed, step, rng.name_id(name), 1),
            shift=rng.dither_shift(rank, world_size),
            first_block=start // codec.block_size,
        )
        old = local[rank][start:stop].clone() if entry.feedback1 else None
        new = local[rank][start:stop] if entry.feedback1 else None
        codec.encode(x[start:stop].clone(), payloads[rank], context=context, residual=old, new_residual=new)
    mean = torch.zeros(stop - start, dtype=codec.work_dtype)
    one = torch.empty_like(mean)
    for rank in range(world_size):
        codec.decode(payloads[rank], one)
        mean = one.clone() if rank == 0 else mean + one
    return mean / world_size


def _phase2(name, entry, mean, shard, start, stop, step, seed):
    codec = entry.phase2
    payload = torch.zeros(codec.nbytes(stop - start), dtype=torch.uint8)
    context = rng.EncodeContext(
        key=rng.dither_key(seed, step, rng.name_id(name), 2), first_block=start // codec.block_size
    )
    old = shard[start:stop].clone() if entry.feedback2 else None
    new = shard[start:stop] if entry.feedback2 else None
    codec.encode(mean, payload, context=context, residual=old, new_residual=new)
    out = torch.empty_like(mean)
    codec.decode(payload, out)
    return out
