"""FSDP2's `replicate`, and HSDP whose mesh dimensions are named by `dp_mesh_dims`, against FSDP's own."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.fsdp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import gradq
from gradq.testing import run_ranks


def replicated(rank: int, specs: list[str]) -> dict[str, tuple[float, int, float]]:
    """Errors of three steps' gradients against `replicate` by itself; counted steps; ratio of bytes."""
    from torch.distributed._composable.replicate_with_fsdp import replicate

    return {spec: against(spec, rank, lambda part: replicate(part), lambda x: x) for spec in specs}


def by_dimensions(rank: int, specs: list[str]) -> dict[str, tuple[float, int, float]]:
    """The same of a mesh of 2 x 2 whose dimensions are named."""
    from torch.distributed.fsdp import DataParallelMeshDims, fully_shard
    from torch.distributed.tensor import DTensor, Replicate, distribute_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s"))
    dims = DataParallelMeshDims(shard="s", replicate="r")

    def shard(part: nn.Module) -> None:
        distribute_module(part, mesh)
        fully_shard(part, mesh=mesh, dp_mesh_dims=dims)

    def spread(x: Tensor) -> Tensor:
        return DTensor.from_local(x, mesh, [Replicate(), Replicate()], run_check=False)

    return {spec: against(spec, rank, shard, spread) for spec in specs}


def against(spec: str, rank: int, apply, spread) -> tuple[float, int, float]:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 40))
        apply(model[0])
        apply(model[2])
        models.append(model)
    handle = gradq.compress(models[1], spec)
    for step in range(3):
        x = torch.randn(4, 40, generator=torch.Generator().manual_seed(10 * step + rank))
        for model in models:
            model(spread(x)).square().mean().backward()
    stats = handle.stats()
    handle.close()
    worst = 0.0
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        want, got = p.grad.to_local(), q.grad.to_local()
        worst = max(worst, float((want - got).norm()) / float(want.norm()))
    return worst, stats.steps, stats.ratio


@pytest.mark.parametrize("world_size", [2, 3])
def test_replicate(world_size: int) -> None:
    pytest.importorskip("torch.distributed._composable.replicate_with_fsdp")
    check(run_ranks(replicated, world_size, ["fp32", "int4", "none"]))


def test_named_dimensions() -> None:
    if not hasattr(torch.distributed.fsdp, "DataParallelMeshDims"):
        pytest.skip("this torch has no dp_mesh_dims")
    check(run_ranks(by_dimensions, 4, ["fp32", "int4"]))


def check(results: list[dict[str, tuple[float, int, float]]]) -> None:
    for result in results:
        for spec, (error, steps, ratio) in result.items():
            assert steps == 3
            assert error < (0.2 if spec == "int4" else 1e-6), (spec, error)
            assert ratio > (3 if spec == "int4" else 0.6), (spec, ratio)
