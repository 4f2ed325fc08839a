"""What ranks of the training parts share: models, contenders, and what is compared."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import gradq
from gpu_parts.setting import Setting
from gradq.bench import peers
from gradq.bench.models import GPT

__all__ = [
    "CONTENDERS", "Contender", "Given", "deterministic", "given_gradients", "gpt", "group_on_device",
    "on_the_cuda_way", "replicas_equal", "same_bits", "tokens",
]  # fmt: skip

CONTENDERS = ("plain", "torch-bf16", "none", "bf16", "int8", "int4", "rot4")
TESTS = Path(__file__).parents[2] / "tests"


def gpt(size: str, setting: Setting) -> GPT:
    """A GPT over bytes with 25 or 124 million parameters; in a dry run a tiny one."""
    torch.manual_seed(0)
    if setting.dry_run:
        return GPT(width=16, num_layers=1, num_heads=2, seq_len=16)
    width, num_layers, num_heads = {"25m": (512, 8, 8), "124m": (832, 15, 13)}[size]
    return GPT(width=width, num_layers=num_layers, num_heads=num_heads, seq_len=128)


def tokens(rank: int, step: int, setting: Setting) -> Tensor:
    """A batch [B, T + 1] of a language in which a byte tells the next one, more or less."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    shape = (2, 17) if setting.dry_run else (4, 129)
    start = torch.randint(256, (shape[0], 1), generator=generator)
    noise = torch.randint(3, shape, generator=generator)
    return (start + (7 * torch.arange(shape[1]) + noise)) % 256


def deterministic() -> None:
    """Ask torch for the same bits every time, and for fp32 products in fp32."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("highest")


class Contender:
    """A model of its own in DDP, with a hook and an optimizer.

    Args:
        name: "plain", "torch-bf16" or a spec of gradq.
        module: on its device.
        group: DDP's.
    """

    def __init__(self, name: str, module: nn.Module, group: dist.ProcessGroup) -> None:
        self.model = DistributedDataParallel(module, process_group=group, gradient_as_bucket_view=True)
        self.handle: gradq.HookState | None = None
        if name.startswith("torch-"):
            peers.register_cast(self.model, name.removeprefix("torch-"))
        elif name != "plain":
            self.handle = gradq.compress(self.model, name, seed=7)
        self.optimizer = torch.optim.SGD(module.parameters(), lr=0.05)

    def step(self, batch: Tensor) -> Tensor:
        """One training step; the loss stays on the device."""
        self.optimizer.zero_grad()
        logits = self.model(batch[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def close(self) -> None:
        """Give threads and process groups back."""
        if self.handle is not None:
            self.handle.close()


class Given(nn.Module):
    """A model whose gradients are given: no matrix product, whose bits differ between CPU and GPU.

    The loss is the sum of p g + p² / 2, so a parameter's gradient is g + p, rounded once.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weights = nn.ParameterList(
            nn.Parameter(0.1 * torch.randn(shape, generator=generator)) for shape in shapes
        )

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        """The loss."""
        terms = [(p * g).sum() + 0.5 * (p * p).sum() for p, g in zip(self.weights, gradients, strict=True)]
        return torch.stack(terms).sum()


def given_gradients(shapes: Sequence[tuple[int, ...]], rank: int, step: int) -> list[Tensor]:
    """Gradients of a rank in a step, with magnitudes far apart; in the second step rank 1 has a NaN."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    drawn = [torch.randn(s, generator=generator) * 10.0 ** (k % 5 - 3) for k, s in enumerate(shapes)]
    if step == 1 and rank == 1:
        drawn[0].view(-1)[17] = torch.nan
    return drawn


def same_bits(ours: Sequence[Tensor], truth: Sequence[Tensor]) -> int:
    """How many elements differ in their bits, of all; two NaNs are the same."""
    differ = 0
    for a, b in zip(ours, truth, strict=True):
        a, b = a.detach().cpu(), b.detach().cpu()
        differ += int(((a.view(torch.int32) != b.view(torch.int32)) & ~(a.isnan() & b.isnan())).sum())
    return differ


def replicas_equal(module: nn.Module) -> bool:
    """Whether all ranks hold the same bits in every parameter. Collective, over the default group."""
    digest = torch.stack([p.detach().cpu().view(torch.int32).long().sum() for p in module.parameters()])
    weighted = torch.stack(
        [
            (p.detach().cpu().view(torch.int32).long().flatten() * torch.arange(1, p.numel() + 1)).sum()
            for p in module.parameters()
        ]
    )
    mine = torch.cat((digest, weighted))
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return all(torch.equal(theirs, mine) for theirs in everyone)


def group_on_device(backend: str, setting: Setting) -> dist.ProcessGroup:
    """A process group of all ranks for the device's tensors: "gloo" or "nccl"; in a dry run Gloo."""
    if backend == "nccl" and not setting.dry_run:
        torch.cuda.set_device(setting.device if torch.cuda.device_count() == 1 else dist.get_rank())
        group = dist.new_group(backend="cpu:gloo,cuda:nccl")
    else:
        group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def on_the_cuda_way(kind: str, setting: Setting) -> None:
    """In a dry run, from now on CPU tensors go the way of CUDA tensors: "stream" as NCCL's, or "staged"."""
    if setting.dry_run:
        sys.path.insert(0, str(TESTS / "distributed"))
        import test_devices

        as_on_cuda: Callable[[str], None] = test_devices.as_on_cuda
        as_on_cuda(kind)
