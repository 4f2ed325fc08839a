"""`gradq.export.onnx`: a calibrated model as an ONNX file that runs in INT8."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from gradq.errors import ConfigError, ExportError
from gradq.export.capture import capture, example_inputs_of
from gradq.export.files import atomic, require
from gradq.export.lower import Lowered, lower
from gradq.export.runtime import features
from gradq.export.tensorrt import lower_for_tensorrt
from gradq.export.weights import is_weight_constant
from gradq.quant.batches import unwrap
from gradq.quant.by_name import swap_info
from gradq.quant.calibrate import weights
from gradq.quant.fake import ActQuant, float8_names
from gradq.quant.info import prepare_info
from gradq.quant.mixed import average_bits
from gradq.quant.prepare import float_graph

__all__ = ["ExportReport", "describe", "facts_of", "float_onnx", "onnx"]

_EXTERNAL_FROM = 2_000_000_000  # protobuf's limit is 2 GiB
_LOWERINGS = {"onnxruntime": lower, "tensorrt": lower_for_tensorrt}
_MATRIX_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class ExportReport:
    """What `onnx` wrote.

    Attributes:
        path: the file.
        opset: version of the default operator set.
        size_bytes: size of the file, external data included.
        forms: layers by the form their weights take: ``int8``, ``int4``, ``table``, ``nbits``, ``float``.
        float_islands: (name, reason) of what computes in float though it multiplies matrices, or otherwise
            than simulated.
        average_bits: bits a quantized weight takes, scales included.
        metadata: entries of the file's ``metadata_props``.
        slow: sentences on forms that ONNX Runtime has a faster one for, with the remedy.
    """

    path: Path
    opset: int
    size_bytes: int
    forms: dict[str, int]
    float_islands: list[tuple[str, str]]
    average_bits: float
    metadata: dict[str, str] = field(repr=False)
    slow: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Some lines for people."""
        text = describe(self.path, self.size_bytes, f"opset {self.opset}", self.forms, self.float_islands)
        return "\n".join([text, *(f"  slow: {sentence}" for sentence in self.slow)])


def describe(
    path: Path, size_bytes: int, kind: str, forms: Mapping[str, int], float_islands: list[tuple[str, str]]
) -> str:
    """Some lines for people on a file that was written."""
    counts = ", ".join(f"{count} {form}" for form, count in sorted(forms.items()))
    lines = [f"{path}: {size_bytes / 1e6:.2f} MB, {kind}, layers: {counts}"]
    lines += [f"  float: {name}: {reason}" for name, reason in float_islands]
    return "\n".join(lines)


def onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    dynamic_batch: bool = True,
    dynamic_axes: dict[str, dict[int, str]] | None = None,
    opset: int | None = None,
    runtime: str = "onnxruntime",
    accuracy: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ExportReport:
    """Write a calibrated model as ONNX that ONNX Runtime computes in INT8.

    The graph is QDQ: activations through ``QuantizeLinear`` and ``DequantizeLinear``, weights int8, int4 or
    4-bit indices into an int8 table that the runtime unpacks once at load, biases int32. The file is complete
    or not there: an error leaves what stood at `path` before.

    Args:
        model: a model from `gradq.quant.prepare` and `calibrate`, trained or not, possibly inside DDP;
            untouched.
        path: the file to write.
        example_inputs: a tensor, a tuple of arguments or a dict; by default those of `prepare`. Models with
            layers placed by hand need it.
        dynamic_batch: leave the first axis of every input free.
        dynamic_axes: more free axes: input name → axis → name, e.g. ``{"tokens": {1: "length"}}``.
        opset: version of the default operator set; by default 21 if a weight takes 4 bits, else 20.
        runtime: the runtime that the graph is written for: ``onnxruntime``, or ``tensorrt`` for GPUs (static
            symmetric s8 activations, float biases: prepare with ``Config.for_target("gpu")``; not run on a
            GPU by us).
        accuracy: the model's, to be kept in the file's metadata.
        metadata: more entries for it.

    Returns:
        What was written: sizes, forms, and what stays in float with the reason.

    Raises:
        ExportError: an operator that ONNX does not have, a path that cannot be written, or a missing package.
        CalibrationError: a quantizer has no range; named.
        NonFiniteError: NaN or Inf in a weight; named.
        ConfigError: arguments that do not fit the model.
    """
    for package in ("onnx", "onnxscript"):
        require(package)
    plain = unwrap(model)
    if runtime not in _LOWERINGS:
        raise ConfigError(f"runtime is {runtime!r}; legal: {', '.join(_LOWERINGS)}")
    names = float8_names(plain)
    if names and runtime != "tensorrt":
        raise ExportError(f"{names[0]} is fp8, which only GPUs compute: write it with runtime='tensorrt'")
    chosen = _choose_opset(plain, opset)
    with atomic(path) as temporary:
        captured = capture(
            plain, example_inputs, opset=chosen, dynamic_batch=dynamic_batch, dynamic_axes=dynamic_axes
        )
        lowered = _LOWERINGS[runtime](captured)
        islands, floats = _islands(plain, lowered)
        facts = facts_of(plain, islands, accuracy) | {
            "gradq.runtime": runtime,
            "gradq.largest_weight_code": str(lowered.largest_code),
            "gradq.float_products": str(sum(form == "float" for form in lowered.forms.values()) + floats),
        }
        facts |= dict(metadata or {})
        size = _save(lowered.proto, temporary, facts)
    return ExportReport(
        path=Path(path),
        opset=chosen,
        size_bytes=size,
        forms=dict(Counter(lowered.forms.values())),
        float_islands=islands,
        average_bits=average_bits(plain),
        metadata=facts,
        slow=_slow(plain, lowered, runtime),
    )


def _slow(model: nn.Module, lowered: Lowered, runtime: str) -> list[str]:
    """Forms that ONNX Runtime has a faster one for."""
    if runtime != "onnxruntime":
        return []
    found = []
    grouped = [q.name for _, q in weights(model).values() if q.format.bits > 4]
    grouped = [name for name in grouped if lowered.forms.get(name) == "nbits"]
    if grouped:
        found.append(
            f"{len(grouped)} layers ({grouped[0]}, ...) have weights of more than 4 bits in groups, which "
            "MatMulNBits multiplies at about half of float's speed beyond a few rows; weights='int8' (a "
            "scale a channel) and activations='int8-batch' run in integers; weights='int4-g32' is faster at "
            "batch 1"
        )
    if lowered.largest_code > 64 and features() == "x86-avx2":
        found.append(
            "weights of 8 bits take the slower, correct kernel on this processor, which has no VNNI: for "
            "files that run here prepare with quant.Config.for_target('x86-avx2')"
        )
    return found


def float_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    float_model: nn.Module | None = None,
    example_inputs: Any = None,
    dynamic_batch: bool = True,
    dynamic_axes: dict[str, dict[int, str]] | None = None,
    opset: int = 20,
) -> int:
    """Write the float model as given to `prepare`, batch norm folded: the baseline of every comparison.

    Nothing that was done to the quantized model since (bias correction, training) is in it.

    Args:
        model: a model as for `onnx`. With layers placed by hand it is written with its quantizers off.
        path: the file to write.
        float_model: the float model, if `prepare` was told not to keep it.
        example_inputs: inputs as for `onnx`.
        dynamic_batch: a flag as for `onnx`.
        dynamic_axes: free axes as for `onnx`.
        opset: version of the default operator set.

    Returns:
        Its size in bytes.

    Raises:
        ExportError: as for `onnx`.
    """
    for package in ("onnx", "onnxscript"):
        require(package)
    plain = unwrap(model)
    if isinstance(plain, fx.GraphModule):
        plain = float_graph(plain, float_model)
    else:
        info = swap_info(plain)
        kept = None if info is None or info.float_model is None else info.float_model.model
        if float_model is not None or kept is not None:
            args, kwargs = example_inputs_of(plain, example_inputs)
            example_inputs = kwargs or args
            plain = float_model or kept  # type: ignore[assignment]
    with atomic(path) as temporary:
        captured = capture(
            plain, example_inputs, opset=opset, dynamic_batch=dynamic_batch,
            dynamic_axes=dynamic_axes, quantized=False,
        )  # fmt: skip
        return _save(lower(captured).proto, temporary, {"gradq.version": _version("gradq")})


def _choose_opset(model: nn.Module, opset: int | None) -> int:
    narrow = any(q.format.bits <= 4 for _, q in weights(model).values())
    if opset is None:
        return 21 if narrow else 20
    if opset < 18 or (narrow and opset < 21):
        raise ConfigError(
            f"opset is {opset}; legal: 18 or more, and 21 or more for weights of 4 bits or fewer"
        )
    return opset


def _islands(model: nn.Module, lowered: Lowered) -> tuple[list[tuple[str, str]], int]:
    """Names and reasons of the matrix products in float, and how many of them have a float weight."""
    known = []
    if isinstance(model, fx.GraphModule):
        known = list(prepare_info(model).float_islands)
    elif (swapped := swap_info(model)) is not None:
        known = list(swapped.float_islands)
    islands = [*known, *lowered.notes]
    modules = dict(model.named_modules())
    listed = {type(modules[name]).__name__ for name, _ in known if isinstance(modules.get(name), nn.RNNBase)}
    constants = {t.name for t in lowered.proto.graph.initializer}
    attention = floats = 0
    for node in lowered.proto.graph.node:
        if node.op_type not in _MATRIX_OPS or node.name in lowered.products:
            continue
        weights = [name for name in node.input if name in constants and not is_weight_constant(name)]
        is_listed = node.op_type in listed or any(
            w.startswith(f"{n}.") for n, _ in known for w in weights[:1]
        )
        if weights and not is_listed:
            islands.append((weights[0], f"{node.op_type} with a float weight"))
        attention += not weights
        floats += bool(weights)
    if attention:
        islands.append(
            (
                f"{attention} products of activations",
                "attention stays in float: faster, and more accurate, than in int8",
            )
        )
    return islands, floats


def facts_of(model: nn.Module, islands: list[tuple[str, str]], accuracy: float | None) -> dict[str, str]:
    """The metadata every file has.

    Args:
        model: the model, without wrappers.
        islands: (name, reason) of what is in float.
        accuracy: the model's, if known.
    """
    facts = {
        "gradq.version": _version("gradq"),
        "gradq.torch": torch.__version__,
        "gradq.float_islands": json.dumps(islands),
        "gradq.average_weight_bits": f"{average_bits(model):.3f}",
        "gradq.activations": json.dumps(
            sorted({str(m.format) for m in model.modules() if isinstance(m, ActQuant)})
        ),
    }
    if isinstance(model, fx.GraphModule):
        config = dataclasses.asdict(prepare_info(model).config)
        facts["gradq.config"] = json.dumps(config, default=str)
    if accuracy is not None:
        facts["gradq.accuracy"] = repr(float(accuracy))
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _save(proto: Any, path: Path, facts: dict[str, str]) -> int:
    """Check and write; returns the bytes written."""
    import onnx as onnx_package

    proto.producer_name, proto.producer_version = "gradq", facts["gradq.version"]
    onnx_package.helper.set_model_props(proto, facts)
    large = proto.ByteSize() > _EXTERNAL_FROM
    try:
        if not large:
            onnx_package.checker.check_model(proto, full_check=False)
        onnx_package.save_model(
            proto, str(path), save_as_external_data=large, location=f"{path.name}.data" if large else None
        )
        if large:
            onnx_package.checker.check_model(str(path))
    except onnx_package.checker.ValidationError as error:
        raise ExportError(
            f"torch.onnx translates an operator of this model into a graph that is not valid ONNX: "
            f"{str(error).splitlines()[0]}; write that line with other operators"
        ) from error
    except OSError as error:
        raise ExportError(f"cannot write {path.name}: {error.strerror}") from error
    return sum(file.stat().st_size for file in path.parent.iterdir())
