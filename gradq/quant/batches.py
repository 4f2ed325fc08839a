"""Feeding a model from any iterable of batches, with progress on stderr."""

from __future__ import annotations

import inspect
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from gradq.errors import CalibrationError, ConfigError
from gradq.quant.fake import FakeQuantize

__all__ = [
    "ToInputs",
    "evaluating",
    "float_mode",
    "kept",
    "limited",
    "progress",
    "run_batch",
    "unwrap",
    "watching",
]

T = TypeVar("T")
ToInputs = Callable[[Any], Any]


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DDP and its like."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        inner: nn.Module = model.module
        return inner
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode comes back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def float_mode(model: nn.Module, mode: str = "float") -> Iterator[None]:
    """Turn every quantizer of a model off: it computes in float.

    Args:
        model: a model with quantizers.
        mode: ``copy`` passes copies on, as a quantizer does: who changes a tensor in place behind it is seen.
    """
    quantizers = [m for m in model.modules() if isinstance(m, FakeQuantize)]
    modes = [q.mode for q in quantizers]
    for quantizer in quantizers:
        quantizer.mode = mode
    try:
        yield
    finally:
        for quantizer, mode in zip(quantizers, modes, strict=True):
            quantizer.mode = mode


@contextmanager
def watching(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks of modules at the end of the block, however it ends."""
    hooks = list(hooks)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def run_batch(model: nn.Module, batch: Any, to_inputs: ToInputs | None = None) -> Any:
    """Call a model on a batch as a loader gives it.

    A tensor is the only argument; of a tuple or list the model takes as many leading entries as its forward
    requires (labels fall away); of a dict the entries its forward names.

    Args:
        model: the model.
        batch: what the loader yields.
        to_inputs: batch → tensor, tuple of arguments or dict, if the rule above does not fit.

    Returns:
        The model's output.

    Raises:
        ConfigError: a batch of another type.
    """
    if to_inputs is not None:
        batch = to_inputs(batch)
    parameters = inspect.signature(model.forward).parameters
    if isinstance(model, fx.GraphModule):
        places = [n for n in model.graph.nodes if n.op == "placeholder"]
        names, required = [str(n.target) for n in places], sum(not n.args for n in places)
    else:
        names = list(parameters)
        required = sum(
            p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
            for p in parameters.values()
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def move(x: Any) -> Any:
        return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), x)

    if isinstance(batch, Tensor):
        return model(move(batch))
    if isinstance(batch, (tuple, list)):
        count = len(batch) if to_inputs is not None else max(1, required)
        return model(*(move(x) for x in batch[:count]))
    if isinstance(batch, Mapping):
        return model(**{key: move(x) for key, x in batch.items() if key in names})
    raise ConfigError(
        f"a batch is a {type(batch).__name__}; yield tensors, tuples or dicts, or pass to_inputs=function"
    )


def progress(items: Iterable[T], label: str, *, total: int | None = None, show: bool = True) -> Iterator[T]:
    """Yield items; say on stderr how far it is, at most twice a second.

    Args:
        items: anything iterable.
        label: what is being done.
        total: how many there are; found from ``len`` if it can be.
        show: False for silence.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    start, last, count = time.monotonic(), 0.0, 0
    for item in items:
        yield item
        count += 1
        now = time.monotonic()
        if show and (now - last > 0.5 or count == total):
            last = now
            sys.stderr.write(f"\r{label} {_bar(count, total)} {now - start:.0f} s")
            sys.stderr.flush()
    if show and count:
        sys.stderr.write("\n")


def _bar(count: int, total: int | None) -> str:
    if not total:
        return str(count)
    filled = 24 * count // total
    return f"[{'█' * filled}{'·' * (24 - filled)}] {count}/{total}"


def limited(loader: Iterable[T], num_batches: int | None) -> tuple[Iterable[T], int | None]:
    """The first batches of a loader, and how many that is if it is known."""
    total = len(loader) if isinstance(loader, Sized) else None
    if num_batches is None:
        return loader, total
    if num_batches < 1:
        raise ConfigError(f"num_batches is {num_batches}; legal: 1 or more, or None for all")
    return itertools.islice(loader, num_batches), num_batches if total is None else min(total, num_batches)


def kept(loader: Iterable[T], num_batches: int | None) -> list[T]:
    """The first batches of a loader, in memory, for what goes over them several times.

    Raises:
        CalibrationError: there is none.
    """
    batches = list(limited(loader, num_batches)[0])
    if not batches:
        raise CalibrationError("the loader yielded no batch; give at least one")
    return batches
