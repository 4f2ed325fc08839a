"""Members: what local steps average of a model, what they only give to all ranks, and whether ranks agree.

Trained parameters are averaged. Frozen ones and buffers are rank 0's at the start, byte for byte, in any
dtype. What is trained may change: every average carries a note of what its rank trains and where it stands,
and when all ranks' notes have changed alike, they average the new parameters from then on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradq.errors import MismatchError, PeerError, UnsupportedError
from gradq.local_steps.fragments import WORK_DTYPES
from gradq.policy import canonical_name, named_parameters
from gradq.sync.gradient_sync import GradientSync

__all__ = [
    "Notes",
    "buffers",
    "describe",
    "digest",
    "frozen",
    "give_from_first",
    "mean_over_ranks",
    "named",
    "take_residuals",
    "trained",
]


def named(model: nn.Module) -> dict[str, Tensor]:
    """All parameters by canonical name."""
    return {name: parameter for parameter, name in named_parameters(model).items()}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """All buffers by canonical name."""
    return {canonical_name(name): buffer for name, buffer in model.named_buffers()}


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that require a gradient and have elements, by name; there may be none.

    Raises:
        UnsupportedError: naming what cannot be averaged, and what to do.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise UnsupportedError(
            "the model is wrapped in DistributedDataParallel, which averages gradients in every step: local "
            "steps replace that. Pass the plain module"
        )
    parameters: dict[str, Tensor] = {}
    for name, parameter in named(model).items():
        _check_kind(name, parameter)
        if not parameter.requires_grad or parameter.numel() == 0:
            continue
        if parameter.dtype not in WORK_DTYPES:
            raise UnsupportedError(
                f"parameter {name!r} is {parameter.dtype}; local steps average fp32, bf16, fp16 and fp64"
            )
        parameters[name] = parameter
    return parameters


def _check_kind(name: str, parameter: Tensor) -> None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise UnsupportedError(
            f"parameter {name!r} has no shape yet (a lazy module): run one forward before local steps"
        )
    if type(parameter.data).__name__ == "DTensor":
        raise UnsupportedError(
            f"parameter {name!r} is sharded (a DTensor); local steps need it whole on each rank"
        )
    if parameter.is_meta:
        raise UnsupportedError(
            f"parameter {name!r} is on the meta device: give it values first, with model.to_empty(device=...)"
        )


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that require no gradient, by name."""
    return {name: p for name, p in named(model).items() if not p.requires_grad and p.numel()}


def describe(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and dtypes by name: what ranks must have in common."""
    return {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors}


def digest(parameters: Mapping[str, Tensor]) -> int:
    """A 63-bit number of names, shapes and dtypes."""
    text = repr(describe(parameters.items())).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


@torch.no_grad()
def give_from_first(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Replace tensors by rank 0's, byte for byte, in any dtype and shape. Collective."""
    root = dist.get_global_rank(group, 0)
    for tensor in tensors:
        if tensor.numel():
            values = tensor.detach().cpu().contiguous().reshape(-1).clone()
            dist.broadcast(values.view(torch.uint8), root, group=group)
            tensor.copy_(values.view(tensor.shape))


@torch.no_grad()
def mean_over_ranks(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """Replace a floating-point tensor by its mean, the same on all ranks. Collective."""
    mean = tensor.detach().cpu().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    mean = mean.contiguous().clone()
    dist.all_reduce(mean, group=group)
    tensor.copy_(mean.div_(group.size()))


def take_residuals(old: GradientSync, new: GradientSync) -> None:
    """Keep what is owed to parameters that go on; shard residuals where this rank owns the same shard."""
    for name in old.feedback.local.names():
        residual = old.feedback.local.current(name)
        if name in new.plan and new.plan[name].feedback1 and new.parameters[name].numel == residual.numel():
            new.feedback.local.replace(name, residual)
    for name in old.feedback.shard.names():
        kept = name in new.plan and new.plan[name].feedback2
        if kept and old.shard(name, old.rank) == new.shard(name, new.rank):
            new.feedback.shard.replace(name, old.feedback.shard.current(name))


class Notes:
    """Notes between ranks, one with every average: the inner step, the reason, and what the rank trains.

    Args:
        group: the ranks.
        timeout: limit for one exchange; the group's own if None.
    """

    NUMEL = 3

    def __init__(self, group: dist.ProcessGroup, timeout: timedelta | None) -> None:
        self._group, self._timeout = group, timeout
        self._rows: list[Tensor] = []
        self._work: dist.Work | None = None

    def post(self, inner_step: int, final: bool, members: int) -> None:
        """Send this rank's note.

        Args:
            inner_step: the number of steps of the inner optimizer so far.
            final: whether `synchronize` averages, rather than the schedule.
            members: the digest of what is trained now.
        """
        note = torch.tensor([inner_step, final, members])
        self._rows = [torch.empty_like(note) for _ in range(self._group.size())]
        self._work = dist.all_gather(self._rows, note, group=self._group, async_op=True)

    def check(self) -> None:
        """Wait for the notes of all ranks and compare them; does nothing if no note was posted.

        Raises:
            MismatchError: they differ, naming the rank and what to do.
            PeerError: a rank is gone.
        """
        work, self._work = self._work, None
        if work is None:
            return
        try:
            work.wait(*([] if self._timeout is None else [self._timeout]))
        except RuntimeError as error:
            raise PeerError(f"rank {self._group.rank()}: the other ranks did not answer: {error}") from error
        first, *others = [row.tolist() for row in self._rows]
        for rank, theirs in enumerate(others, 1):
            if theirs[:2] != first[:2]:
                raise MismatchError(
                    f"ranks are at different places: rank 0 {_place(first)}, rank {rank} {_place(theirs)}. A "
                    "rank has left out steps of its inner optimizer: pass inner_optimizer=None and call "
                    "step() after every iteration, also after those without a step (grad_scaler= does that "
                    "for a GradScaler)"
                )
            if theirs[2] != first[2]:
                raise MismatchError(
                    f"rank {rank} trains other parameters than rank 0: freeze, unfreeze, add and remove "
                    "parameters on all ranks after the same inner step"
                )


def _place(note: list[int]) -> str:
    what = "calls synchronize()" if note[1] else "averages"
    return f"{what} after {note[0]} inner steps"
