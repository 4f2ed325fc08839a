"""`gradq export`: a float model from Python code to a checked INT8 file, with progress and one table."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import rich.console
import rich.table
import torch
import typer
from torch import nn

from gradq import export as exporting
from gradq import quant
from gradq.errors import ConfigError, VerifyError
from gradq.saved import load_saved

__all__ = ["TARGETS", "export", "load_attribute"]


def export(
    model: Annotated[str, typer.Argument(help="What makes the model: file.py:function or package:function.")],
    calibrate: Annotated[
        str, typer.Option(help="Batches: file.py:function, or a .npy, .npz or .pt file; labels come last.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write (for bundles a folder or a .zip file).")],
    checkpoint: Annotated[Path | None, typer.Option(help="State dict to load into the model.")] = None,
    target: Annotated[str, typer.Option(help="What to write: onnx, bundle, pt2 or tensorrt.")] = "onnx",
    processor: Annotated[
        str, typer.Option(help="Formats for auto, x86-vnni, x86-avx2, arm, gpu or edge-int4.")
    ] = "auto",
    weights: Annotated[str | None, typer.Option(help="Weights format, e.g. int4.")] = None,
    activations: Annotated[str | None, typer.Option(help="Activations format, e.g. int8-batch.")] = None,
    average_bits: Annotated[
        float | None, typer.Option(help="Choose the bits of every layer by sensitivity, under this mean.")
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="Batches to calibrate with.")] = 16,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare the file with the model.")
    ] = True,
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes to time at.")] = "1",
    seconds: Annotated[float, typer.Option(help="Time for each batch size.")] = 2.0,
    test: Annotated[
        str | None,
        typer.Option(help="Batches with labels to measure accuracy on; by default those of --calibrate."),
    ] = None,
    allow_slower: Annotated[
        bool, typer.Option("--allow-slower", help="INT8 that is slower than fp32 here is a warning only.")
    ] = False,
    max_loss: Annotated[float, typer.Option(help="Points of accuracy below fp32 that are a failure.")] = 1.0,
) -> None:
    """Quantize a model from calibration data, write it and check it against the original."""
    console = rich.console.Console(stderr=True, highlight=False)
    for option, value in (("seconds", seconds), ("max-loss", max_loss), ("average-bits", average_bits)):
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise ConfigError(f"--{option} is {value!r}; a finite number from 0")
    if target not in TARGETS:
        raise ConfigError(f"--target is {target!r}; legal: {', '.join(TARGETS)}")
    sizes = _integers(batch_sizes)
    console.print(f"1/4 building {model}", markup=False)
    net = _build(model, checkpoint)
    data = _Data(calibrate)
    tested = data if test is None else _Data(test)
    if check and test is None:
        console.print(
            "--test is not given: the file is compared, and its accuracy measured, on the calibration batches"
        )
    console.print("2/4 quantizing")
    config = _config(processor, weights, activations)
    first = data.first()
    qmodel: nn.Module = quant.prepare(net, _inputs(net, first), config)
    quant.calibrate(qmodel, data, num_batches=batches)
    if average_bits is not None:
        report = quant.sensitivity(qmodel, list(_limited(data, max(1, batches // 4))))
        quant.assign_bits(qmodel, report, average_bits=average_bits)
    quant.correct_bias(qmodel, list(_limited(data, batches)))
    console.print(f"3/4 writing {out}", markup=False)
    for path, written in TARGETS[target](qmodel, out).items():
        console.print(str(written), markup=False)
        if check and target == "onnx":
            console.print("4/4 checking")
            _check(path, qmodel, tested, sizes, seconds, max_loss, None if allow_slower else 1.0)
    if check and target == "bundle":
        console.print("4/4 checking and choosing")
        _check_bundle(out, qmodel, tested, max_loss)
        rich.console.Console().print(exporting.load(out, seconds=seconds).why, markup=False)


def _write_onnx(qmodel: nn.Module, out: Path) -> dict[Path, object]:
    return {out: exporting.onnx(qmodel, out)}


def _write_tensorrt(qmodel: nn.Module, out: Path) -> dict[Path, object]:
    return {out: exporting.onnx(qmodel, out, runtime="tensorrt")}


def _write_pt2(qmodel: nn.Module, out: Path) -> dict[Path, object]:
    return {out: exporting.pt2(qmodel, out)}


def _write_bundle(qmodel: nn.Module, out: Path) -> dict[Path, object]:
    return {out / name: report for name, report in exporting.bundle(qmodel, out).items()}


TARGETS: dict[str, Callable[[nn.Module, Path], dict[Path, object]]] = {
    "bundle": _write_bundle,
    "onnx": _write_onnx,
    "pt2": _write_pt2,
    "tensorrt": _write_tensorrt,
}


def _check(
    path: Path,
    qmodel: nn.Module,
    data: Iterable[Any],
    sizes: list[int],
    seconds: float,
    max_loss: float,
    min_speedup: float | None,
) -> None:
    """Verify and show the table."""
    report = exporting.verify(
        path, qmodel, data, batch_sizes=sizes, seconds=seconds, max_accuracy_loss=max_loss, strict=False,
        min_speedup=min_speedup,
    )  # fmt: skip
    _show(report)


def _check_bundle(path: Path, qmodel: nn.Module, data: Iterable[Any], max_loss: float) -> None:
    """Verify every variant of a bundle that runs right on this processor, without timing it."""
    for name, report in exporting.verify_bundle(path, qmodel, data, max_accuracy_loss=max_loss).items():
        rich.console.Console().print(f"variant {name}", markup=False)
        _show(report)


def _show(report: exporting.VerifyReport) -> None:
    """The table, whether or not it holds.

    Raises:
        VerifyError: it does not.
    """
    table = rich.table.Table("", "fp32", "int8", "", title=report.title, title_justify="left", box=None)
    for row in report.rows():
        style = "red" if row[0] == "FAILED" else "yellow" if row[0] == "warning" else None
        table.add_row(*row, style=style)
    console = rich.console.Console()
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no edge to wrap at
    console.print(table)
    if not report.ok:
        raise VerifyError(f"{report.path}: " + "; ".join(report.failures), report)


def load_attribute(spec: str) -> Any:
    """The object that ``file.py:name`` or ``package.module:name`` names.

    Raises:
        ConfigError: no such file, module or name, or the code fails; the message says which.
    """
    where, separator, name = spec.rpartition(":")
    if not separator or not name:
        raise ConfigError(f"{spec!r} names nothing; write file.py:function or package.module:function")
    try:
        if where.endswith(".py"):
            path = Path(where)
            if not path.exists():
                raise ConfigError(f"{where} does not exist")
            found = importlib.util.spec_from_file_location(path.stem, path)
            assert found is not None
            assert found.loader is not None
            if str(path.parent.resolve()) not in sys.path:
                sys.path.insert(0, str(path.parent.resolve()))
            module = importlib.util.module_from_spec(found)
            sys.modules.setdefault(path.stem, module)
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"cannot load {where}: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise ConfigError(f"{where} has no {name}")
    return getattr(module, name)


def _build(spec: str, checkpoint: Path | None) -> nn.Module:
    """The float model in evaluation, with its checkpoint."""
    made = load_attribute(spec)
    net = made if isinstance(made, nn.Module) else made()
    if not isinstance(net, nn.Module):
        raise ConfigError(f"{spec} gave a {type(net).__name__}; it must return a torch.nn.Module")
    if checkpoint is not None:
        state = load_saved(checkpoint, "give --checkpoint a state dict: torch.save(model.state_dict(), path)")
        for key in ("model", "state_dict", "model_state_dict"):
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
        if not isinstance(state, dict):
            raise ConfigError(f"{checkpoint} holds a {type(state).__name__}; it must hold a state dict")
        state = {str(k).removeprefix("module."): v for k, v in state.items()}
        try:
            net.load_state_dict(state)
        except (RuntimeError, AttributeError, TypeError) as error:  # other tensors, or no tensors
            raise ConfigError(f"{checkpoint} does not fit {spec}: {error}") from error
    return net.eval()


class _Data:
    """Batches from code or from a file; can be iterated again."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.source: Any = load_attribute(spec) if ":" in spec else self._read(Path(spec))

    @staticmethod
    def _read(path: Path) -> list[Any]:
        """A file as batches of 32: one array, or inputs and labels."""
        if path.suffix not in (".npy", ".npz", ".pt", ".pth"):
            raise ConfigError(f"cannot read {path}; give a .npy, .npz or .pt file, or file.py:function")
        value = load_saved(path, "give --calibrate arrays of numpy.savez, or tensors of torch.save")
        arrays = list(value.values()) if isinstance(value, dict) else value
        arrays = [arrays] if isinstance(arrays, torch.Tensor) else arrays
        if not isinstance(arrays, (list, tuple)) or not all(
            isinstance(a, torch.Tensor) and a.dim() > 0 for a in arrays
        ):
            raise ConfigError(f"{path} holds no tensors with a row a sample: save one, a list or a dict")
        lengths = {len(a) for a in arrays}
        if len(lengths) != 1 or 0 in lengths:
            raise ConfigError(
                f"{path} holds arrays of {sorted(lengths)} rows; all must have the same number, at least one"
            )
        parts = [a.split(32) for a in arrays]
        return (
            [p[0] for p in zip(*parts, strict=True)] if len(arrays) == 1 else list(zip(*parts, strict=True))
        )

    def __iter__(self) -> Iterator[Any]:
        return iter(self.source() if callable(self.source) else self.source)

    def first(self) -> Any:
        for batch in self:
            return batch
        raise ConfigError(f"--calibrate {self.spec} yields no batch")


def _limited(data: Iterable[Any], count: int) -> Iterator[Any]:
    for i, batch in enumerate(data):
        if i >= count:
            return
        yield batch


def _inputs(net: nn.Module, batch: Any) -> Any:
    """The model's arguments in a batch: labels fall away."""
    if not isinstance(batch, (tuple, list)):
        return batch
    needed = [
        p for p in inspect.signature(net.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]  # fmt: skip
    return tuple(batch[: max(1, len(needed))])


def _config(processor: str, weights: str | None, activations: str | None) -> quant.Config:
    import dataclasses

    config = quant.Config.for_target(processor)
    changed = {k: v for k, v in (("weights", weights), ("activations", activations)) if v is not None}
    return dataclasses.replace(config, **changed)  # type: ignore[arg-type]


def _integers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ConfigError(f"--batch-sizes is {text!r}; write numbers from 1, e.g. 1,32")
    return found
