"""Contenders: what takes turns in a benchmark: plain DDP, gradq's codecs, a free codec, torch's hooks.

Each is a DistributedDataParallel model with a hook and an optimizer of its own, so its loss is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradq
from gradq import rng, wire
from gradq.bench import peers
from gradq.bench.models import Task, load_function
from gradq.bench.scenario import COMPUTE, PLAIN, Scenario
from gradq.codecs import Codec
from gradq.errors import UnsupportedError
from gradq.hooks.handle import GradientHandle
from gradq.policy import FixedPolicy, ParameterInfo, Plan, Policy, Spec

__all__ = ["Contender", "FreePolicy", "open_contender"]


@dataclass(frozen=True)
class _FreeCodec(Codec):
    """The bytes of another codec, without the work: nothing is encoded, nothing is decoded."""

    inner: Codec

    @property
    def name(self) -> str:
        """See `Codec.name`."""
        return f"free-{self.inner.name}"

    @property
    def block_size(self) -> int:
        """See `Codec.block_size`."""
        return self.inner.block_size

    @property
    def unbiased(self) -> bool:
        """It carries no values."""
        return False

    @property
    def contractive(self) -> bool:
        """It carries no values."""
        return False

    def nbytes(self, numel: int) -> int:
        """See `Codec.nbytes`."""
        return self.inner.nbytes(numel)

    def encode(
        self,
        x: Tensor,
        payload: Tensor,
        *,
        context: rng.EncodeContext,
        residual: Tensor | None = None,
        new_residual: Tensor | None = None,
    ) -> None:
        """Leave the payload as it is."""

    def decode(self, payload: Tensor, out: Tensor) -> None:
        """Leave out as it is."""

    def decode_mean(self, payloads: Tensor, out: Tensor) -> None:
        """Leave out as it is."""

    def warm_up_calls(
        self, device: torch.device | None = None, num_rows: int = 1, feedback: bool | None = None
    ) -> list[Callable[[], None]]:
        """There are no kernels."""
        return []

    def __str__(self) -> str:
        return f"free-{self.inner}"

    @classmethod
    def from_name(cls, name: str) -> Codec:
        """It has no spec of its own."""
        raise UnsupportedError(f"{name}: a free codec exists in benchmarks only")


class FreePolicy:
    """The plan of a spec with its codecs made free: the bound for whatever sends as many bytes.

    Gradients are not averaged, so a model trained with it learns nothing worth looking at.

    Args:
        spec: the spec whose bytes are sent.
    """

    def __init__(self, spec: str) -> None:
        self._policy = FixedPolicy(spec=Spec.parse(spec))

    def plan(self, parameters: Sequence[ParameterInfo]) -> Plan:
        """See `gradq.policy.Policy`."""
        return {
            name: replace(
                entry,
                phase1=_FreeCodec(entry.phase1),
                phase2=_FreeCodec(entry.phase2),
                feedback1=False,  # nothing is encoded, so nothing is left out
                feedback2=False,
            )
            for name, entry in self._policy.plan(parameters).items()
        }


@dataclass
class Contender:
    """One of those that take turns.

    Attributes:
        name: the codec's name in the scenario.
        model: a model of its own.
        optimizer: an optimizer of its own.
        sent: payload bytes this rank has sent so far, as the transport counts them; None where nothing
            counts.
        communicates: whether gradients are averaged at all.
        learns: whether its loss means anything.
        handle: the handle of gradq, where it is one of gradq's codecs.
        close: a function that gives threads and process groups back.
    """

    name: str
    model: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    sent: Callable[[], float | None]
    communicates: bool = True
    learns: bool = True
    handle: GradientHandle | None = None
    close: Callable[[], None] = field(default=lambda: None)
    steps: int = 0

    def timings_ms(self) -> dict[str, float]:
        """Time spent so far encoding, exchanging and decoding, where gradq measures it."""
        if self.handle is None:
            return {}
        stats = self.handle.stats()
        return {"encode_ms": stats.encode_ms, "exchange_ms": stats.exchange_ms, "decode_ms": stats.decode_ms}


def open_contender(name: str, scenario: Scenario, task: Task, seed: int, device: torch.device) -> Contender:
    """Make a contender. All ranks call this together.

    Raises:
        GradqError: it cannot run here; torch's own errors where torch refuses its hook.
    """
    module = task.build(seed).to(device)
    numel_bytes = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    model = DistributedDataParallel(module, gradient_as_bucket_view=True)
    contender = Contender(name, model, _optimizer(task, model), sent=lambda: 0.0)
    world_size = dist.get_world_size()

    def dense() -> float:
        return float(contender.steps * wire.ring_bytes(numel_bytes, world_size))

    if name == COMPUTE:
        contender.communicates = contender.learns = False
    elif name == PLAIN:
        contender.sent = dense
    elif name == "torch-fp16" or name == "torch-bf16":
        peers.register_cast(model, name.removeprefix("torch-"))
        contender.sent = lambda: dense() / 2
    elif name.startswith("torch-powersgd:"):
        power = peers.register_powersgd(model, int(name.partition(":")[2]))
        contender.sent = power.sent_bytes
    elif name.startswith("hivemind:"):
        contender.sent = peers.register_hivemind(model, name.partition(":")[2])
    elif ".py:" in name:
        load_function(name)(model)
        contender.sent = lambda: None
    else:
        free = name.startswith("free:")
        spec: str | Policy = FreePolicy(name.removeprefix("free:")) if free else name
        handle = gradq.compress(model, spec, seed=seed)
        contender.handle, contender.close, contender.learns = handle, handle.close, not free
        contender.sent = lambda: float(handle.stats().wire_bytes)
    return contender


def _optimizer(task: Task, model: nn.Module) -> torch.optim.Optimizer:
    if task.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=task.lr, fused=True)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=task.lr, betas=(0.9, 0.95), fused=True
    )
