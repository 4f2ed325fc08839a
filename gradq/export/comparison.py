"""Runs batches through the file, the integer reference and the untouched float model, and compares."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from gradq.errors import ConfigError
from gradq.export.inputs import named_leaves
from gradq.export.inspect import Operators
from gradq.export.runtime import feed
from gradq.quant.batches import evaluating
from gradq.quant.reference import integer_reference

__all__ = [
    "Agreement",
    "Comparison",
    "Fidelity",
    "Metric",
    "float_runner",
    "input_names",
    "leaves",
    "split_batch",
]

Metric = Callable[[Tensor, Tensor], float]
_LABELS = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True)
class Agreement:
    """How the file agrees with the integer reference.

    Attributes:
        inputs: number of inputs that were compared.
        equal: share of the output elements that are equal, bit for bit.
        largest_difference: largest difference of an element, relative to the outputs' largest magnitude.
        same_choice: share of the inputs with the same argmax over the last axis.
        exact: True if every operator of the file is exact, so that every element must be equal.
        repeatable: True if a second call gave the same bits.
        batch_independent: True if a single input gave the bits that it gave in a batch; None if not checked.
    """

    inputs: int
    equal: float
    largest_difference: float
    same_choice: float
    exact: bool
    repeatable: bool
    batch_independent: bool | None


@dataclass(frozen=True)
class Fidelity:
    """How near the file is to the float model that was given to `gradq.quant.prepare`.

    Attributes:
        sqnr_db: signal to quantization noise of the worst output, in dB; infinite if all are equal.
        output: index of that output.
        same_choice: share of the inputs with the same argmax over the last axis of the first output.
        trained: True if the quantized model was trained (or its weights were rounded) since `prepare`: its
            outputs are then meant to differ.
    """

    sqnr_db: float
    output: int
    same_choice: float
    trained: bool


def input_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Names of a model's inputs, in the file's order.

    Args:
        model: model from `prepare`, or one with layers placed by hand.
        args: positional example arguments.
        kwargs: keyword example arguments.
    """
    if isinstance(model, fx.GraphModule):
        return [str(n.target) for n in model.graph.nodes if n.op == "placeholder" and not n.args]
    names = list(inspect.signature(model.forward).parameters)
    return names[: len(args)] + [n for n in names[len(args) :] if n in kwargs]


def split_batch(batch: Any, names: list[str]) -> tuple[dict[str, Any], Any]:
    """Split a batch, as a loader gives it, into the inputs by name and the labels.

    Args:
        batch: a tensor, a tuple with the inputs first and the labels behind them, or a dict by name with
            the labels under ``labels``, ``label``, ``targets``, ``target`` or ``y``.
        names: names of the model's inputs.

    Raises:
        ConfigError: a batch of another type, or one that lacks an input; the input is named.
    """
    if isinstance(batch, Tensor):
        batch = (batch,)
    if isinstance(batch, (tuple, list)):
        if len(batch) < len(names):
            raise ConfigError(f"a batch has {len(batch)} entries; the model takes {names}")
        rest = batch[len(names) :]
        return dict(zip(names, batch, strict=False)), rest[0] if rest else None
    if isinstance(batch, dict) or hasattr(batch, "keys"):
        missing = [n for n in names if n not in batch]
        if missing:
            raise ConfigError(
                f"a batch has no {missing[0]!r}; it has {sorted(batch)}, the model takes {names}"
            )
        labels = next((batch[key] for key in _LABELS if key in batch and key not in names), None)
        return {n: batch[n] for n in names}, labels
    raise ConfigError(f"a batch is a {type(batch).__name__}; yield tensors, tuples or dicts")


def leaves(outputs: Any) -> list[Tensor]:
    """The tensors of a model's outputs, in order."""
    return [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


def _batch_size(inputs: dict[str, Any]) -> int:
    """Length of the first axis of the first input that has one."""
    return next((int(x.shape[0]) for x in leaves(inputs) if x.ndim), 1)


class Comparison:
    """Runs batches through the file, the reference and the float model, and counts what is equal.

    Args:
        model: the quantized model.
        original: the float model as a function from inputs by name to outputs.
        running: session of the file.
        names: names of the inputs, in the model's order.
        found: operators of the file.
        metric: function from outputs and labels to a figure, higher is better; if None, the share of labels
            that are the argmax.
        trained: whether the quantized model was trained, as in `Fidelity`.
    """

    def __init__(
        self,
        model: nn.Module,
        original: Callable[[dict[str, Any]], Any],
        running: Any,
        names: list[str],
        found: Operators,
        metric: Metric | None,
        trained: bool,
    ) -> None:
        self.model, self.original, self.running, self.names = model, original, running, names
        self.found, self.metric, self.trained = found, metric, trained
        self.reference = integer_reference(model)
        self.inputs = self.elements = self.equal = self.choices = self.same = self.same_as_float = 0
        self.largest = self.magnitude = 0.0
        self.repeatable = True
        self.signal: list[float] = []
        self.noise: list[float] = []
        self.figures: dict[str, float] = {}
        self.labelled = 0
        self.last: dict[str, Any] | None = None

    def _run_file(self, inputs: dict[str, Any]) -> list[Tensor]:
        return [
            torch.from_numpy(np.asarray(y))
            for y in self.running.run(None, feed(self.running, named_leaves(inputs)))
        ]

    def add(self, batch: Any) -> None:
        """Compare the outputs for one batch and add to the counts."""
        inputs, labels = split_batch(batch, self.names)
        theirs, again = self._run_file(inputs), self._run_file(inputs)
        self.repeatable &= all(
            torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(again, theirs, strict=True)
        )
        ours = leaves(self.reference(*inputs.values()))
        plain = leaves(self.original(inputs))
        for what, outputs in (("model", ours), ("float model", plain)):
            if len(outputs) != len(theirs):
                raise ConfigError(f"the file has {len(theirs)} outputs, the {what} {len(outputs)}")
        for a, b in zip(ours, theirs, strict=True):
            self.elements += a.numel()
            self.equal += int((a == b).sum())
            if a.numel():
                self.largest = max(self.largest, float((a.double() - b.double()).abs().max()))
                self.magnitude = max(self.magnitude, float(a.abs().max()))
        if ours and ours[0].ndim:
            choices = [out[0].argmax(-1) for out in (ours, theirs, plain)]
            self.choices += choices[0].numel()
            self.same += int((choices[0] == choices[1]).sum())
            self.same_as_float += int((choices[1] == choices[2]).sum())
        self._add_noise(plain, theirs)
        size = _batch_size(inputs)
        self.inputs += size
        self.last = inputs
        if labels is not None:
            for name, out in (("fp32", plain[0]), ("int8", theirs[0]), ("reference", ours[0])):
                figure = (
                    _share_of_argmax(out, labels) if self.metric is None else float(self.metric(out, labels))
                )
                self.figures[name] = self.figures.get(name, 0.0) + size * figure
            self.labelled += size

    def _add_noise(self, plain: list[Tensor], theirs: list[Tensor]) -> None:
        """Add the signal and the noise of every floating output."""
        self.signal = self.signal or [0.0] * len(plain)
        self.noise = self.noise or [0.0] * len(plain)
        for i, (a, b) in enumerate(zip(plain, theirs, strict=True)):
            if a.is_floating_point():
                usable = a.isfinite()  # masks may hold infinities
                a, b = a[usable].double(), b[usable].double()
                self.signal[i] += float(a.square().sum())
                self.noise[i] += float((a - b).square().sum())

    def finish(self, free: bool) -> tuple[Agreement, Fidelity, dict[str, float]]:
        """The findings, and the figures: in per cent for the default metric, else in the metric's unit."""
        if self.last is None:
            raise ConfigError("the loader yielded no batch; give at least one")
        agreement = Agreement(
            inputs=self.inputs,
            equal=self.equal / max(1, self.elements),
            largest_difference=self.largest / self.magnitude if self.magnitude else self.largest,
            same_choice=self.same / max(1, self.choices),
            exact=not self.found.inexact,
            repeatable=self.repeatable,
            batch_independent=self._independent(self.last) if free else None,
        )
        ratios = [
            math.inf if n == 0 else 10 * math.log10(s / n) if s else -math.inf
            for s, n in zip(self.signal, self.noise, strict=True)
        ] or [math.inf]
        worst = min(range(len(ratios)), key=ratios.__getitem__)
        fidelity = Fidelity(ratios[worst], worst, self.same_as_float / max(1, self.choices), self.trained)
        factor = 100.0 if self.metric is None else 1.0
        return agreement, fidelity, {n: factor * v / self.labelled for n, v in self.figures.items()}

    def _independent(self, inputs: dict[str, Any]) -> bool | None:
        size = _batch_size(inputs)
        if size <= 1:
            return None
        one = torch.utils._pytree.tree_map_only(
            Tensor, lambda x: x[:1] if x.ndim and x.shape[0] == size else x, inputs
        )
        pairs = zip(self._run_file(inputs), self._run_file(one), strict=True)
        return all(
            torch.equal(whole[:1].nan_to_num(), alone.nan_to_num())
            for whole, alone in pairs
            if whole.ndim and whole.shape[0] == size
        )


def _share_of_argmax(outputs: Tensor, labels: Any) -> float:
    """Share of labels that are the argmax over the last axis, or over the second one of images (B, C, …)."""
    labels = torch.as_tensor(labels)
    for axis in (-1, 1):
        if outputs.ndim > 1 and not labels.is_floating_point():
            chosen = outputs.argmax(axis)
            if chosen.shape == labels.shape:
                return float((chosen == labels).double().mean())
    raise ConfigError(
        f"labels are {labels.dtype} of shape {list(labels.shape)} and the outputs have shape "
        f"{list(outputs.shape)}: the "
        "default metric compares integer labels with the argmax of the last axis, or of the second one; pass "
        "metric=function(outputs, labels), higher is better"
    )


def float_runner(model: nn.Module, positional: int) -> Callable[[dict[str, Any]], Any]:
    """A float model as a function of its inputs by name.

    Args:
        model: float model; only its mode changes, and is set back after each call.
        positional: number of the inputs that the model takes by position.
    """

    def run(inputs: dict[str, Any]) -> Any:
        items = list(inputs.items())
        copied = torch.utils._pytree.tree_map_only(Tensor, torch.clone, items)
        with evaluating(model):
            return model(*(x for _, x in copied[:positional]), **dict(copied[positional:]))

    return run
