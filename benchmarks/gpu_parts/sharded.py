"""FSDP2 on one GPU: one rank over NCCL, two over Gloo; the same gradients, so the same bits as on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import gradq
from gpu_parts.ranks import Given, given_gradients, group_on_device, on_the_cuda_way, same_bits
from gpu_parts.setting import Setting
from gradq.testing import run_ranks

__all__ = ["fsdp_one_rank", "fsdp_two_ranks"]

SHAPES = ((700, 601), (4500,), (33,), (1000, 100))
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("plain", {}),
    ("int8", {}),
    ("int8", {"gather_spec": "int8"}),
    ("int4", {}),
    ("rot4", {}),
)


def fsdp_one_rank(setting: Setting) -> None:
    """One rank over NCCL."""
    run_ranks(_fsdp, 1, setting, "nccl", timeout=max(5.0, setting.left - 3))


def fsdp_two_ranks(setting: Setting) -> None:
    """Two ranks on one device over Gloo, if FSDP2 takes CUDA tensors over Gloo."""
    run_ranks(_fsdp, 2, setting, "gloo", timeout=max(5.0, setting.left - 3))


def _fsdp(rank: int, setting: Setting, backend: str) -> None:
    cases = CASES[2:3] if setting.dry_run else CASES
    on_cpu = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    truth = [_shards(rank, on_cpu, torch.device("cpu"), *case, setting) for case in cases]
    on_the_cuda_way("stream" if backend == "nccl" else "staged", setting)
    mesh = DeviceMesh.from_group(group_on_device(backend, setting), setting.device.type)
    wrong = []
    for (spec, options), expected in zip(cases, truth, strict=True):
        with setting.on_device():
            ours = _shards(rank, mesh, setting.device, spec, options, setting)
        differ, total = same_bits(ours, expected), sum(t.numel() for t in ours)
        ranks = dist.get_world_size()
        setting.add(
            rank=rank, ranks=ranks, backend=backend, spec=spec, **options, elements=total, differ=differ
        )
        wrong += [f"{spec} {options}: {differ} of {total} elements differ"] if differ else []
    assert not wrong, wrong


def _shards(
    rank: int, mesh: DeviceMesh, device: torch.device, spec: str, options: dict[str, Any], setting: Setting
) -> list[Tensor]:
    """This rank's gradients of three steps, the second with a NaN on one rank."""
    shapes = ((70, 61), (33,)) if setting.dry_run else SHAPES
    model, results = Given(shapes).to(device), []
    fully_shard(model, mesh=mesh)
    handle = None if spec == "plain" else gradq.compress(model, spec, seed=3, **options)
    for step in range(3):
        model.zero_grad()
        model([g.to(device) for g in given_gradients(shapes, rank, step)]).backward()
        results += [p.grad.to_local().detach().cpu().clone() for p in model.parameters()]
    if handle is not None:
        handle.close()
    return results
