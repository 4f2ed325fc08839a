"""From a quantized model to an ONNX graph whose quantized parts are still opaque nodes of domain ``gradq``.

A copy of the model gets new forwards for its quantizers and layers: each emits one symbolic node that holds
an index into a table of `Quantizer` and `Layer` entries. `torch.onnx.export` translates everything around
them; the weights never pass through it. `gradq.export.lower` then writes the nodes out as QDQ.

Shapes: B batch, I inputs, O outputs, as in `gradq.quant.modules`.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from gradq.errors import ConfigError, ExportError, GradqError
from gradq.export.inputs import leaf_names
from gradq.export.lstm import Recurrence, emit_lstm, recurrence_of
from gradq.export.nodes import DOMAIN, Layer, Quantizer
from gradq.export.subpixel import Subpixel
from gradq.quant.attention import QuantMultiheadAttention
from gradq.quant.batches import unwrap
from gradq.quant.fake import ActQuant, FakeQuantize
from gradq.quant.info import prepare_info
from gradq.quant.lstm import QuantLSTM
from gradq.quant.modules import QuantEmbedding, QuantLayer, QuantLinear, _QuantConv
from gradq.quant.prepare import finalize
from gradq.quant.recurrent import _QuantCell
from gradq.quant.tracing import example_arguments
from gradq.quant.transposed import QuantConvTranspose

__all__ = [
    "Captured",
    "Exportable",
    "capture",
    "example_inputs_of",
    "exportable",
    "innermost",
    "quietly",
]


@dataclass
class Captured:
    """What `capture` found.

    Attributes:
        proto: the ONNX model, with opaque nodes ``gradq::Quantize``, ``gradq::Layer`` and
            ``gradq::Recurrence``.
        entries: the things that the nodes' ``index`` attributes point to.
        model: the copy in evaluation, batch norm folded.
    """

    proto: Any
    entries: list[Quantizer | Layer | Recurrence]
    model: nn.Module


def example_inputs_of(model: nn.Module, example_inputs: Any = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments to export with: the given ones, or those the model was prepared with.

    Raises:
        ConfigError: none are known.
    """
    if example_inputs is not None:
        return example_arguments(example_inputs)
    if isinstance(model, fx.GraphModule):
        known = prepare_info(model).example_inputs
        if known is not None:
            return known
    raise ConfigError(
        f"{type(model).__name__} was not made by gradq.quant.prepare, so its inputs are unknown; pass "
        "example_inputs=(tensor, …)"
    )


@dataclass(frozen=True)
class Exportable:
    """A copy of a model that an exporter can trace, and what to trace it with.

    Attributes:
        model: the copy, in evaluation, on the CPU, batch norm folded.
        args: positional example inputs; free axes are at least 2 long.
        names: names of the tensors in the inputs.
        shapes: free axes, as `torch.export.export` takes them; None if all are fixed.
    """

    model: nn.Module
    args: tuple[Any, ...]
    names: list[str]
    shapes: tuple[Any, ...] | None


def exportable(
    model: nn.Module,
    example_inputs: Any,
    *,
    dynamic_batch: bool,
    dynamic_axes: dict[str, dict[int, str]] | None,
    quantized: bool = True,
) -> Exportable:
    """Copy and check a model.

    Args:
        model: calibrated; untouched.
        example_inputs: see `gradq.export.onnx`.
        dynamic_batch: the first axis of every input is free.
        dynamic_axes: more free axes: input name → axis → name.
        quantized: False asks for no quantized layer and no ranges.

    Raises:
        CalibrationError: a quantizer has no range; named.
        NonFiniteError: NaN or Inf in a weight; named.
        ExportError: no quantized layer, or inputs that the model does not run on.
        ConfigError: inputs or axes that do not fit.
    """
    plain = copy.deepcopy(unwrap(model)).eval().cpu()
    args, kwargs = example_inputs_of(plain, example_inputs)
    finalize(plain)
    if quantized:
        _check(plain)
    args, kwargs, names = _ordered(plain, args, kwargs)
    _run_once(plain, args)
    shapes = _dynamic_shapes(names, args, dynamic_batch, dynamic_axes)
    leaves = [leaf for name, value in zip(names, args, strict=True) for leaf in leaf_names(name, value)]
    return Exportable(plain, _at_least_two(args) if dynamic_batch else args, leaves, shapes)


def capture(
    model: nn.Module,
    example_inputs: Any,
    *,
    opset: int,
    dynamic_batch: bool,
    dynamic_axes: dict[str, dict[int, str]] | None,
    quantized: bool = True,
) -> Captured:
    """Translate everything but the quantized parts.

    Args:
        model: calibrated; untouched.
        example_inputs: see `gradq.export.onnx`.
        opset: the default domain's version.
        dynamic_batch: the first axis of every input is free.
        dynamic_axes: more free axes: input name → axis → name.
        quantized: False translates the model with its quantizers off.

    Raises:
        ExportError: torch cannot translate the model; the message names the operator. Also as `exportable`.
    """
    ready = exportable(
        model, example_inputs, dynamic_batch=dynamic_batch, dynamic_axes=dynamic_axes, quantized=quantized
    )
    plain = ready.model
    for name, module in plain.named_modules():
        if isinstance(module, nn.LSTM) and module.proj_size:
            raise ExportError(
                f"{name} is an nn.LSTM with proj_size={module.proj_size}, which ONNX does not have; replace "
                "it by an nn.LSTM without and an nn.Linear behind it, or export with gradq.export.pt2"
            )
    table = _install(plain) if quantized else _Table()
    if not quantized:
        for module in plain.modules():
            if isinstance(module, FakeQuantize):
                module.mode = "float"
    try:
        with torch.no_grad(), quietly():
            program = torch.onnx.export(
                plain, _positional(ready.args), dynamo=True, opset_version=opset, input_names=ready.names,
                dynamic_shapes=ready.shapes, verbose=False, optimize=True,
            )  # fmt: skip
    except Exception as error:
        raise ExportError(_explain(plain, error)) from error
    assert program is not None
    return Captured(program.model_proto, table.entries(), plain)


def _positional(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments so that torch.onnx does not take a dict at their end for keywords."""
    return (*args, {}) if args and isinstance(args[-1], dict) else args


def _check(model: nn.Module) -> None:
    """What cannot be exported is an error before anything is written."""
    found = False
    for name, module in model.named_modules():
        if isinstance(module, ActQuant) and not module.format.is_dynamic:
            _ = module.scale  # an uncalibrated one raises
        if isinstance(module, QuantLayer):
            found = True
            for key, weight, quantizer in module.quantized_weights():
                if weight.dtype != torch.float32:
                    raise ExportError(
                        f"{name}.{key} is {weight.dtype}; export takes fp32 models: prepare (or swap) "
                        "model.float() with fp32 inputs"
                    )
                _ = quantizer.quantize(weight)  # NaN and a missing range raise, with the weight's name
    if not found:
        raise ExportError(
            f"{type(model).__name__} has no quantized layer; call quant.prepare and quant.calibrate first"
        )


def _ordered(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], list[str]]:
    """Positional arguments only, and their names."""
    if isinstance(model, fx.GraphModule):
        places = [n for n in model.graph.nodes if n.op == "placeholder"]
        fixed = {str(n.target) for n in places if n.args}  # not tensors: they are what they were
        names = [str(n.target) for n in places if str(n.target) not in fixed]
        args, kwargs = args[: len(names)], {n: v for n, v in kwargs.items() if n not in fixed}
    else:
        names = list(inspect.signature(model.forward).parameters)
    missing = [n for n in names[len(args) : len(args) + len(kwargs)] if n not in kwargs]
    if missing or len(args) > len(names):
        raise ConfigError(f"the example inputs do not fit the model, which takes {names}")
    ordered = (*args, *(kwargs[n] for n in names[len(args) : len(args) + len(kwargs)]))
    return ordered, {}, names[: len(ordered)]


def _run_once(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Inputs that do not fit are an error here, where the reason is plain."""
    try:
        with torch.no_grad():
            model(*args)
    except GradqError:
        raise
    except Exception as error:
        shapes = [list(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in args]
        raise ExportError(f"{type(model).__name__} does not run on inputs {shapes}: {error}") from error


def _dynamic_shapes(
    names: Sequence[str], args: Sequence[Any], batch: bool, axes: dict[str, dict[int, str]] | None
) -> tuple[Any, ...] | None:
    axes = axes or {}
    leaves = [leaf for name, value in zip(names, args, strict=True) for leaf in leaf_names(name, value)]
    unknown = set(axes) - set(leaves)
    if unknown:
        raise ConfigError(f"dynamic_axes names {sorted(unknown)}; the model's inputs are {leaves}")
    if not batch and not axes:
        return None
    dims: dict[str, Any] = {}
    remaining = iter(leaves)

    def of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        name = next(remaining)
        wanted = ({0: "batch"} if batch and value.ndim else {}) | axes.get(name, {})
        for axis in wanted:
            if not 0 <= axis < value.ndim:
                raise ConfigError(f"dynamic_axes[{name!r}] names axis {axis} of {value.ndim}")
        return {a: dims.setdefault(d, torch.export.Dim(d)) for a, d in wanted.items()}

    return tuple(torch.utils._pytree.tree_map(of, value) for value in args)


def _at_least_two(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """torch.export takes an axis of length 1 for a constant."""
    out: tuple[Any, ...] = torch.utils._pytree.tree_map_only(
        Tensor, lambda a: torch.cat([a, a]) if a.ndim and a.shape[0] == 1 else a, args
    )
    return out


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """The exporter's progress, deprecations and advice about other packages stay off the user's terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def innermost(error: BaseException) -> str:
    """First line of the error at the bottom of a chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _explain(model: nn.Module, error: Exception) -> str:
    """The exporter's error in one sentence: the innermost cause says what and where."""
    text = innermost(error)
    advice = "leave the module that holds it out with quant.Config(skip=…) does not help here: rewrite it"
    if "not a known type" in str(error):
        advice = "return tensors in tuples, lists, dicts or a dataclass"
    elif "No ONNX function found" in str(error) or "No decompositions" in text:
        advice = "ONNX has no such operator: rewrite that line with operators it has"
    elif "onstraint" in str(error) or "specialized" in str(error) or "dynamic" in text.lower():
        advice = "the model fixes an axis that is to be free: pass dynamic_batch=False, or rewrite that line"
    return f"torch.onnx cannot translate {type(model).__name__}: {text}; {advice}"


# --- forwards that emit one node ------------------------------------------------------------------------


def _emit(
    op: str, inputs: Sequence[Tensor], index: int, shape: Sequence[Any], dtype: torch.dtype, **attributes: int
) -> Tensor:
    out: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{op}", inputs, {"index": index, **attributes}, dtype=dtype, shape=shape, version=1
    )
    return out


class _Table:
    """Adds entries and emits their nodes.

    While torch exports, parameters are stand-ins without values: entries are made by functions that are
    called afterwards.
    """

    def __init__(self) -> None:
        self.makers: list[Callable[[], Quantizer | Layer | Recurrence]] = []

    def entries(self) -> list[Quantizer | Layer | Recurrence]:
        """The finished table; parameters have their values again."""
        return [make() for make in self.makers]

    def _add(self, make: Callable[[], Quantizer | Layer | Recurrence]) -> int:
        self.makers.append(make)
        return len(self.makers) - 1

    def quantize(self, x: Tensor, quantizer: ActQuant | None) -> Tensor:
        if quantizer is None:
            return x
        index = self._add(lambda: Quantizer(quantizer.name, quantizer))
        return _emit("Quantize", [x], index, x.shape, x.dtype)

    def linear(
        self,
        x: Tensor,
        quantizer: ActQuant | None,
        owner: QuantLayer,
        keys: tuple[str, str, str] = ("weight", "bias", "weight_quant"),
        rows: slice | None = None,
    ) -> Tensor:
        x = self.quantize(x, quantizer)
        weight: Tensor = getattr(owner, keys[0])

        def make() -> Layer:
            w, b, q = (getattr(owner, key) for key in keys)
            if keys[1] == "bias":
                b = owner.effective_bias()
            return Layer(q.name, "linear", w, q, b if b is None or rows is None else b[rows], rows)

        outputs = weight.shape[0] if rows is None else rows.stop - rows.start
        return _emit("Layer", [x], self._add(make), (*x.shape[:-1], outputs), x.dtype, rank=x.ndim)

    def conv(self, x: Tensor, layer: Any) -> Tensor:
        x = self.quantize(x, layer.input_quant)
        pads = _pads(layer)
        if layer.padding_mode != "zeros":
            x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            pads = [0] * len(pads)
        size = [layer.weight.shape[0]]
        dims = len(layer.kernel_size)
        for i, (k, s, d) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
            size.append((x.shape[2 + i] + pads[i] + pads[i + dims] - d * (k - 1) - 1) // s + 1)
        geometry = {
            "kernel_shape": list(layer.kernel_size),
            "strides": list(layer.stride),
            "dilations": list(layer.dilation),
            "pads": pads,
            "group": layer.groups,
        }

        def make() -> Layer:
            q = layer.weight_quant
            return Layer(q.name, "conv", layer.weight, q, layer.effective_bias(), geometry=geometry)

        return _emit("Layer", [x], self._add(make), (x.shape[0], *size), x.dtype, rank=x.ndim)

    def conv_transpose(self, x: Tensor, layer: QuantConvTranspose) -> Tensor:
        x = self.quantize(x, layer.input_quant)
        padding: Any = layer.padding
        more = layer.output_padding
        pixels = Subpixel(layer.stride[0], layer.kernel_size, padding, more)
        ends = [taps - 1 for taps in pixels.taps]
        geometry = {
            "kernel_shape": list(pixels.taps), "strides": [1] * len(ends), "dilations": [1] * len(ends),
            "pads": [*ends, *ends], "group": layer.groups,
        }  # fmt: skip
        size: list[Any] = [layer.out_channels]
        for i, (k, s) in enumerate(zip(layer.kernel_size, layer.stride, strict=True)):
            size.append((x.shape[2 + i] - 1) * s - 2 * padding[i] + k + more[i])

        def make() -> Layer:
            q, weight, bias = layer.weight_quant, layer.effective_weight(), layer.effective_bias()
            if bias is not None:
                bias = bias.repeat_interleave(pixels.phases)
            return Layer(q.name, "conv", weight, q, bias, geometry=geometry, subpixel=pixels)

        return _emit("Layer", [x], self._add(make), (x.shape[0], *size), x.dtype, rank=x.ndim)

    def embedding(self, ids: Tensor, layer: QuantEmbedding) -> Tensor:
        def make() -> Layer:
            return Layer(layer.weight_quant.name, "embedding", layer.weight, layer.weight_quant, None)

        shape = (*ids.shape, layer.embedding_dim)
        return _emit("Layer", [ids], self._add(make), shape, layer.weight.dtype, rank=ids.ndim)

    def attention(
        self, layer: QuantMultiheadAttention, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The three projections; each distinct input is quantized once."""
        E, keys = layer.embed_dim, ("in_proj_weight", "in_proj_bias", "weight_quant")
        if layer.num_inputs == 1:
            q, k, v = self.linear(query, layer.input_quant, layer, keys).chunk(3, -1)
            return q, k, v
        inputs = [self.quantize(query, layer.input_quant), self.quantize(key, layer.key_quant)]
        inputs.append(inputs[1] if layer.num_inputs == 2 else self.quantize(value, layer.value_quant))
        q, k, v = (self.linear(x, None, layer, keys, slice(i * E, (i + 1) * E)) for i, x in enumerate(inputs))
        return q, k, v

    def gates(self, cell: _QuantCell, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Both products of a recurrent cell."""
        return (
            self.linear(x, cell.input_quant, cell, ("weight_ih", "bias_ih", "weight_quant")),
            self.linear(h, cell.hidden_quant, cell, ("weight_hh", "bias_hh", "hidden_weight_quant")),
        )

    def recurrence(self, module: QuantLSTM, x: Tensor, hx: Any, lengths: Any, layer: int) -> Any:
        """One layer of an LSTM."""
        if lengths is not None:
            raise ExportError(
                f"{module.weight_quant.name}: packed sequences have no form in a file; export the model with "
                "padded ones"
            )
        index = self._add(lambda: recurrence_of(module, layer))
        return emit_lstm(index, x, hx, len(module.suffixes(layer)), module.hidden_size)


def _pads(layer: Any) -> list[int]:
    """Begins of every spatial axis, then ends."""
    if isinstance(layer.padding, str):
        total = [
            d * (k - 1) if layer.padding == "same" else 0
            for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
        ]
        begins = [t // 2 for t in total]
        return [*begins, *(t - b for t, b in zip(total, begins, strict=True))]
    return list(layer.padding) * 2


def _install(model: nn.Module) -> _Table:
    """Give every quantizer and layer of the model a forward that emits nodes."""
    table = _Table()
    for module in list(model.modules()):
        if isinstance(module, ActQuant):
            module.__dict__["forward"] = _bind(lambda m, x: table.quantize(x, m), module)
        elif isinstance(module, _QuantConv):
            module.__dict__["forward"] = _bind(lambda m, x: table.conv(x, m), module)
        elif isinstance(module, QuantConvTranspose):
            module.__dict__["forward"] = _bind(lambda m, x: table.conv_transpose(x, m), module)
        elif isinstance(module, QuantLinear):
            module.__dict__["forward"] = _bind(lambda m, x: table.linear(x, m.input_quant, m), module)
        elif isinstance(module, QuantEmbedding):
            module.__dict__["forward"] = _bind(lambda m, ids: table.embedding(ids, m), module)
        elif isinstance(module, QuantMultiheadAttention):
            module.__dict__["_project"] = _bind(table.attention, module)
        elif isinstance(module, _QuantCell):
            module.__dict__["_gates"] = _bind(table.gates, module)
        elif isinstance(module, QuantLSTM):
            module.__dict__["_layer"] = _bind(table.recurrence, module)
    return table


def _bind(function: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return function(module, *args)

    return call
