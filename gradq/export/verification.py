"""`gradq.export.verify`: does the file compute what was simulated, in integers, and is it worth shipping?"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradq.errors import ConfigError, VerifyError
from gradq.export.capture import example_inputs_of
from gradq.export.files import require
from gradq.export.inspect import Operators, operators
from gradq.export.runtime import features, feed, session
from gradq.export.tables import render
from gradq.export.timing import Latency, interleave, summarize
from gradq.export.write import float_onnx
from gradq.quant.batches import evaluating, float_mode, progress, unwrap
from gradq.quant.reference import integer_reference

__all__ = ["Agreement", "VerifyReport", "verify"]

Metric = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Agreement:
    """File against integer reference.

    Attributes:
        inputs: how many were compared.
        equal: share of the output elements that are equal, bit for bit.
        largest_difference: of the others, relative to the outputs' largest magnitude.
        same_choice: share of the inputs with the same argmax over the last axis.
        exact: True if every operator is exact, so that nothing but equality will do.
        repeatable: True if a second call gave the same bits.
        batch_independent: True if single inputs gave the bits they gave in a batch; None if not asked.
    """

    inputs: int
    equal: float
    largest_difference: float
    same_choice: float
    exact: bool
    repeatable: bool
    batch_independent: bool | None


@dataclass(frozen=True)
class VerifyReport:
    """Everything `verify` found; ``print(report)`` shows it as one table.

    Attributes:
        path: the file.
        processor: what the session was chosen for.
        operators: of the optimized graph.
        agreement: with the integer reference.
        accuracy: ``fp32`` (the same model with its quantizers off, corrected biases and all) and ``int8`` in
            per cent, if the loader has labels.
        size_bytes: ``fp32`` and ``int8``.
        latency: batch size → ``fp32`` and ``int8``.
        failures: what makes the file wrong.
        warnings: what makes it a poor trade.
    """

    path: Path
    processor: str
    operators: Operators
    agreement: Agreement
    accuracy: dict[str, float]
    size_bytes: dict[str, int]
    latency: dict[int, dict[str, Latency]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if nothing failed."""
        return not self.failures

    @property
    def compression(self) -> float:
        """fp32 bytes over int8 bytes."""
        return self.size_bytes["fp32"] / self.size_bytes["int8"]

    def __str__(self) -> str:
        """The table."""
        return render(self)


def verify(
    path: str | os.PathLike[str],
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    example_inputs: Any = None,
    metric: Metric | None = None,
    baseline: str | os.PathLike[str] | None = None,
    batch_sizes: Sequence[int] = (1,),
    seconds: float = 2.0,
    threads: int = 1,
    max_batches: int | None = None,
    max_accuracy_loss: float = 1.0,
    min_speedup: float | None = None,
    strict: bool = True,
    show_progress: bool = True,
) -> VerifyReport:
    """Check an exported file against the model it came from.

    Looked at: operators of the optimized graph (a float convolution or matrix product that the export did not
    announce is a failure), equality with the integer reference (bit for bit where every operator is exact),
    equality of repeated calls, accuracy, size and latency against fp32 in the same runtime, in turns.

    Args:
        path: from `gradq.export.onnx`.
        model: the model it was written from.
        loader: batches; labels behind the inputs, if there are any. None compares on the example inputs.
        example_inputs: for models with layers placed by hand; by default those of `prepare`.
        metric: (outputs, labels) → share or mean of what is right, higher is better; by default the share of
            labels that are the argmax of the last axis.
        baseline: the fp32 file, from `gradq.export.float_onnx`; written to a temporary folder if None.
        batch_sizes: latencies are measured at these; none if empty.
        seconds: per batch size.
        threads: of the sessions.
        max_batches: look at so many batches only.
        max_accuracy_loss: points of accuracy below fp32 that are a failure.
        min_speedup: a lower latency ratio is a failure; None makes a ratio below 1 a warning.
        strict: raise if something failed; False only reports it.
        show_progress: a progress bar on stderr.

    Returns:
        Every figure.

    Raises:
        VerifyError: something failed and `strict` is set; the error has the report.
        ExportError: the file cannot be loaded, or a package is missing.
    """
    for package in ("onnx", "onnxruntime"):
        require(package)
    plain = unwrap(model)
    found = operators(path)
    running = session(path, threads=threads)
    args, kwargs = example_inputs_of(plain, example_inputs)
    first = (*args, *kwargs.values())
    comparison = _Comparison(plain, running, found, metric)
    batches = [first] if loader is None else loader
    for count, batch in enumerate(progress(batches, "verifying", show=show_progress)):
        if max_batches is not None and count >= max_batches:
            break
        comparison.add(batch, len(first))
    with tempfile.TemporaryDirectory() as folder:
        free = _is_dynamic(running)
        baseline_path = Path(folder) / "fp32.onnx" if baseline is None else Path(baseline)
        if baseline is None:
            float_onnx(plain, baseline_path, example_inputs=example_inputs, dynamic_batch=free)
        sizes = {"fp32": _size(baseline_path), "int8": _size(Path(path))}
        plain_session = session(baseline_path, threads=threads)
        latency = {}
        for size in batch_sizes:
            feeds = {
                name: feed(s, _resized(first, size) if free else first)
                for name, s in (("fp32", plain_session), ("int8", running))
            }
            calls = {
                "fp32": lambda f=feeds["fp32"]: plain_session.run(None, f),
                "int8": lambda f=feeds["int8"]: running.run(None, f),
            }
            latency[size] = summarize(interleave(calls, seconds=seconds), "fp32")
    agreement, accuracy = comparison.finish(free)
    report = VerifyReport(
        path=Path(path),
        processor=features(),
        operators=found,
        agreement=agreement,
        accuracy=accuracy,
        size_bytes=sizes,
        latency=latency,
    )
    _judge(report, max_accuracy_loss, min_speedup)
    if strict and report.failures:
        raise VerifyError(f"{path}: " + "; ".join(report.failures), report)
    return report


class _Comparison:
    """Runs batches through file, reference and float model, and counts."""

    def __init__(self, model: nn.Module, running: Any, found: Operators, metric: Metric | None) -> None:
        self.model, self.running, self.found = model, running, found
        self.metric = metric or _share_of_argmax
        self.reference = integer_reference(model)
        self.inputs = self.elements = self.equal = self.choices = self.same = 0
        self.largest = self.magnitude = 0.0
        self.repeatable = True
        self.right: dict[str, float] = {}
        self.labelled = 0
        self.last: tuple[Any, ...] | None = None

    def add(self, batch: Any, count: int) -> None:
        inputs, labels = _split(batch, count, self.running)
        theirs = [torch.from_numpy(np.asarray(y)) for y in self.running.run(None, feed(self.running, inputs))]
        again = self.running.run(None, feed(self.running, inputs))
        self.repeatable &= all(np.array_equal(a, b.numpy()) for a, b in zip(again, theirs, strict=True))
        ours = [t for t in torch.utils._pytree.tree_leaves(self.reference(*inputs)) if isinstance(t, Tensor)]
        if len(ours) != len(theirs):
            raise ConfigError(f"the file has {len(theirs)} outputs, the model {len(ours)}")
        for a, b in zip(ours, theirs, strict=True):
            self.elements += a.numel()
            self.equal += int((a == b).sum())
            self.largest = max(self.largest, float((a - b).abs().max())) if a.numel() else self.largest
            self.magnitude = max(self.magnitude, float(a.abs().max())) if a.numel() else self.magnitude
        a, b = ours[0].argmax(-1), theirs[0].argmax(-1)
        self.choices, self.same = self.choices + a.numel(), self.same + int((a == b).sum())
        size = int(inputs[0].shape[0])
        self.inputs += size
        self.last = inputs
        if labels is not None:
            with evaluating(self.model), float_mode(self.model):
                plain = torch.utils._pytree.tree_leaves(self.model(*inputs))[0]
            for name, out in (("fp32", plain), ("int8", theirs[0]), ("reference", ours[0])):
                self.right[name] = self.right.get(name, 0.0) + size * self.metric(out, labels)
            self.labelled += size

    def finish(self, free: bool) -> tuple[Agreement, dict[str, float]]:
        if self.last is None:
            raise ConfigError("the loader yielded no batch; give at least one")
        independent = None
        if free and self.last[0].shape[0] > 1:
            whole = self.running.run(None, feed(self.running, self.last))[0]
            one = tuple(x[:1] if isinstance(x, Tensor) else x for x in self.last)
            alone = self.running.run(None, feed(self.running, one))[0]
            independent = bool(np.array_equal(whole[:1], alone))
        agreement = Agreement(
            inputs=self.inputs,
            equal=self.equal / max(1, self.elements),
            largest_difference=self.largest / self.magnitude if self.magnitude else self.largest,
            same_choice=self.same / max(1, self.choices),
            exact=not self.found.inexact,
            repeatable=self.repeatable,
            batch_independent=independent,
        )
        return agreement, {name: 100 * value / self.labelled for name, value in self.right.items()}


def _judge(report: VerifyReport, max_accuracy_loss: float, min_speedup: float | None) -> None:
    """Fill in what failed and what is a poor trade."""
    agreement, fail, warn = report.agreement, report.failures.append, report.warnings.append
    if report.operators.unexpected:
        fail("float instead of int8: " + ", ".join(report.operators.unexpected))
    if not agreement.repeatable:
        fail("a second call with the same input gave another result")
    if agreement.exact and agreement.equal < 1.0:
        fail(
            f"{100 * (1 - agreement.equal):.3g} % of the outputs differ from the integer reference though "
            "every operator is exact"
        )
    elif agreement.same_choice < 0.99 or agreement.largest_difference > 0.1:
        fail(
            f"outputs differ from the integer reference by up to {100 * agreement.largest_difference:.2g} % "
            f"of the largest; {100 * agreement.same_choice:.2f} % of the inputs have the same argmax"
        )
    if agreement.exact and agreement.batch_independent is False:
        fail("an input gives another result alone than in a batch")
    if report.accuracy:
        loss = report.accuracy["fp32"] - report.accuracy["int8"]
        if loss > max_accuracy_loss:
            fail(f"accuracy is {loss:.2f} points below fp32; allowed: {max_accuracy_loss:g}")
    for size, contenders in report.latency.items():
        ratio = contenders["int8"].ratio
        if min_speedup is not None and ratio < min_speedup:
            fail(f"int8 is {ratio:.2f}x as fast as fp32 at batch {size}; asked for: {min_speedup:g}x")
        elif ratio < 1.0:
            warn(f"int8 is slower than fp32 at batch {size}: {ratio:.2f}x")


def _share_of_argmax(outputs: Tensor, labels: Tensor) -> float:
    return float((outputs.argmax(-1) == labels).double().mean())


def _split(batch: Any, count: int, running: Any) -> tuple[tuple[Any, ...], Tensor | None]:
    """Inputs and labels of a batch as a loader gives it."""
    if isinstance(batch, Tensor):
        return (batch,), None
    if isinstance(batch, dict):
        names = [i.name for i in running.get_inputs()]
        return tuple(batch[n] for n in names), batch.get("labels")
    if isinstance(batch, (tuple, list)):
        inputs = tuple(batch[:count])
        return inputs, batch[count] if len(batch) > count else None
    raise ConfigError(f"a batch is a {type(batch).__name__}; yield tensors, tuples or dicts")


def _resized(inputs: Sequence[Any], size: int) -> tuple[Any, ...]:
    """The inputs repeated or cut to another batch size."""

    def resize(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim == 0:
            return x
        return x.repeat(-(-size // x.shape[0]), *(1,) * (x.ndim - 1))[:size]

    return tuple(resize(x) for x in inputs)


def _is_dynamic(running: Any) -> bool:
    return all(i.shape and not isinstance(i.shape[0], int) for i in running.get_inputs())


def _size(path: Path) -> int:
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)
