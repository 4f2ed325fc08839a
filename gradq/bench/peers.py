"""Others' compression, as rows beside ours. Only called, never copied; what is not installed says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from gradq import wire
from gradq.errors import ConfigError, UnsupportedError

__all__ = ["PowerSGD", "register_cast", "register_hivemind", "register_powersgd"]


def register_cast(model: DistributedDataParallel, dtype: str) -> None:
    """Torch's fp16 or bf16 hook.

    Raises:
        UnsupportedError: torch refuses it (bf16 on Gloo).
    """
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    hook = default_hooks.fp16_compress_hook if dtype == "fp16" else default_hooks.bf16_compress_hook
    try:
        model.register_comm_hook(None, hook)
    except TypeError as error:
        raise UnsupportedError(f"torch refuses its {dtype} hook here: {error}") from error


@dataclass
class PowerSGD:
    """torch's PowerSGD hook, one bucket at a time on Gloo.

    With several buckets under way it issues collectives from callbacks, in an order that differs between
    ranks, and hangs; so there the hook waits for each bucket, and the exchange overlaps with nothing.
    """

    state: Any
    serialise: bool
    world_size: int
    dense_bytes: int = 0

    def average(self, bucket: GradBucket) -> Future[Tensor]:
        """The hook of one bucket."""
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import powerSGD_hook

        if self.state.iter < self.state.start_powerSGD_iter:
            self.dense_bytes += bucket.buffer().nbytes
        future: Future[Tensor] = powerSGD_hook(self.state, bucket)
        if self.serialise:
            future.wait()
        return future

    def sent_bytes(self) -> float:
        """Payload bytes this rank has sent, every all-reduce being a ring."""
        low_rank = 4 * self.state.total_numel_after_compression
        return float(wire.ring_bytes(self.dense_bytes + low_rank, self.world_size))


def _powersgd_hook(state: PowerSGD, bucket: GradBucket) -> Future[Tensor]:
    return state.average(bucket)


# DDP compares annotations with real types, and this module has them as strings
_powersgd_hook.__annotations__ = {"bucket": GradBucket, "return": Future[Tensor]}


def register_powersgd(model: DistributedDataParallel, rank: int) -> PowerSGD:
    """Torch's PowerSGD with error feedback and warm start, from the third step on.

    Args:
        model: a model without a hook.
        rank: rank of the approximation.
    """
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

    state = PowerSGDState(
        process_group=None,
        matrix_approximation_rank=rank,
        start_powerSGD_iter=2,
        orthogonalization_epsilon=1e-8,
    )
    power = PowerSGD(state, dist.get_backend() != "nccl", dist.get_world_size())
    model.register_comm_hook(power, _powersgd_hook)
    return power


def register_hivemind(model: DistributedDataParallel, name: str) -> Callable[[], float]:
    """A compression class of hivemind's, by all-gather: every rank decodes what all ranks encoded.

    Args:
        model: a model without a hook.
        name: name of a class in hivemind.compression, such as "Uniform8BitQuantization".

    Returns:
        Payload bytes this rank has sent so far.

    Raises:
        ConfigError: hivemind is not installed or has no such class. UnsupportedError: it does not work here.
    """
    try:
        from hivemind import compression  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise ConfigError(f"hivemind:{name} needs hivemind: pip install hivemind") from None
    if not hasattr(compression, name):
        known = [entry for entry in dir(compression) if entry.endswith(("Quantization", "Compression"))]
        raise ConfigError(f"hivemind has no compression {name!r}; it has {', '.join(known)}")
    try:
        codec = getattr(compression, name)()
        sample = torch.randn(4096)
        codec.extract(codec.compress(sample, compression.CompressionInfo.from_tensor(sample)))
    except Exception as error:  # of any kind: it is another's code and its dependencies
        raise UnsupportedError(
            f"hivemind's {name} does not work here: {type(error).__name__}: {error}"
        ) from error
    world_size, sent = dist.get_world_size(), [0.0]

    def average(state: object, bucket: GradBucket) -> Future[Tensor]:
        flat = bucket.buffer()
        message = codec.compress(flat, compression.CompressionInfo.from_tensor(flat))
        own = torch.frombuffer(bytearray(message.SerializeToString()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
        dist.all_gather(sizes, torch.tensor([own.numel()]))
        largest = max(int(size) for size in sizes)
        padded = torch.zeros(largest, dtype=torch.uint8)
        padded[: own.numel()] = own
        received = [torch.empty_like(padded) for _ in range(world_size)]
        dist.all_gather(received, padded)
        sent[0] += (world_size - 1) * largest
        mean = torch.zeros_like(flat)
        for size, payload in zip(sizes, received, strict=True):
            mean += codec.extract(type(message).FromString(payload[: int(size)].numpy().tobytes())).view_as(
                flat
            )
        flat.copy_(mean.div_(world_size))
        future: Future[Tensor] = Future()
        future.set_result(flat)
        return future

    average.__annotations__ = {"bucket": GradBucket, "return": Future[Tensor]}
    model.register_comm_hook(None, average)
    return lambda: sent[0]
