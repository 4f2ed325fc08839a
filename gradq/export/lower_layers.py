"""Layers with quantized weights as ONNX nodes: QDQ around Conv and Gemm, MatMulInteger, MatMulNBits, lookups.

* A layer reads DequantizeLinear of its input, its weight and its bias; the bias is int32 and its scale is
  exactly input scale × weight scale.
* Dynamic activations: ``DynamicQuantizeLinear → MatMulInteger → Cast → Mul → Add``, which ONNX Runtime fuses.
* Weights in groups: ``MatMulNBits``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from gradq.errors import ExportError
from gradq.export.capture import Captured
from gradq.export.lookup import takes_one_operator, write_lookup, write_standard_lookup
from gradq.export.nodes import MICROSOFT, Layer, Quantizer
from gradq.export.weights import Builder, codes_of, float_weight, integer_weight, nbits_weight, storage
from gradq.quant.integer import integer_bias

__all__ = ["Bound", "Codes", "LayerLowering", "attributes_of"]

_ACTIVATIONS = frozenset(
    {
        "Relu",
        "LeakyRelu",
        "Sigmoid",
        "Tanh",
        "HardSigmoid",
        "Elu",
        "Selu",
        "Softplus",
        "Softsign",
        "ThresholdedRelu",
    }
)  # fmt: skip
# an operator that moves elements: its name, its inputs behind the first, its attributes
Shuffle = tuple[str, list[str], dict[str, Any]]


@dataclass(frozen=True)
class Codes:
    """A value that exists as codes.

    Attributes:
        codes: name of the uint8 or int8 value.
        scale: name of its scale.
        zero_point: name of its zero point.
        entry: the quantizer it came from.
        source: name of the float value it was quantized from.
        moved: True if elements were moved since.
        unpadded: the codes before zeros were put around the spatial axes, and how many at each begin and end.
    """

    codes: str
    scale: str
    zero_point: str
    entry: Quantizer
    source: str
    moved: bool = False
    unpadded: tuple[str, tuple[int, ...]] | None = None

    def without_padding(self, geometry: dict[str, Any]) -> tuple[Codes, dict[str, Any]]:
        """What a convolution reads that puts the zeros there itself, and its geometry."""
        if self.unpadded is None:
            return self, geometry
        codes, more = self.unpadded
        pads = [a + b for a, b in zip(geometry["pads"], more, strict=True)]
        return replace(self, codes=codes, unpadded=None), geometry | {"pads": pads}


@dataclass(frozen=True)
class Bound:
    """A ReLU or its like.

    Attributes:
        source: name of what it bounds.
        low: smallest value behind it, or None.
        high: largest value behind it, or None.
    """

    source: str
    low: float | None
    high: float | None


class LayerLowering:
    """The state of a lowering, and the layers' part of it.

    Args:
        captured: the graph with opaque nodes; changed in place.
    """

    def __init__(self, captured: Captured) -> None:
        import onnx

        self.entries = captured.entries
        self.proto = captured.proto
        self.graph = captured.proto.graph
        self.builder = Builder()
        self.quantized: dict[str, Codes] = {}
        self.clips: dict[str, Bound] = {}
        self.reshaped: dict[str, tuple[str, tuple[Shuffle, ...]]] = {}
        self.constants: dict[str, np.ndarray[Any, Any]] = {}
        self.forms: dict[str, str] = {}
        self.notes: list[tuple[str, str]] = []
        self.products: set[str] = set()
        self.largest_code = 0
        self.readers: dict[str, list[Any]] = {}
        self.producers = {name: node for node in self.graph.node for name in node.output}
        self.written: set[str] = set()  # outputs of nodes that another node's replacement has written
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        for output in self.graph.output:  # a reader that is no quantizer
            self.readers.setdefault(output.name, []).append(onnx.NodeProto())
        known = [*self.graph.input, *self.graph.value_info, *self.graph.output]
        self.shapes = {v.name: _dims(v) for v in known}

    def _layer(self, node: Any, layer: Layer) -> None:
        x, out = node.input[0], node.output[0]
        if layer.kind == "embedding":
            self._embedding(x, out, layer)
            return
        value = self.quantized.get(x)
        start = len(self.builder.nodes)
        form = storage(layer)
        grouped = layer.quantizer.format.granularity == "group"
        narrow = layer.quantizer.format.bits <= 4
        if form == "nbits" and (narrow or self._is_dynamic(value)):
            self._nbits(value.source if self._is_dynamic(value) and value else x, out, layer, value)
        elif value is None or grouped:
            reason = (
                "its input stays in float"
                if value is None
                else f"no integer operator takes weights of format {layer.quantizer.format}"
            )
            if form == "nbits":  # ONNX Runtime 1.32 unpacks them in every call: a fourteenth of float's speed
                form, reason = "int8", f"{reason} (with activations='int8-token' it is fast at batch 1)"
            self.notes.append((layer.name, f"{reason}: stored in {form}, computed in float"))
            form = "float"
            self._float(x, out, layer, attributes_of(node)["rank"])
        elif layer.kind == "conv":
            self._conv(value, out, layer)
        elif not self._is_dynamic(value):
            self._gemm(value, out, layer, attributes_of(node)["rank"])
        elif value.codes:
            self._matmul_dynamic(value, out, layer)
        else:
            self._matmul_token(value, out, layer)
        if form in ("int8", "int4", "table"):
            self.largest_code = max(self.largest_code, int(np.abs(codes_of(layer)[0]).max(initial=0)))
        self.forms[layer.name] = form
        self.products |= {node.name for node in self.builder.nodes[start:]}

    def _transposed(self, node: Any, layer: Layer) -> None:
        """A transposed convolution: the convolution of its phases, which are then put side by side."""
        out, shuffles = node.output[0], self._interleave(layer)
        if not shuffles:
            self._layer(node, layer)
            return
        phases = self.builder.unique(f"{out}.phases")
        self.readers[phases] = self.readers.get(out, [])
        node.output[0] = phases
        self._layer(node, layer)
        value = phases
        for i, (op, inputs, attributes) in enumerate(shuffles):
            last = i + 1 == len(shuffles)
            value = self.builder.node(
                op, [value, *inputs], f"{layer.name}.{op.lower()}", output=out if last else "", **attributes
            )
        self.reshaped[out] = (phases, shuffles)

    def _interleave(self, layer: Layer) -> tuple[Shuffle, ...]:
        """What puts (B, O·s^d, …) into (B, O, …·s), and cuts the borders off."""
        pixels, name, b = layer.subpixel, layer.name, self.builder
        assert pixels is not None
        s, d = pixels.stride, len(pixels.kernel)
        shuffles: list[Shuffle] = []
        if s > 1 and d == 2:
            shuffles.append(("DepthToSpace", [], {"blocksize": s, "mode": "CRD"}))
        elif s > 1:
            outputs = layer.weight.shape[0]
            apart, whole = (
                b.constant(f"{name}.{key}", np.array(shape, np.int64))
                for key, shape in (("apart", [0, outputs, s, -1]), ("whole", [0, outputs, -1]))
            )
            shuffles += [
                ("Reshape", [apart], {}), ("Transpose", [], {"perm": [0, 1, 3, 2]}), ("Reshape", [whole], {})
            ]  # fmt: skip
        if not any(begin or end for begin, end in pixels.cuts):
            return tuple(shuffles)
        begins = [begin for begin, _ in pixels.cuts]
        ends = [-end if end else np.iinfo(np.int64).max for _, end in pixels.cuts]
        parts = [
            b.constant(f"{name}.{key}", np.array(v, np.int64))
            for key, v in (("begins", begins), ("ends", ends), ("axes", list(range(2, 2 + d))))
        ]
        return (*shuffles, ("Slice", parts, {}))

    @staticmethod
    def _is_dynamic(value: Codes | None) -> bool:
        return value is not None and value.entry.quantizer.format.is_dynamic

    def _operands(self, value: Codes, layer: Layer) -> list[str]:
        """Weight and (if there is one) bias, dequantized."""
        codes, scale_name, zero, scale = integer_weight(self.builder, layer)
        axis: dict[str, Any] = {} if len(scale) == 1 else {"axis": 0}
        name = layer.name
        out = [self.builder.node("DequantizeLinear", [codes, scale_name, zero], f"{name}.dequantize", **axis)]
        if layer.bias is not None:
            x_scale = value.entry.quantizer.scale.detach()
            w_scale = _tensor(scale)
            bias = integer_bias(layer.bias.detach(), x_scale, w_scale).numpy()
            step = (x_scale * w_scale).numpy()
            if len(step) == 1:
                step = step.reshape(())
            parts = [
                self.builder.constant(f"{name}.bias", bias),
                self.builder.constant(f"{name}.bias_scale", step),
                self.builder.constant(f"{name}.bias_zero_point", np.zeros(step.shape, np.int32)),
            ]
            out.append(self.builder.node("DequantizeLinear", parts, f"{name}.bias_dequantize", **axis))
        return out

    def _conv(self, value: Codes, out: str, layer: Layer) -> None:
        if not self._is_quantized_next(out):
            self._conv_to_float(value, out, layer)
            return
        value, geometry = value.without_padding(layer.geometry)
        x = self._float_view(value, layer.name)
        inputs = [x, *self._operands(value, layer)]
        self.builder.node("Conv", inputs, layer.name, output=out, **geometry)

    def _is_quantized_next(self, out: str) -> bool:
        """True if every reader of a value is a quantizer, a bound in front of it aside."""
        readers = self.readers.get(out, [])
        return bool(readers) and all(
            reader.op_type == "Quantize"
            or (reader.op_type in ("Relu", "Clip") and self._is_quantized_next(reader.output[0]))
            for reader in readers
        )

    def _conv_to_float(self, value: Codes, out: str, layer: Layer) -> None:
        """A convolution whose output stays in float: no fused operator does that, so its parts are written.

        ConvInteger takes u8 weights only: the codes are shifted by 128.
        """
        import onnx

        value, geometry = value.without_padding(layer.geometry)
        b, name = self.builder, layer.name
        codes, scale, zero = codes_of(layer)
        shift = 128 if layer.quantizer.format.symmetric else 0
        weight = b.constant(f"{name}.codes", (codes + shift).astype(np.uint8))
        offset = b.constant(f"{name}.zero_point", np.array(int(zero[0]) + shift, np.uint8))
        x, x_zero = value.codes, value.zero_point
        if value.entry.quantizer.format.symmetric:
            wide = b.node("Cast", [x], f"{name}.wide", to=onnx.TensorProto.INT32)
            middle = b.constant(f"{name}.middle", np.array(128, np.int32))
            moved = b.node("Add", [wide, middle], f"{name}.move")
            x = b.node("Cast", [moved], f"{name}.input_u8", to=onnx.TensorProto.UINT8)
            x_zero = b.constant(f"{name}.input_zero_point", np.array(128, np.uint8))
        total = b.node("ConvInteger", [x, weight, x_zero, offset], name, **geometry)
        x_scale, w_scale = value.entry.quantizer.scale.detach(), _tensor(scale)
        shape = (-1,) + (1,) * (layer.weight.ndim - 2)
        if layer.bias is not None:
            bias = integer_bias(layer.bias.detach(), x_scale, w_scale).numpy().reshape(shape)
            total = b.node("Add", [total, b.constant(f"{name}.bias", bias)], f"{name}.add_bias")
        real = b.node("Cast", [total], f"{name}.to_float", to=onnx.TensorProto.FLOAT)
        factor = (x_scale * w_scale).numpy().reshape(shape)
        b.node("Mul", [real, b.constant(f"{name}.factor", factor)], f"{name}.scaled", output=out)

    def _float_view(self, value: Codes, name: str) -> str:
        parts = [value.codes, value.scale, value.zero_point]
        return self.builder.node("DequantizeLinear", parts, f"{name}.input")

    def _gemm(self, value: Codes, out: str, layer: Layer, rank: int) -> None:
        """A linear layer as Gemm, on rows if the input has more axes: only Gemm takes the integer bias."""
        operands, name = self._operands(value, layer), layer.name
        if rank == 2 and not self._feeds_activation(out):
            inputs = [self._float_view(value, name), *operands]
            self.builder.node("Gemm", inputs, name, output=out, transB=1)
            return
        outputs, inputs_ = _matrix_shape(layer)
        rows = self.builder.constant(f"{name}.rows", np.array([-1, inputs_], np.int64))
        flat = replace(
            value, codes=self.builder.node("Reshape", [value.codes, rows], f"{name}.to_rows"), moved=True
        )
        y = self.builder.node("Gemm", [self._float_view(flat, name), *operands], name, transB=1)
        shape = self._shape_of(value.codes, out, outputs, name)
        self.builder.node("Reshape", [y, shape], f"{name}.from_rows", output=out)
        self.reshaped[out] = (y, (("Reshape", [shape], {}),))

    def _feeds_activation(self, out: str) -> bool:
        """True if the runtime would fuse a float activation into the Gemm, and so lose the integers."""
        readers = [node for node in self.readers.get(out, []) if node.op_type in _ACTIVATIONS]
        return bool(readers) and not self._is_quantized_next(out)

    def _shape_of(self, like: str, out: str, outputs: int, name: str) -> str:
        """Name of the output's shape: a constant if at most one axis is free."""
        dims = self.shapes.get(out)
        if dims is not None and sum(d is None for d in dims) <= 1:
            return self.builder.constant(
                f"{name}.shape", np.array([-1 if d is None else d for d in dims], np.int64)
            )
        leading = self.builder.node("Shape", [like], f"{name}.leading", start=0, end=-1)
        last = self.builder.constant(f"{name}.outputs", np.array([outputs], np.int64))
        return self.builder.node("Concat", [leading, last], f"{name}.shape", axis=0)

    def _matmul_dynamic(self, value: Codes, out: str, layer: Layer) -> None:
        import onnx

        name, b = layer.name, self.builder
        codes, scale, zero, _ = integer_weight(b, layer)
        turned = b.node("Transpose", [codes], f"{name}.transpose", perm=[1, 0])
        total = b.node("MatMulInteger", [value.codes, turned, value.zero_point, zero], name)
        real = b.node("Cast", [total], f"{name}.to_float", to=onnx.TensorProto.FLOAT)
        factor = b.node("Mul", [value.scale, scale], f"{name}.factor")
        self._scaled(real, factor, out, layer)

    def _scaled(self, real: str, factor: str, out: str, layer: Layer) -> None:
        name, b = layer.name, self.builder
        if layer.bias is None:
            b.node("Mul", [real, factor], f"{name}.scaled", output=out)
            return
        y = b.node("Mul", [real, factor], f"{name}.scaled")
        bias = b.constant(f"{name}.bias", layer.bias.detach().numpy())
        b.node("Add", [y, bias], f"{name}.add_bias", output=out)

    def _matmul_token(self, value: Codes, out: str, layer: Layer) -> None:
        """Each token has its own scale and zero point; the zero point leaves the sum as a correction."""
        import onnx

        fmt, name, b, x = value.entry.quantizer.format, layer.name, self.builder, value.source
        if fmt.bits != 8 or not layer.quantizer.format.symmetric:
            raise ExportError(
                f"{name}: activations {fmt} with weights {layer.quantizer.format} have no ONNX form; use "
                "8-bit "
                "activations and symmetric weights"
            )
        last, f = b.constant(f"{name}.last", np.array([-1], np.int64)), np.float32
        zero = b.constant("zero", np.array(0, f))
        tiny, one = b.constant("tiny", np.array(2.0**-126, f)), b.constant("one", np.array(1, f))
        high = b.node("Max", [b.node("ReduceMax", [x, last], f"{name}.max"), zero], f"{name}.high")
        low = b.node("Min", [b.node("ReduceMin", [x, last], f"{name}.min"), zero], f"{name}.low")
        if fmt.symmetric:  # codes from -128 to 127
            up = b.node("Div", [high, b.constant("largest_code", np.array(127, f))], f"{name}.step_up")
            down = b.node("Div", [low, b.constant("smallest_code", np.array(-128, f))], f"{name}.step_down")
            step, offset = b.node("Max", [up, down], f"{name}.step"), b.constant("middle", np.array(128, f))
        else:
            width = b.node("Sub", [high, low], f"{name}.width")
            step = b.node("Div", [width, b.constant("levels", np.array(255, f))], f"{name}.step")
        empty = b.node("LessOrEqual", [step, zero], f"{name}.empty")
        step = b.node("Max", [step, tiny], f"{name}.step_normal")
        step = b.node("Where", [empty, one, step], f"{name}.step_safe")
        if not fmt.symmetric:
            steps = b.node("Div", [b.node("Neg", [low], f"{name}.neg_low"), step], f"{name}.steps")
            offset = b.node("Round", [steps], f"{name}.offset")
        scaled = b.node("Round", [b.node("Div", [x, step], f"{name}.divide")], f"{name}.round")
        shifted = b.node("Add", [scaled, offset], f"{name}.shift")
        bounded = b.node("Clip", [shifted, zero, b.constant("levels", np.array(255, f))], f"{name}.bound")
        codes = b.node("Cast", [bounded], f"{name}.codes_u8", to=onnx.TensorProto.UINT8)
        weight, scale, _, _ = integer_weight(b, layer)
        turned = b.node("Transpose", [weight], f"{name}.transpose", perm=[1, 0])
        total = b.node("MatMulInteger", [codes, turned], name)
        wide = b.node("Cast", [turned], f"{name}.wide", to=onnx.TensorProto.INT32)
        sums = b.node(
            "ReduceSum", [wide, b.constant(f"{name}.first", np.array([0], np.int64))], f"{name}.sums"
        )
        integer = b.node("Cast", [offset], f"{name}.offset_int", to=onnx.TensorProto.INT32)
        correction = b.node("Mul", [integer, sums], f"{name}.correction")
        total = b.node("Sub", [total, correction], f"{name}.total")
        real = b.node("Cast", [total], f"{name}.to_float", to=onnx.TensorProto.FLOAT)
        self._scaled(real, b.node("Mul", [step, scale], f"{name}.factor"), out, layer)

    def _nbits(self, x: str, out: str, layer: Layer, value: Codes | None) -> None:
        names, attributes = nbits_weight(self.builder, layer)
        inputs = [x, *names]
        if layer.bias is not None:
            inputs += ["", "", self.builder.constant(f"{layer.name}.bias", layer.bias.detach().numpy())]
        dynamic = self._is_dynamic(value)
        if dynamic:
            self.notes.append(
                (layer.name, "MatMulNBits quantizes its input itself, in blocks of the weight's groups")
            )
        self.builder.node(
            "MatMulNBits",
            inputs,
            layer.name,
            output=out,
            domain=MICROSOFT,
            accuracy_level=4 if dynamic else 1,
            **attributes,
        )

    def _float(self, x: str, out: str, layer: Layer, rank: int) -> None:
        weight, name, b = float_weight(self.builder, layer), layer.name, self.builder
        bias = [] if layer.bias is None else [b.constant(f"{name}.bias", layer.bias.detach().numpy())]
        if layer.kind == "conv":
            b.node("Conv", [x, weight, *bias], name, output=out, **layer.geometry)
        elif rank == 2:
            b.node("Gemm", [x, weight, *bias], name, output=out, transB=1)
        else:
            turned = b.node("Transpose", [weight], f"{name}.transpose", perm=[1, 0])
            if bias:
                y = b.node("MatMul", [x, turned], name)
                b.node("Add", [y, *bias], f"{name}.add_bias", output=out)
            else:
                b.node("MatMul", [x, turned], name, output=out)

    def _embedding(self, ids: str, out: str, layer: Layer) -> None:
        """A lookup by one operator, unless a linear layer reads the same codes as they are."""
        tied = any(
            isinstance(e, Layer) and e.kind != "embedding" and e.quantizer is layer.quantizer
            for e in self.entries
        )
        one = takes_one_operator(layer) and not tied
        ids, out = self._with_axis(ids, out)
        self.forms[layer.name] = (write_lookup if one else write_standard_lookup)(
            self.builder, layer, ids, out
        )

    def _with_axis(self, ids: str, out: str) -> tuple[str, str]:
        """Ids and rows of a lookup with the axis that is taken from the ids and given back to the rows.

        Where a model looks up column after column and stacks the rows, both are an operator for each table.
        """
        column, readers = self.producers.get(ids), self.readers.get(out, [])
        if column is None or column.op_type != "Gather" or [r.op_type for r in readers] != ["Unsqueeze"]:
            return ids, out
        axis, index = attributes_of(column).get("axis", 0), self.constants.get(column.input[1])
        given = np.ravel(self.constants.get(readers[0].input[1], []))
        if index is None or index.ndim or axis < 0 or given.tolist() != [axis]:
            return ids, out
        index_name = self.builder.constant(f"{ids}.index", index.reshape(1))
        self.written.add(readers[0].output[0])
        kept = self.builder.node("Gather", [column.input[0], index_name], f"{ids}.column", axis=axis)
        return kept, str(readers[0].output[0])


def attributes_of(node: Any) -> dict[str, Any]:
    """A node's attributes by name."""
    import onnx

    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _dims(value: Any) -> list[int | None] | None:
    if not value.type.tensor_type.HasField("shape"):
        return None
    return [d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim]


def _matrix_shape(layer: Layer) -> tuple[int, int]:
    rows = layer.weight.shape[0] if layer.rows is None else layer.rows.stop - layer.rows.start
    return rows, layer.weight.shape[1]


def _tensor(values: Sequence[float] | np.ndarray[Any, Any]) -> Tensor:
    import torch

    return torch.as_tensor(np.ascontiguousarray(values))
