"""The private members of DistributedDataParallel that gradq needs; no other file uses any."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from gradq.errors import UnsupportedError

__all__ = [
    "Trainer",
    "after_backward",
    "averaged_parameters",
    "hook_states",
    "in_backward",
    "unwrap_compiled",
    "wrappers_of",
]


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped, or the model."""
    while type(model).__name__ == "OptimizedModule" and isinstance(
        inner := model._modules.get("_orig_mod"), nn.Module
    ):
        model = inner
    return model


class _AsTheyAre(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode in which zeros_like gives back its argument."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return args[0] if func is torch.ops.aten.zeros_like.default else func(*args, **(kwargs or {}))


def averaged_parameters(model: DistributedDataParallel) -> set[Tensor]:
    """The parameters that DDP averages: what required a gradient when it was made, but for the ignored.

    Only the reducer knows. It shows its buckets when asked for zeros like them, which are not made here.
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
    """The DDP models of this process that hold a parameter.

    It looks at every object: 30 ms a million of them, which is why all steps run in C.
    """
    objects = gc.get_objects()
    is_ddp = map(_classes(DistributedDataParallel).__contains__, map(type, objects))
    found = itertools.compress(objects, is_ddp)
    return [model for model in found if any(own is parameter for own in model.parameters())]


def _classes(base: type) -> set[type]:
    """A class and everything derived from it."""
    return {base}.union(*map(_classes, base.__subclasses__()))


class Trainer:
    """What a communication hook must know of the DistributedDataParallel that calls it.

    It is held weakly: its reducer owns the hook, and the garbage collector does not see through that.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self._model = weakref.ref(model)

    @property
    def model(self) -> DistributedDataParallel | None:
        """The module, None if it is gone."""
        return self._model()

    def check_join(self) -> None:
        """Raise what the hook cannot do: it does not hear how many ranks still have inputs.

        Raises:
            UnsupportedError: `join` was asked to divide by the number of those.
        """
        model = self.model
        if model is None or getattr(model, "_divide_by_initial_world_size", True):
            return
        if model._join_config.enable:
            raise UnsupportedError(
                "join(divide_by_initial_world_size=False) is not supported: a communication hook divides by "
                "the number of all ranks; use join() as it is by default, or no gradq"
            )

    @property
    def leaves_out(self) -> bool:
        """Whether there may be parameters that no rank used, whose mean is thrown away."""
        model = self.model
        return model is not None and bool(model.find_unused_parameters or model.static_graph)

    def unused(self, parameters: Iterable[Tensor]) -> list[bool | Tensor]:
        """Of which parameters DDP threw the mean away in the last backward; call it by `after_backward`.

        It does so where no rank had a gradient, unless the gradient is a view of the bucket, into which the
        mean was written.

        Args:
            parameters: all that DDP averages, in its order.

        Returns:
            By parameter; a tensor of one bool where only the device knows.

        Raises:
            UnsupportedError: the parameters are not those that DDP averages.
        """
        model = self.model
        if model is None:
            return []
        own = list(parameters)
        used = model.reducer._get_local_used_map()  # summed over ranks by then; hangs inside a hook
        if used.numel() != len(own):
            raise UnsupportedError(
                f"DDP averages {used.numel()} parameters and gradq was told of {len(own)}; make the handle "
                "right after wrapping the model, and leave requires_grad as it is"
            )
        kept = bool(model.gradient_as_bucket_view)
        if used.is_cpu:
            pairs = zip(own, used.tolist(), strict=True)
            return [not count and not (kept and p.grad is not None) for p, count in pairs]
        return [
            True if p.grad is None else False if kept else used[index] == 0 for index, p in enumerate(own)
        ]


def in_backward() -> bool:
    """Whether this thread runs a backward."""
    return torch._C._current_graph_task_id() != -1


def after_backward(callback: Callable[[], None]) -> None:
    """Call callback when DDP has finished the backward under way.

    DDP queues its own end after the hook of the last bucket has returned; so this is queued once more from
    the queue.
    """
    queue = torch.autograd.Variable._execution_engine.queue_callback
    queue(lambda: queue(callback))
