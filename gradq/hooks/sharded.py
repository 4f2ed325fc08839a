"""What is averaged of an FSDP2 model: its shards, by name, and over which ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from gradq.errors import UnsupportedError
from gradq.hooks import _fsdp_torch
from gradq.hooks._fsdp_torch import Shard, Unit
from gradq.hooks.averaged import DTYPES
from gradq.policy import ParameterInfo, Plan, Policy

__all__ = ["ForWhole", "check", "check_feedback", "common_group", "describe"]

_log = logging.getLogger("gradq")


def describe(shards: Sequence[Shard], dtype: str = "reduce_dtype") -> list[ParameterInfo]:
    """What a policy is to know of the whole parameters.

    Args:
        shards: the shards of the parameters, in order.
        dtype: the attribute of a shard that says in which dtype it travels.
    """
    return [
        ParameterInfo(name=shard.name, shape=shard.shape, dtype=getattr(shard, dtype), index=index)
        for index, shard in enumerate(shards)
    ]


class ForWhole:
    """A policy for shards that decides by the whole parameters.

    Args:
        policy: the policy that decides.
        shards: the shards, in order.
    """

    def __init__(self, policy: Policy, shards: Sequence[Shard]) -> None:
        self._policy, self._infos = policy, describe(shards)

    def plan(self, parameters: Sequence[ParameterInfo]) -> Plan:
        """The plan for the whole parameters, which have the same names."""
        return self._policy.plan(self._infos)


def check(model: nn.Module, units: Sequence[Unit]) -> None:
    """Raise what cannot be compressed, by name; warn of parameters that nobody averages.

    Raises:
        UnsupportedError: a device or dtype that gradq does not average, or nothing that is trained.
    """
    shards = [shard for unit in units for shard in unit.shards]
    for unit in units:
        if unit.device.type not in ("cpu", "cuda"):
            raise UnsupportedError(
                f"module {unit.path!r} is on {unit.device}; gradq runs on CPU and CUDA tensors"
            )
    for shard in shards:
        if shard.requires_grad and shard.reduce_dtype not in DTYPES:
            raise UnsupportedError(
                f"the gradient of {shard.name!r} is reduced in {shard.reduce_dtype}; gradq averages "
                "fp32, bf16, fp16 and fp64 gradients"
            )
    if not any(shard.requires_grad for shard in shards):
        raise UnsupportedError("the model has no sharded parameters that require gradients")
    left_out = list(_fsdp_torch.unmanaged_parameters(model, units))
    if left_out:
        _log.warning(
            "%d parameters (%s, ...) are in no fully_shard unit: neither FSDP nor gradq averages them",
            len(left_out),
            left_out[0],
        )


def check_feedback(plan: Plan, shards: Sequence[Shard], device: torch.device, *, of_whole: bool) -> None:
    """Raise what error feedback cannot do.

    Args:
        plan: the codecs by parameter.
        shards: the shards.
        device: the device of the gradients. Whether a step was finite is asked of the host, which would wait
            for a GPU in every backward.
        of_whole: whether residuals are of whole parameters: they lie in the order of the parameter, and so
            do shards of its first dimension only.

    Raises:
        UnsupportedError: naming the parameter.
    """
    kept = [name for name, entry in plan.items() if entry.feedback1 or entry.feedback2]
    if kept and device.type != "cpu":
        raise UnsupportedError(
            f"FSDP2 on {device.type} has no error feedback, which {kept[0]!r} asks for: pass feedback=False"
        )
    for shard in shards if of_whole else ():
        if shard.dim != 0 and shard.name in plan and plan[shard.name].feedback1:
            raise UnsupportedError(
                f"{shard.name!r} is sharded along dimension {shard.dim}; error feedback needs dimension 0"
            )


def common_group(units: Sequence[Unit], what: str) -> dist.ProcessGroup | None:
    """The group that all units have in common.

    Raises:
        UnsupportedError: they have different ones.
    """
    groups = [getattr(unit, what) for unit in units]
    ranks = [None if group is None else tuple(dist.get_process_group_ranks(group)) for group in groups]
    for unit, own in zip(units, ranks, strict=True):
        if own != ranks[0]:
            raise UnsupportedError(
                f"module {unit.path!r} is sharded or replicated over other ranks than "
                f"{units[0].path!r}; gradq compresses models of one mesh"
            )
    return groups[0] if groups else None
