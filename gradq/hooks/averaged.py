"""What is averaged: the parameters of a model that DDP averages, by name, and over which ranks."""

from __future__ import annotations

import gc
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradq.errors import ConfigError, UnsupportedError
from gradq.hooks import _ddp_reducer
from gradq.policy import ParameterInfo, named_parameters, roles

__all__ = [
    "DTYPES",
    "averaged_names",
    "check_group",
    "confirm_group",
    "describe",
    "find_wrapper",
    "kind",
    "unsupported",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_group(group: object) -> dist.ProcessGroup:
    """The group, if this rank is in it.

    Raises:
        ConfigError: this rank is not in the group, or group is not a process group.
    """
    if not dist.is_initialized():
        raise ConfigError('no process group: call torch.distributed.init_process_group("gloo") first')
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ConfigError("group=: this rank is not in the group; call gradq on its ranks only")
    if not isinstance(group, dist.ProcessGroup):
        raise ConfigError(
            f"group={group!r:.200}: it must be a process group, such as torch.distributed.new_group([0, 1]) "
            "or mesh.get_group()"
        )
    return group


def find_wrapper(module: nn.Module, group: dist.ProcessGroup | None) -> DistributedDataParallel | None:
    """The DDP model that averages a module's gradients; None where the module is not wrapped yet.

    Args:
        module: DistributedDataParallel itself, or the module that it wraps.
        group: the group that was asked for, None for DDP's own.

    Raises:
        ConfigError: DDP averages over other ranks than the group's, or there are several DDP models over
            different ones.
    """
    if isinstance(module, DistributedDataParallel):
        if group is not None and _ranks(module.process_group) != _ranks(group):
            raise ConfigError(
                f"group= has the ranks {_ranks(group)}, but DistributedDataParallel averages over "
                f"{_ranks(module.process_group)}; leave group= out"
            )
        return module
    parameter = next((p for p in module.parameters() if p.requires_grad), None)
    if parameter is None:
        return None
    found = _ddp_reducer.wrappers_of(parameter)
    if group is not None:
        return next((model for model in found if _ranks(model.process_group) == _ranks(group)), None)
    if len({_ranks(model.process_group) for model in found}) > 1:
        del found
        gc.collect()  # a model that was wrapped before, and is not used any more
        found = _ddp_reducer.wrappers_of(parameter)
    if len({_ranks(model.process_group) for model in found}) > 1:
        raise ConfigError(
            "several DistributedDataParallel models over different ranks wrap this module; give "
            "gradq.HookState the one that it is for, or group="
        )
    return found[-1] if found else None


def confirm_group(parameter: Tensor, group: dist.ProcessGroup, *, asked: bool) -> None:
    """Check, when DDP averages a parameter, that it does so over the ranks of a group.

    Args:
        parameter: a parameter from DDP's bucket.
        group: the one that gradq averages over.
        asked: whether the user named it; otherwise it was taken to be the default group.

    Raises:
        ConfigError: DDP uses another group, or which one is not known.
    """
    found = {_ranks(model.process_group) for model in _ddp_reducer.wrappers_of(parameter)}
    if _ranks(group) in found or (asked and not found):
        return
    uses = " or ".join(str(ranks) for ranks in sorted(found)) or "ranks that gradq cannot find out"
    raise ConfigError(
        f"gradq.HookState was made for the ranks {_ranks(group)}, but DistributedDataParallel averages this "
        f"model over {uses}: nothing was averaged. Give gradq.HookState the DistributedDataParallel model, "
        "or its process group as group="
    )


def _ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def averaged_names(module: nn.Module, wrapper: DistributedDataParallel | None) -> dict[Tensor, str]:
    """The names of the parameters that DDP averages.

    Args:
        module: the module that DDP wraps.
        wrapper: the DDP model. Without it, parameters that require a gradient and that DDP is not told to
            ignore are meant.

    Raises:
        UnsupportedError: DDP averages no parameter of the module.
    """
    names = named_parameters(module)
    if wrapper is not None:
        members = _ddp_reducer.averaged_parameters(wrapper)
    else:
        ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
        members = {p for n, p in module.named_parameters() if p.requires_grad and n not in ignored}
    found: dict[Tensor, str] = {p: name for p, name in names.items() if p in members}
    if not found:
        raise UnsupportedError(
            "the model has no parameters that require gradients; there is nothing to average"
        )
    return found


def describe(module: nn.Module, names: Mapping[Tensor, str]) -> list[ParameterInfo]:
    """What a policy is to know of the parameters."""
    role = roles(module)
    return [
        ParameterInfo(
            name=name,
            shape=tuple(parameter.shape),
            dtype=parameter.dtype,
            index=index,
            role=role.get(name, ""),
        )
        for index, (parameter, name) in enumerate(names.items())
    ]


def unsupported(module: nn.Module, names: Mapping[Tensor, str]) -> UnsupportedError | None:
    """Why these gradients cannot be compressed, naming the parameter; None if they can."""
    for path, child in module.named_modules():
        if isinstance(child, nn.Embedding | nn.EmbeddingBag) and child.sparse and child.weight in names:
            return UnsupportedError(
                f"module {path!r} makes sparse gradients, which cannot be compressed; use sparse=False, or "
                'the spec "none"'
            )
    for parameter, name in names.items():
        if parameter.dtype not in DTYPES:
            return UnsupportedError(
                f"parameter {name!r} is {parameter.dtype}; gradq averages fp32, bf16, fp16 and fp64 "
                'gradients; the spec "none" leaves the model to DDP'
            )
        if parameter.is_meta:
            return UnsupportedError(
                f"parameter {name!r} is on the meta device and has no values; give it some before "
                'DistributedDataParallel, for instance by model.to_empty(device="cpu")'
            )
        if parameter.device.type not in ("cpu", "cuda"):
            return UnsupportedError(
                f"parameter {name!r} is on {parameter.device}; gradq runs on CPU and CUDA tensors"
            )
    devices = {parameter.device: name for parameter, name in names.items()}
    if len(devices) > 1:
        found = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        return UnsupportedError(
            f"the parameters of a model must be on one device of a rank, not {found}; give each rank its own"
        )
    return None


def kind(thing: object) -> str:
    """The words of a message for an object that is not a model."""
    if isinstance(thing, type):
        return f"the class {thing.__name__}"
    return f"an object of {type(thing).__name__}"
