"""What DistributedDataParallel does not say in public; the only home of its private members here."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["averaged_parameters", "hook_states", "unwrap_compiled", "wrappers_of"]


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped, or the model."""
    while type(model).__name__ == "OptimizedModule" and isinstance(
        inner := model._modules.get("_orig_mod"), nn.Module
    ):
        model = inner
    return model


class _AsTheyAre(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """zeros_like without zeros."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return args[0] if func is torch.ops.aten.zeros_like.default else func(*args, **(kwargs or {}))


def averaged_parameters(model: DistributedDataParallel) -> set[Tensor]:
    """The parameters that DDP averages: what required a gradient when it was made, but for the ignored.

    Only the reducer knows; it tells by its buckets. It is asked for zeros like them, which are not made.
    """
    try:
        with _AsTheyAre():  # type: ignore[no-untyped-call]
            buckets = model.reducer._get_zeros_like_grad_buckets()
    except RuntimeError:  # there are sparse gradients, for which it has no buckets
        parameters, _ = model._build_params_for_reducer()  # type: ignore[no-untyped-call]
        return set(parameters)
    return {parameter for bucket in buckets for parameter in bucket.parameters()}


def hook_states(model: DistributedDataParallel) -> list[object]:
    """The states of the communication hooks that were registered in Python, those of a copied model too."""
    return [state for _, state in getattr(model, "_comm_hooks", ())]


def wrappers_of(parameter: Tensor) -> list[DistributedDataParallel]:
    """The DDP models of this process that hold a parameter. Takes milliseconds: it looks at every object."""
    found = [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]
    return [model for model in found if any(own is parameter for own in model.parameters())]
