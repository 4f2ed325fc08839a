"""Real DDP on one GPU: the same averages as on the CPU, the same losses, step times, memory, NCCL.

What bits promise. Matrix products differ between CPU and GPU in their last bits, and so do losses. What
gradq adds does not: `averages` feeds the same gradients on both and compares bits. On the GPU alone, with
torch's deterministic algorithms, "none" must give the losses of plain DDP, the same seed the same losses
again, and all ranks the same parameters; beside the CPU's run losses are compared to a part in a thousand.
"""

from __future__ import annotations

import os
import random
import resource
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gradq
from gpu_parts.ranks import (
    CONTENDERS,
    Contender,
    Given,
    deterministic,
    given_gradients,
    gpt,
    group_on_device,
    on_the_cuda_way,
    replicas_equal,
    same_bits,
    tokens,
)
from gpu_parts.setting import Setting
from gradq.testing import run_ranks

__all__ = ["averages", "memory", "nccl", "train_25m", "train_124m"]

CPU = torch.device("cpu")
SHAPES = ((700, 601), (4500,), (33,), (1000, 100), (256, 1024))
TOLERANCE = 1e-3


def _ranks(function: Any, world_size: int, setting: Setting, *args: Any) -> list[Any]:
    return run_ranks(function, world_size, setting, *args, timeout=max(5.0, setting.left - 3))


# --- averages ------------------------------------------------------------------------------------------


def averages(setting: Setting) -> None:
    """The same gradients through DDP's hook on the CPU and on the device: the same bits."""
    _ranks(_averages, 2, setting, "gloo")


def _averages(rank: int, setting: Setting, backend: str) -> None:
    specs = ("none", "bf16", "int8", "int4", "rot4", "int4+int4")
    specs = (*specs[:2], "int4") if setting.dry_run else specs
    shapes = ((70, 61), (33,)) if setting.dry_run else SHAPES
    truth = {spec: _gradients(rank, spec, shapes, CPU, dist.group.WORLD) for spec in specs}
    on_the_cuda_way("staged", setting)
    group, failed = group_on_device(backend, setting), []
    for spec in specs:
        with setting.on_device():
            ours = _gradients(rank, spec, shapes, setting.device, group)
        differ = same_bits(ours, truth[spec])
        total = sum(t.numel() for t in ours)
        setting.add(rank=rank, spec=spec, backend=backend, elements=total, differ=differ)
        failed += [f"{spec}: {differ} of {total} elements differ"] if differ else []
    assert not failed, failed


def _gradients(
    rank: int, spec: str, shapes: Sequence[tuple[int, ...]], device: torch.device, group: Any
) -> list[torch.Tensor]:
    """Averaged gradients of four steps, the second with a NaN on one rank."""
    model = DistributedDataParallel(Given(shapes).to(device), process_group=group, bucket_cap_mb=1)
    handle, results = gradq.compress(model, spec, seed=3), []
    for step in range(4):
        model.zero_grad()
        model([g.to(device) for g in given_gradients(shapes, rank, step)]).backward()
        results += [p.grad.detach().cpu().clone() for p in model.parameters() if p.grad is not None]
    handle.close()
    return results


# --- training ------------------------------------------------------------------------------------------


def train_25m(setting: Setting) -> None:
    """A GPT of 25 M on two ranks over Gloo, beside the same on the CPU."""
    _ranks(_train, 2, setting, "25m", "gloo", True)


def train_124m(setting: Setting) -> None:
    """A GPT of 124 M on two ranks over Gloo: step times."""
    _ranks(_train, 2, setting, "124m", "gloo", False)


def _train(rank: int, setting: Setting, size: str, backend: str, beside_cpu: bool) -> None:
    deterministic()
    torch.set_num_threads(1 if setting.dry_run else max(1, setting.processes // 2))
    names, world_size = CONTENDERS, dist.get_world_size()
    steps = 2 if setting.dry_run else 6
    if setting.dry_run:
        names = ("plain", "torch-bf16", "none", "int4")
    on_cpu: dict[str, list[float]] = {}
    if beside_cpu:
        for name in [n for n in names if n != "torch-bf16"]:
            contender = Contender(name, gpt(size, setting), dist.group.WORLD)
            losses = [contender.step(tokens(rank, step, setting)) for step in range(min(steps, 4))]
            on_cpu[name] = [float(loss) for loss in losses]
            contender.close()
    on_the_cuda_way("staged", setting)
    group = group_on_device(backend, setting)
    contenders: dict[str, Contender] = {}
    again = "int4, again"
    with setting.on_device():
        for name in (*names, again):
            try:
                module = gpt(size, setting).to(setting.device)
                contenders[name] = Contender(name.partition(",")[0], module, group)
            except Exception as error:  # a row says so
                if rank == 0:
                    setting.add(contender=name, refused=f"{type(error).__name__}: {error}"[:500])
        losses, ms = _turns(contenders, rank, setting, steps)
    wrong: list[str] = []
    parameters = sum(p.numel() for p in gpt(size, setting).parameters())
    for name, contender in contenders.items():
        equal = replicas_equal(contender.model)
        row = {"model": size, "parameters": parameters, "backend": backend, "ranks": world_size}
        row |= {
            "contender": name,
            "losses": losses[name],
            "step_ms_median": statistics.median(ms[name][steps // 3 :]),
        }
        row |= {"step_ms": [round(m, 2) for m in ms[name]], "replicas_equal": equal}
        row |= {"ratio_to_plain": _ratio(ms[name][steps // 3 :], ms["plain"][steps // 3 :])}
        wrong += [] if equal else [f"{name}: the ranks' parameters differ"]
        if name in on_cpu:
            error = max(abs(a - b) / b for a, b in zip(losses[name], on_cpu[name], strict=False))
            row |= {"losses_on_cpu": on_cpu[name], "largest_relative_difference": error}
            wrong += [] if error < TOLERANCE else [f"{name}: losses are {error:.1e} off the CPU's"]
        if rank == 0:
            setting.add(**row)
        contender.close()
    for one, other in (("plain", "none"), ("int4", again)):
        same = losses[one] == losses[other]
        wrong += [] if same else [f"losses of {one} and {other} are not the same bits"]
    assert not wrong, wrong


def _turns(
    contenders: dict[str, Contender], rank: int, setting: Setting, steps: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Losses and step times in ms; a step of each a round, in an order drawn anew, the same on all ranks."""
    losses: dict[str, list[float]] = {name: [] for name in contenders}
    ms: dict[str, list[float]] = {name: [] for name in contenders}
    order, draw = list(contenders), random.Random(0)
    for step in range(steps):
        batch = tokens(rank, step, setting).to(setting.device)
        draw.shuffle(order)
        for name in order:
            setting.synchronize()
            dist.barrier()
            start = time.perf_counter()
            loss = contenders[name].step(batch)
            setting.synchronize()
            ms[name].append(1e3 * (time.perf_counter() - start))
            losses[name].append(float(loss))
    return losses, ms


def _ratio(ms: Sequence[float], plain: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(ms, plain, strict=True)), 3)


# --- NCCL ----------------------------------------------------------------------------------------------


def nccl(setting: Setting) -> None:
    """One rank over NCCL; then two on one device, which this NCCL may refuse: a row says what it said."""
    _ranks(_one_rank, 1, setting)
    os.environ["NCCL_DEBUG"] = "WARN"
    try:
        run_ranks(_averages, 2, setting, "nccl", timeout=min(60.0, max(5.0, setting.left - 3)))
    except AssertionError as error:
        text = str(error).strip()
        if "elements differ" in text:
            raise
        setting.add(two_ranks_on_one_device="refused", said=text[-1500:])
    else:
        setting.add(two_ranks_on_one_device="works", devices=torch.cuda.device_count())


def _one_rank(rank: int, setting: Setting) -> None:
    """At world size 1 gradq passes through: losses are those of plain DDP."""
    deterministic()
    on_the_cuda_way("stream", setting)
    group = group_on_device("nccl", setting)
    with setting.on_device():
        names = ("plain", "none", "int4") if setting.dry_run else ("plain", "torch-bf16", *CONTENDERS[2:])
        contenders = {}
        for name in names:
            module = gpt("25m", setting).to(setting.device)
            contenders[name] = Contender(name, module, group)
        losses, ms = _turns(contenders, rank, setting, 3 if setting.dry_run else 12)
    for name, contender in contenders.items():
        row = {"contender": name, "ranks": 1, "backend": "nccl", "losses": losses[name]}
        row |= {"step_ms_median": statistics.median(ms[name][2:])}
        setting.add(**row, ratio_to_plain=_ratio(ms[name][2:], ms["plain"][2:]))
        contender.close()
    differ = [n for n in names if n != "torch-bf16" and losses[n] != losses["plain"]]
    assert not differ, f"at one rank losses are not plain DDP's: {differ}"


# --- memory --------------------------------------------------------------------------------------------


def memory(setting: Setting) -> None:
    """Peak device memory of two ranks, one contender after the other, beside plain DDP's."""
    _ranks(_memory, 2, setting)


def _memory(rank: int, setting: Setting) -> None:
    on_the_cuda_way("staged", setting)
    group, plain = group_on_device("gloo", setting), 0
    names = ("plain", "int4") if setting.dry_run else [n for n in CONTENDERS if n != "torch-bf16"]
    for name in names:
        if not setting.dry_run:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = _memory_now(setting)
        with setting.on_device():
            contender = Contender(name, gpt("25m", setting).to(setting.device), group)
            for step in range(3):
                contender.step(tokens(rank, step, setting).to(setting.device))
        setting.synchronize()
        peak = _memory_peak(setting) - before
        plain = peak if name == "plain" else plain
        contender.close()
        del contender
        row = {"contender": name, "peak_bytes": peak, "beside_plain": round(peak / max(plain, 1), 4)}
        if rank == 0:
            setting.add(**row, kept_after_close=_memory_now(setting) - before)


def _memory_now(setting: Setting) -> int:
    return 0 if setting.dry_run else torch.cuda.memory_allocated()


def _memory_peak(setting: Setting) -> int:
    """Of the device; in a dry run that of the process, which says nothing of a GPU."""
    if setting.dry_run:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return torch.cuda.max_memory_allocated()
