"""The front door: `compress` for DistributedDataParallel and FSDP2 models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradq.errors import UnsupportedError
from gradq.hooks._ddp_reducer import hook_states, unwrap_compiled
from gradq.hooks._fsdp_torch import is_fully_sharded
from gradq.hooks.averaged import kind
from gradq.hooks.ddp import HookState, hook
from gradq.hooks.fsdp import ShardedHandle
from gradq.hooks.handle import GradientHandle
from gradq.options import Options
from gradq.policy import Asked
from gradq.transport.handshake import telling

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from gradq.options import OptionFields

__all__ = ["compress"]


def compress(
    model: nn.Module,
    spec: Asked = "int8",
    options: Options | None = None,
    **overrides: Unpack[OptionFields],
) -> GradientHandle:
    """Compress the gradients of a model before they are averaged: DistributedDataParallel or FSDP2.

    All ranks call it with the same arguments, once, after wrapping the model and before the first step.

    Args:
        model: a DistributedDataParallel model on CPU tensors over Gloo or MPI, or on CUDA over NCCL (or
            over Gloo, through host memory); or one that `fully_shard` was applied to (FSDP2, HSDP; see
            `gradq.hooks.fsdp`).
        spec: how gradients travel; see `HookState`.
        options: the options of the run; see `gradq.Options`.
        **overrides: any field of `gradq.Options`, such as seed=1 or timeout=30, which replaces that of
            options.

    Returns:
        The handle: `stats`, `set_spec`, `state_dict`, `load_state_dict`, `close`. That of a
        DistributedDataParallel model is a `HookState`.

    Raises:
        UnsupportedError: not a DDP or FSDP2 model, its hook is taken, or see `HookState`.
        ConfigError, MismatchError: see `HookState`.

    Example:
        >>> model = DistributedDataParallel(model)          # doctest: +SKIP
        >>> handle = gradq.compress(model, "int4")          # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"gradq.compress takes the model, got {kind(model)}{_WRAP_FIRST}")
    model = unwrap_compiled(model)
    if is_fully_sharded(model):
        return ShardedHandle(model, spec, options, **overrides)
    if not isinstance(model, DistributedDataParallel):
        raise UnsupportedError(_not_ddp(model))
    with telling(model.process_group):
        closed = _closed_states(model)
    state = HookState(model, spec, options, **overrides)
    if closed:
        closed[-1].replace_by(state)
        return state
    try:
        model.register_comm_hook(state, hook)
    except RuntimeError as error:
        state.close()
        raise UnsupportedError(f"the model already has a communication hook: {error}") from error
    return state


def _closed_states(model: DistributedDataParallel) -> list[HookState]:
    """The closed states of a model; raise UnsupportedError if it may not have another one."""
    if model.mixed_precision is not None:
        raise UnsupportedError(
            "DistributedDataParallel(mixed_precision=...) takes the model's only hook; use torch.autocast"
        )
    if any(hasattr(parameter, "_in_backward_optimizers") for parameter in model.parameters()):
        raise UnsupportedError(
            "an optimizer that steps during backward (torch's _apply_optimizer_in_backward) takes "
            "DistributedDataParallel's only hook; step the optimizer after backward, or use FSDP2"
        )
    states = [state for state in hook_states(model) if isinstance(state, HookState)]
    for old in states:
        if not old.closed:
            raise UnsupportedError(
                f"the model already has a communication hook: gradq's, {old.label}. To change what "
                'it does, call handle.set_spec("int8"); to make another one, call handle.close() first'
            )
    return states


_WRAP_FIRST = "; wrap it first: model = DistributedDataParallel(model)"


def _not_ddp(model: nn.Module) -> str:
    """The message for a module that is neither wrapped nor sharded."""
    says = (
        "gradq.compress takes a DistributedDataParallel model or one with fully_shard applied (FSDP2), got "
        f"{type(model).__name__}"
    )
    inside = [path for path, child in model.named_modules() if isinstance(child, DistributedDataParallel)]
    if inside:
        return f"{says}; the DistributedDataParallel model is its {inside[0]!r}: pass that"
    return says + _WRAP_FIRST
