"""A calibrated model rewritten in plain torch operators, its weights stored as integers.

Four ways to write it:

* ``aten``: weights become float when they are read, and everything is computed in float. A small file gives
  the same numbers as the simulation, bit for bit, without gradq.
* ``int_mm``: linear layers compute on codes, through ``torch._int_mm`` (int8 × int8 → int32), on the CPU and
  on CUDA; everything else is as in ``aten``.
* ``pt2e``: the graph has the ``quantized_decomposed`` operators of torchao's PT2E with gradq's ranges, as
  converters to ExecuTorch read it.
* ``pt2e-float``: the same with float weights in front of a quantize operator, as LiteRT's converter reads it.

Shapes: O outputs, I inputs, R rows with a scale each, n elements in a row, M rows of a matrix product.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from gradq.errors import ConfigError, ExportError
from gradq.quant.fake import ActQuant, WeightQuant, float8_names
from gradq.quant.integer import integer_bias
from gradq.quant.modules import QuantLayer, QuantLinear
from gradq.quant.operators import source_of

__all__ = ["OPERATORS", "IntMatmul", "StoredWeight", "store"]

OPERATORS = ("aten", "int_mm", "pt2e", "pt2e-float")


class StoredWeight(nn.Module):
    """A weight that is stored as codes; a call gives the float weight.

    Args:
        weight: (O, …) fp32 weight.
        quantizer: quantizer of the weight.

    Attributes:
        form: ``int8``, ``int4`` (two codes in a byte) or ``table`` (two indices in a byte).
    """

    data: Tensor
    scale: Tensor
    zero_point: Tensor
    table: Tensor | None

    def __init__(self, weight: Tensor, quantizer: WeightQuant) -> None:
        super().__init__()
        fmt, codes = quantizer.format, quantizer.quantize(weight)
        rows = quantizer.rows(codes)
        self.shape, self.rows_shape = tuple(weight.shape), tuple(rows.shape)
        self.grouped = fmt.granularity == "group"
        self.low = 0
        self.register_buffer("table", None)
        if not fmt.is_uniform:
            assert quantizer.codebook is not None
            self.form = "table"
            self.register_buffer("table", quantizer.codebook.clone())
            index = np.searchsorted(quantizer.codebook.numpy(), rows.numpy())
            self.register_buffer("data", _packed(torch.from_numpy(index)))
        elif fmt.bits <= 4:
            self.form, self.low = "int4", fmt.qmin
            self.register_buffer("data", _packed(rows - fmt.qmin))
        else:
            self.form = "int8"
            self.register_buffer("data", rows.to(torch.int8 if fmt.symmetric else torch.uint8))
        self.register_buffer("scale", quantizer.scale.detach().clone())
        self.register_buffer("zero_point", quantizer.zero_point.clone())
        self.symmetric = not bool(quantizer.zero_point.any())

    def codes(self) -> Tensor:
        """The codes, (R, n) integers."""
        if self.form == "int8":
            return self.data
        nibbles = torch.stack([self.data.bitwise_and(15), self.data.bitwise_right_shift(4)], -1)
        nibbles = nibbles.reshape(-1)[: self.rows_shape[0] * self.rows_shape[1]].reshape(self.rows_shape)
        if self.table is not None:
            return self.table[nibbles.to(torch.int64)]
        return nibbles.to(torch.int8) + self.low

    def forward(self) -> Tensor:
        """The float weight, (O, …) fp32."""
        rows = self.codes().to(torch.float32)
        if not self.symmetric:
            rows = rows - self.zero_point[:, None]
        rows = rows * self.scale[:, None]
        if self.grouped:
            rows = rows.reshape(self.shape[0], -1)[:, : int(np.prod(self.shape[1:]))]
        return rows.reshape(self.shape)


def _packed(nibbles: Tensor) -> Tensor:
    """Pack two values of 0 … 15 into each byte, the first into the low bits: any shape → one axis, uint8."""
    flat = nibbles.reshape(-1).to(torch.uint8)
    flat = functional.pad(flat, (0, flat.numel() % 2))
    return flat[0::2] | (flat[1::2] << 4)


class _Decomposed(nn.Module):
    """A weight behind the dequantize operator of PT2E, with a scale per channel or per tensor.

    Args:
        weight: (O, …) fp32 weight.
        quantizer: quantizer of the weight.
        folded: whether codes are stored; otherwise the float weight is stored (rounded to its grid) and the
            graph quantizes it.
    """

    data: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, weight: Tensor, quantizer: WeightQuant, *, folded: bool) -> None:
        super().__init__()
        fmt = quantizer.format
        if fmt.granularity == "group" or not fmt.symmetric:
            raise ExportError(
                f"{quantizer.name} has the format {fmt}; PT2E's converters take symmetric weights with a "
                "scale a tensor or a channel: use 'int8'"
            )
        self.low, self.high = (fmt.qmin, fmt.qmax) if fmt.is_uniform else (-128, 127)
        self.form, self.folded = "int8", folded
        codes = quantizer.quantize(weight).to(torch.int8)
        self.register_buffer("data", codes if folded else quantizer(weight).detach())
        self.register_buffer("scale", quantizer.scale.detach().clone())
        self.register_buffer("zero_point", quantizer.zero_point.to(torch.int64))

    def forward(self) -> Tensor:
        """The float weight, (O, …) fp32."""
        ops, limits = torch.ops.quantized_decomposed, (self.low, self.high, torch.int8)
        if self.scale.numel() == 1:
            parts: tuple[Any, ...] = (float(self.scale[0]), int(self.zero_point[0]), *limits)
            codes = self.data if self.folded else ops.quantize_per_tensor.default(self.data, *parts)
            out = ops.dequantize_per_tensor.default(codes, *parts)
        else:
            parts = (self.scale, self.zero_point, 0, *limits)
            codes = self.data if self.folded else ops.quantize_per_channel.default(self.data, *parts)
            out = ops.dequantize_per_channel.default(codes, *parts)
        result: Tensor = out
        return result


class IntMatmul(nn.Module):
    """A linear layer that computes on codes.

    ``torch._int_mm`` on CUDA takes only multiples of 8 for I and O and more than 16 rows: zeros are appended
    to the operands, and their results are cut off. Checked on an H100 by tests/gpu/test_int_mm.py.

    Args:
        layer: linear layer whose weight is symmetric, with a scale per tensor or per channel.
        stored: weight of the layer, stored as codes.
        quantizer: quantizer of the input; if it is static, the input must be rounded to its grid.
    """

    bias: Tensor | None
    sums: Tensor

    def __init__(self, layer: QuantLinear, stored: StoredWeight, quantizer: ActQuant) -> None:
        super().__init__()
        self.stored, self.quantizer = stored, quantizer
        self.outputs, self.inputs = stored.shape
        fmt, w_scale = quantizer.format, stored.scale
        self.low, self.high, self.shift = fmt.qmin, fmt.qmax, 0 if fmt.symmetric else 128
        self.is_dynamic = fmt.is_dynamic
        bias = None if layer.bias is None else layer.effective_bias().detach().clone()  # type: ignore[union-attr]
        if bias is not None and not self.is_dynamic:
            bias = integer_bias(bias, quantizer.scale.detach(), w_scale)
        self.register_buffer("bias", bias)
        codes = self.stored.codes().reshape(self.outputs, self.inputs)
        self.register_buffer("sums", codes.to(torch.int32).sum(1, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """(B, …, I) fp32 → (B, …, O) fp32."""
        if self.is_dynamic:
            scale, zero_point = self.quantizer.dynamic_range(x)
        else:
            scale, zero_point = _range_of(self.quantizer)
        codes = ((x / scale).round() + zero_point).clamp(self.low, self.high) - self.shift
        rows = codes.to(torch.int8).reshape(-1, self.inputs)
        inner, outer = -self.inputs % 8, -self.outputs % 8
        weight = self.stored.codes().reshape(self.outputs, self.inputs)
        if inner or outer:
            weight = functional.pad(weight, (0, inner, 0, outer))
        wide = functional.pad(rows, (0, inner, 0, 16))
        total: Tensor = torch._int_mm(wide, weight.t())
        total = total[: rows.shape[0], : self.outputs].reshape(*x.shape[:-1], self.outputs)
        if self.shift:
            total = total - (zero_point - self.shift) * self.sums
        if self.bias is None:
            return total.to(torch.float32) * (scale * self.stored.scale)
        if self.is_dynamic:
            return total.to(torch.float32) * (scale * self.stored.scale) + self.bias
        return (total + self.bias).to(torch.float32) * (scale * self.stored.scale)


def store(model: nn.Module, operators: str) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Rewrite a model in plain operators, in place; gradq cannot use it afterwards.

    Args:
        model: model from `gradq.export.capture.exportable`.
        operators: name of the operators, one of `OPERATORS`.

    Returns:
        Layer name → form of its weight, and (name, reason) of layers that multiply in float though ``int_mm``
        was asked for.

    Raises:
        ConfigError: a name that is not among them.
        ExportError: a format that the operators do not have; the tensor is named.
    """
    if operators not in OPERATORS:
        raise ConfigError(f"operators is {operators!r}; legal: {', '.join(OPERATORS)}")
    if names := float8_names(model):
        raise ExportError(f"{names[0]} is fp8, which has no form here: export.onnx(..., runtime='tensorrt')")
    if operators.startswith("pt2e"):
        import torch.ao.quantization.fx._decomposed  # noqa: F401  # registers the operators

        for module in model.modules():
            if isinstance(module, fx.GraphModule):
                _quantize_behind_moves(module)
    forms: dict[str, str] = {}
    islands: list[tuple[str, str]] = []
    readers = _readers(model)
    acts = [m for m in model.modules() if isinstance(m, ActQuant)]
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}
    parts: dict[int, Any] = {}  # by the quantizer's id: tied weights share one
    for layer in layers.values():
        for _, weight, quantizer in layer.quantized_weights():
            if id(quantizer) not in parts:
                parts[id(quantizer)] = (
                    _Decomposed(weight, quantizer, folded=operators == "pt2e")
                    if operators.startswith("pt2e")
                    else StoredWeight(weight, quantizer)
                )
    for name, layer in layers.items():
        if operators == "int_mm":
            reason = _why_float(name, layer, readers)
            if reason is None:
                assert isinstance(layer, QuantLinear)
                forms[f"{name}.weight"] = "int_mm"
                matmul = IntMatmul(layer, parts[id(layer.weight_quant)], readers[name][0])
                _empty(layer)
                layer.matmul = matmul
                layer.__dict__["forward"] = matmul.__call__
                continue
            if not layer.is_embedding:
                islands.append((name, reason))
        for key, _, quantizer in layer.quantized_weights():
            part = parts[id(quantizer)]
            forms[f"{name}.{key}"] = part.form
            layer._parameters[key] = None
            _empty(quantizer)
            quantizer.stored = part
            quantizer.__dict__["forward"] = _ignoring_its_argument(part)
    for act in acts:
        _fix_range(act)
        act.__dict__["forward"] = _decomposed(act) if operators.startswith("pt2e") else _plain(act)
    return forms, islands


def _empty(module: nn.Module) -> None:
    """Remove every parameter, buffer and submodule of a module."""
    for held in (module._parameters, module._buffers, module._modules):
        held.clear()


def _ignoring_its_argument(part: nn.Module) -> Any:
    return lambda _weight: part()


def _fix_range(quantizer: ActQuant) -> None:
    """Hold the scale as a buffer in the place of its logarithm, which is a parameter."""
    if quantizer.format.is_dynamic:
        return
    scale = quantizer.scale.detach().clone()
    quantizer._parameters.clear()
    quantizer.register_buffer("fixed_scale", scale)


def _range_of(quantizer: ActQuant) -> tuple[Tensor, Tensor]:
    return quantizer.fixed_scale, quantizer.zero_point  # type: ignore[return-value]  # a buffer


def _plain(quantizer: ActQuant) -> Any:
    """A function of torch's own operators that computes what `gradq.quant.ops.fake_quantize` does."""
    fmt = quantizer.format

    def call(x: Tensor) -> Tensor:
        scale, zero = quantizer.dynamic_range(x) if fmt.is_dynamic else _range_of(quantizer)
        return ((x / scale).round() + zero).clamp(fmt.qmin, fmt.qmax).sub(zero).mul(scale)

    return call


def _decomposed(quantizer: ActQuant) -> Any:
    """A function on int8 codes; asymmetric codes are shifted by half their range, which changes no value."""
    fmt = quantizer.format
    ops = torch.ops.quantized_decomposed
    half = 0 if fmt.symmetric else 1 << (fmt.bits - 1)
    limits = (fmt.qmin - half, fmt.qmax - half)
    if fmt.is_dynamic:
        return _decomposed_dynamic(quantizer, *limits)
    fixed, zero_point = _range_of(quantizer)
    arguments = (float(fixed[0]), int(zero_point[0]) - half, *limits, torch.int8)

    def call(x: Tensor) -> Tensor:
        codes = ops.quantize_per_tensor.default(x, *arguments)
        out: Tensor = ops.dequantize_per_tensor.default(codes, *arguments)
        return out

    return call


def _decomposed_dynamic(quantizer: ActQuant, low: int, high: int) -> Any:
    """A function that finds the range of each batch by PT2E's own operator, within a rounding of gradq's."""
    fmt, ops = quantizer.format, torch.ops.quantized_decomposed
    if fmt.range != "batch" or fmt.symmetric:
        raise ExportError(
            f"{quantizer.name} has the dynamic format {fmt}; of these PT2E's operators are written here for "
            "'int8-batch' only"
        )

    def call(x: Tensor) -> Tensor:
        eps = float(torch.finfo(torch.float32).eps)
        scale, zero = ops.choose_qparams.tensor(x, low, high, eps, torch.int8)
        codes = ops.quantize_per_tensor.tensor(x, scale, zero, low, high, torch.int8)
        out: Tensor = ops.dequantize_per_tensor.tensor(codes, scale, zero, low, high, torch.int8)
        return out

    return call


def _quantize_behind_moves(traced: fx.GraphModule) -> None:
    """Put the same quantizer behind what only moves elements (max pooling, reshaping, …), in place.

    It changes no value. The converters of PT2E need a dequantize operator directly before every reader.
    """
    for node in list(traced.graph.nodes):
        source = source_of(node, traced)
        if source is node or source.op != "call_module" or not node.users:
            continue
        quantizer = traced.get_submodule(str(source.target))
        is_list = any(user.target is operator.getitem for user in node.users)
        if not isinstance(quantizer, ActQuant) or quantizer.format.is_dynamic or is_list:
            continue
        with traced.graph.inserting_after(node):
            again = traced.graph.call_module(str(source.target), (node,))
        node.replace_all_uses_with(again, delete_user_cb=lambda user, again=again: user is not again)
    traced.recompile()


def _readers(model: nn.Module) -> dict[str, list[ActQuant]]:
    """Layer name → the quantizers of its inputs, one for each call."""
    found: dict[str, list[ActQuant]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and module.input_quant is not None:
            found[name] = [module.input_quant]
    if isinstance(model, fx.GraphModule):
        for node in model.graph.nodes:
            if node.op != "call_module" or not isinstance(model.get_submodule(str(node.target)), QuantLinear):
                continue
            source = source_of(node.args[0], model)
            if source.op == "call_module":
                quantizer = model.get_submodule(str(source.target))
                if isinstance(quantizer, ActQuant):
                    found.setdefault(str(node.target), []).append(quantizer)
    return found


def _why_float(name: str, layer: QuantLayer, readers: dict[str, list[ActQuant]]) -> str | None:
    """Why ``torch._int_mm`` cannot compute a layer; None if it can."""
    if not isinstance(layer, QuantLinear):
        return f"torch._int_mm multiplies matrices only, this is a {type(layer).__name__}"
    fmt = layer.weight_quant.format
    if fmt.granularity == "group" or not fmt.symmetric:
        return f"torch._int_mm takes symmetric weights with a scale a channel or a tensor, not {fmt}"
    if len({id(q) for q in readers.get(name, [])}) != 1:
        return "its input is not quantized, or by several quantizers"
    return None
