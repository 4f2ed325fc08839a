"""`gradq.export.verify`: does the file compute what was simulated, in integers, and is it worth shipping?"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from gradq.errors import VerifyError
from gradq.export.capture import example_inputs_of
from gradq.export.comparison import (
    Agreement,
    Comparison,
    Fidelity,
    Metric,
    float_runner,
    input_names,
    split_batch,
)
from gradq.export.costs import costs
from gradq.export.files import require
from gradq.export.inputs import named_leaves
from gradq.export.inspect import operators
from gradq.export.report import VerifyReport
from gradq.export.runtime import features, feed, metadata_of, overflows, session
from gradq.export.timing import Latency, interleave, summarize
from gradq.export.write import float_onnx
from gradq.quant.batches import float_mode, progress, unwrap
from gradq.quant.by_name import swap_info, unswapped
from gradq.quant.info import float_model as kept_float_model
from gradq.quant.prepare import float_graph

__all__ = ["Agreement", "Fidelity", "verify"]

_SMALLEST_LOSS_OF_TIME = 0.05  # ms a call: below it nothing is called slower
_SMALLEST_SQNR = 10.0  # dB, without labels: below it the outputs are others


def verify(
    path: str | os.PathLike[str],
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    float_model: nn.Module | None = None,
    example_inputs: Any = None,
    metric: Metric | None = None,
    baseline: str | os.PathLike[str] | None = None,
    batch_sizes: Sequence[int] = (1,),
    seconds: float = 2.0,
    threads: int = 1,
    max_batches: int | None = None,
    max_accuracy_loss: float | None = None,
    min_sqnr: float | None = None,
    min_speedup: float | None = 1.0,
    strict: bool = True,
    show_progress: bool = True,
) -> VerifyReport:
    """Check an exported file against the model it came from.

    Looked at: operators of the optimized graph (a float convolution or matrix product that the export did not
    announce is a failure), equality with the integer reference (bit for bit where every operator is exact),
    equality of repeated calls, outputs and accuracy against the float model *as it was given to* `prepare`,
    size and
    latency against fp32 in the same runtime, in turns, and what is spent outside integer kernels.

    Args:
        path: the file, from `gradq.export.onnx`.
        model: the model it was written from.
        loader: batches; labels behind the inputs, if there are any. None compares on the example inputs.
        float_model: the model to compare with; by default the model as given to `prepare`, which keeps a
            copy. For models with layers placed by hand it is the same model with its quantizers off.
        example_inputs: inputs for models with layers placed by hand; by default those of `prepare`.
        metric: (outputs, labels) → a figure in its own unit, higher is better; by default the share of labels
            that are the argmax of the last axis (of the second, for labels of images), in per cent.
        baseline: the fp32 file, from `gradq.export.float_onnx`; written to a temporary folder if None.
        batch_sizes: latencies are measured at these; none if empty.
        seconds: per batch size.
        threads: threads inside an operator.
        max_batches: look at so many batches only.
        max_accuracy_loss: largest loss of a figure against fp32's, in the metric's unit; by default 1 point
            of accuracy, and 1 % of fp32's figure for a metric that is given.
        min_sqnr: dB to the float model below which the outputs are wrong; by default 10 without labels for a
            model that was not trained since `prepare`, otherwise only a warning.
        min_speedup: a lower latency ratio is a failure (if nine tenths of the rounds agree, and a call takes
            at least 0.05 ms longer); None makes it a warning.
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
    names = input_names(plain, args, kwargs)
    first, _ = split_batch((*args, *(kwargs[n] for n in names[len(args) :])), names)
    original, trained = _original(plain, float_model, len(args))
    comparison = Comparison(plain, original, running, names, found, metric, trained)
    batches = [first] if loader is None else loader
    for count, batch in enumerate(progress(batches, "verifying", show=show_progress)):
        if max_batches is not None and count >= max_batches:
            break
        comparison.add(batch)
    with tempfile.TemporaryDirectory() as folder:
        free = _is_dynamic(running)
        baseline_path = Path(folder) / "fp32.onnx" if baseline is None else Path(baseline)
        if baseline is None:
            float_onnx(
                plain,
                baseline_path,
                float_model=float_model,
                example_inputs=example_inputs,
                dynamic_batch=free,
            )
        sizes = {"fp32": _size(baseline_path), "int8": _size(Path(path))}
        latency = {
            size: _latency({"fp32": session(baseline_path, threads=threads), "int8": running},
                           _resized(first, size) if free else first, seconds, threads)
            for size in batch_sizes
        }  # fmt: skip
    times = []
    if batch_sizes:
        largest = _resized(first, max(batch_sizes)) if free else first
        profiled = feed(running, named_leaves(largest))
        times = costs(path, profiled, threads=threads, seconds=min(0.5, seconds))
    agreement, fidelity, accuracy = comparison.finish(free)
    report = VerifyReport(
        path=Path(path),
        processor=features(),
        operators=found,
        agreement=agreement,
        fidelity=fidelity,
        accuracy=accuracy,
        size_bytes=sizes,
        latency=latency,
        costs=times,
        metric="accuracy, %"
        if metric is None
        else getattr(metric, "__name__", "metric").replace("<lambda>", "metric"),
    )
    _judge(report, metric is not None, max_accuracy_loss, min_sqnr, min_speedup)
    if strict and report.failures:
        raise VerifyError(f"{path}: " + "; ".join(report.failures), report)
    return report


def _original(
    model: nn.Module, given: nn.Module | None, positional: int
) -> tuple[Callable[[dict[str, Any]], Any], bool]:
    """The float model to compare with, and whether the quantized one was trained since."""
    if not isinstance(model, fx.GraphModule):
        info = swap_info(model)
        if given is None and info is not None and info.float_model is not None:
            given = info.float_model.model
        if given is not None:
            now = dict(unswapped(model).named_parameters() if info is not None else ())
            trained = any(
                n in now and not torch.allclose(now[n].detach().cpu(), p.detach().cpu(), rtol=1e-4, atol=1e-7)
                for n, p in given.named_parameters()
            )
            return float_runner(given, positional), trained
        run = float_runner(model, positional)

        def without_quantizers(inputs: dict[str, Any]) -> Any:
            with float_mode(model):
                return run(inputs)

        return without_quantizers, False
    original = given if given is not None else kept_float_model(model)
    now = dict(model.named_parameters())
    then = dict(float_graph(model, original).named_parameters())
    trained = any(
        name in now and not torch.allclose(now[name].detach().cpu(), value, rtol=1e-4, atol=1e-7)
        for name, value in then.items()
    )
    return float_runner(original, positional), trained


def _latency(
    sessions: dict[str, Any], inputs: dict[str, Any], seconds: float, threads: int
) -> dict[str, Latency]:
    """Contenders in turns; a single thread's own time leaves out what other processes took."""
    fed = {name: feed(running, named_leaves(inputs)) for name, running in sessions.items()}
    calls = {n: lambda s=s, f=fed[n]: s.run(None, f) for n, s in sessions.items()}
    clock = time.thread_time if threads == 1 else time.perf_counter
    return summarize(interleave(calls, seconds=seconds, clock=clock), "fp32")


def _judge(
    report: VerifyReport,
    own_metric: bool,
    max_accuracy_loss: float | None,
    min_sqnr: float | None,
    min_speedup: float | None,
) -> None:
    """Fill in what failed and what is a poor trade."""
    agreement, fail, warn = report.agreement, report.failures.append, report.warnings.append
    made_for_others = _other_processor(report)
    if report.operators.unexpected:
        fail("float instead of int8: " + ", ".join(report.operators.unexpected) + made_for_others)
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
        before, loss = report.accuracy["fp32"], report.accuracy["fp32"] - report.accuracy["int8"]
        allowed = max_accuracy_loss
        if allowed is None:
            allowed = 0.01 * abs(before) if own_metric else 1.0
        if not loss <= allowed:  # NaN is a failure too
            unit = "" if own_metric else " points"
            fail(f"{report.metric.split(',')[0]} is {loss:.4g}{unit} below fp32; allowed: {allowed:.4g}")
    _judge_fidelity(report, min_sqnr)
    if made_for_others and not report.operators.unexpected:
        warn(made_for_others.removeprefix(". "))
    for size, contenders in report.latency.items():
        ours, ratio = contenders["int8"], contenders["int8"].ratio
        wanted = 1.0 if min_speedup is None else min_speedup
        longer = ours.median_ms - contenders["fp32"].median_ms
        sure = ours.ratio_high < wanted and (wanted != 1.0 or longer > _SMALLEST_LOSS_OF_TIME)
        if min_speedup is not None and sure:
            fail(
                f"int8 is {ratio:.2f}x as fast as fp32 at batch {size}; asked for: {min_speedup:g}x "
                "(ship the float "
                "model here, or see what stays in float above)"
            )
        elif ratio < wanted:
            warn(f"int8 is slower than fp32 at batch {size}: {ratio:.2f}x")


def _other_processor(report: VerifyReport) -> str:
    """What to do about a file that is made for another processor than this one; nothing if it is not."""
    if not report.processor.startswith("x86"):
        return ""
    facts = metadata_of(report.path)
    remedy = f"prepare with quant.Config.for_target({report.processor!r})"
    if "-sym" in facts.get("gradq.activations", ""):
        return (
            ". Its activations are symmetric, as ARM processors and GPUs take them: verify it there; for "
            f"this processor {remedy}"
        )
    if overflows(report.path) and report.processor == "x86-avx2":
        return (
            ". Weights of 8 bits take ONNX Runtime's slower, correct kernel on this processor, which has no "
            f"VNNI; for the fast one {remedy}"
        )
    return ""


def _judge_fidelity(report: VerifyReport, min_sqnr: float | None) -> None:
    """Outputs against the float model: a failure where nothing else says what is right."""
    fidelity, least = report.fidelity, _SMALLEST_SQNR if min_sqnr is None else min_sqnr
    if fidelity.sqnr_db >= least:
        return
    text = (
        f"output {fidelity.output} is {fidelity.sqnr_db:.1f} dB (signal to noise) from the float "
        "model's; asked for: "
        f"{least:g} dB"
    )
    if min_sqnr is not None or not (report.accuracy or fidelity.trained):
        report.failures.append(text)
    else:
        report.warnings.append(text + (" (it was trained since prepare)" if fidelity.trained else ""))


def _resized(inputs: dict[str, Any], size: int) -> dict[str, Any]:
    """The inputs repeated or cut to another batch size."""

    def resize(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim == 0:
            return x
        return x.repeat(-(-size // x.shape[0]), *(1,) * (x.ndim - 1))[:size]

    resized: dict[str, Any] = torch.utils._pytree.tree_map(resize, inputs)
    return resized


def _is_dynamic(running: Any) -> bool:
    return all(i.shape and not isinstance(i.shape[0], int) for i in running.get_inputs())


def _size(path: Path) -> int:
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)
