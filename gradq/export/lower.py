"""Writes the opaque nodes of a captured graph out as ONNX: QDQ by the recipe for ONNX Runtime.

* An activation is quantized once, at its source: ``QuantizeLinear``. What only moves elements (reshape, max
  pooling, …) runs on the codes; every reader gets them through ``DequantizeLinear``.
* A layer reads DequantizeLinear of its input, its weight and its bias; the bias is int32 and its scale is
  exactly input scale × weight scale.
* A ReLU in front of a quantizer is a bound on the codes: nothing if saturation implies it.
* Dynamic activations: ``DynamicQuantizeLinear → MatMulInteger → Cast → Mul → Add``, which ONNX Runtime fuses.
* Weights in groups: ``MatMulNBits``.

The runtime replaces ``DQ → Conv → Q`` by QLinearConv, ``DQ → Gemm`` by QGemm and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from gradq.errors import ExportError
from gradq.export.capture import DOMAIN, Captured, Layer, Quantizer
from gradq.export.weights import Builder, codes_of, float_weight, integer_weight, nbits_weight, storage
from gradq.quant.integer import integer_bias, saturation

__all__ = ["Lowered", "lower"]

# fmt: off
_MOVES = frozenset({
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "MaxPool", "Slice", "Split", "Expand",
    "Identity", "DepthToSpace", "Pad", "Gather",
})
# fmt: on
_MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class _Codes:
    """A value that exists as codes.

    Attributes:
        codes: name of the uint8 or int8 value.
        scale: name of its scale.
        zero_point: name of its zero point.
        entry: the quantizer it came from.
        source: name of the float value it was quantized from.
        moved: True if elements were moved since.
    """

    codes: str
    scale: str
    zero_point: str
    entry: Quantizer
    source: str
    moved: bool = False


@dataclass(frozen=True)
class _Clip:
    source: str
    low: float | None
    high: float | None


@dataclass
class Lowered:
    """The finished graph.

    Attributes:
        proto: the ONNX model.
        forms: layer name → how it computes (``int8``, ``int4``, ``table``, ``nbits``, ``float``).
        notes: (name, reason) of quantized layers that compute in float, or otherwise than simulated.
        products: names of the nodes that multiply by a quantized layer's weight.
        largest_code: of the weights in integer kernels, by magnitude; above 64 a processor without VNNI
            overflows 16 bits.
    """

    proto: Any
    forms: dict[str, str]
    notes: list[tuple[str, str]]
    products: set[str]
    largest_code: int


def lower(captured: Captured) -> Lowered:
    """Replace every opaque node, in place in the captured model.

    Raises:
        ExportError: a format that ONNX has no operator for; the tensor is named.
    """
    return _Lowering(captured).run()


class _Lowering:
    def __init__(self, captured: Captured) -> None:
        import onnx

        self.entries = captured.entries
        self.proto = captured.proto
        self.graph = captured.proto.graph
        self.builder = Builder()
        self.quantized: dict[str, _Codes] = {}
        self.clips: dict[str, _Clip] = {}
        self.reshaped: dict[str, tuple[str, str]] = {}
        self.constants: dict[str, np.ndarray[Any, Any]] = {}
        self.forms: dict[str, str] = {}
        self.notes: list[tuple[str, str]] = []
        self.products: set[str] = set()
        self.largest_code = 0
        self.readers: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        for output in self.graph.output:  # a reader that is no quantizer
            self.readers.setdefault(output.name, []).append(onnx.NodeProto())
        known = [*self.graph.input, *self.graph.value_info, *self.graph.output]
        self.shapes = {v.name: _dims(v) for v in known}

    def run(self) -> Lowered:
        import onnx

        for node in self.graph.node:
            self.builder.unique(node.name)
        for tensor in self.graph.initializer:
            self.builder.unique(tensor.name)
            if len(tensor.dims) == 0 or max(tensor.dims, default=0) <= 8:
                self.constants[tensor.name] = onnx.numpy_helper.to_array(tensor)
        for node in self.graph.node:
            if node.domain == DOMAIN:
                entry = self.entries[_attributes(node)["index"]]
                if isinstance(entry, Quantizer):
                    self._quantize(node, entry)
                else:
                    self._layer(node, entry)
            elif node.input and node.input[0] in self.quantized and self._is_move(node):
                self._move(node)
            elif node.input and node.input[0] in self.quantized and self._is_global_mean(node):
                self._global_mean(node)
            else:
                self._note(node)
                self.builder.nodes.append(node)
                self._pass_token(node)
        self._finish()
        return Lowered(self.proto, self.forms, self.notes, self.products, self.largest_code)

    def _note(self, node: Any) -> None:
        """Remember constants and bounds."""
        import onnx

        if node.op_type == "Constant":
            for attribute in node.attribute:
                value = onnx.helper.get_attribute_value(attribute)
                if attribute.name == "value":
                    value = onnx.numpy_helper.to_array(value)
                self.constants[node.output[0]] = np.asarray(value)
        elif node.op_type == "Relu":
            self._add_clip(node, 0.0, None)
        elif node.op_type == "Clip":
            bounds: list[float | None] = [None, None]
            for i, name in enumerate(node.input[1:3]):
                if name and name not in self.constants:
                    return
                bounds[i] = float(self.constants[name]) if name else None
            self._add_clip(node, *bounds)

    def _add_clip(self, node: Any, low: float | None, high: float | None) -> None:
        before = self.clips.get(node.input[0])
        if before is None:
            self.clips[node.output[0]] = _Clip(node.input[0], low, high)

    # --- activations ------------------------------------------------------------------------------------

    def _quantize(self, node: Any, entry: Quantizer) -> None:
        source, out, fmt = node.input[0], node.output[0], entry.quantizer.format
        name = f"{entry.name}.quant"
        if fmt.is_dynamic:
            self._quantize_dynamic(source, out, entry)
            return
        dtype = np.int8 if fmt.symmetric else np.uint8
        scale = self.builder.constant(f"{name}.scale", entry.quantizer.scale.detach().numpy().reshape(()))
        zero = self.builder.constant(
            f"{name}.zero_point", entry.quantizer.zero_point.numpy().astype(dtype).reshape(())
        )
        clip = self.clips.get(source, _Clip(source, None, None))
        low, high = saturation(entry.quantizer, clip.low, clip.high)
        value, shape = self.reshaped.get(clip.source, (clip.source, ""))
        codes = self.builder.node("QuantizeLinear", [value, scale, zero], name)
        limits = np.iinfo(dtype)
        if low > limits.min or high < limits.max:
            ends = [
                self.builder.constant(f"{name}.{end}", np.array(bound, dtype))
                for end, bound in (("low", low), ("high", high))
            ]
            codes = self.builder.node("Clip", [codes, *ends], f"{name}.clip")
        if shape:
            codes = self.builder.node("Reshape", [codes, shape], f"{name}.reshape")
        self._offer(_Codes(codes, scale, zero, entry, source), out)

    def _quantize_dynamic(self, source: str, out: str, entry: Quantizer) -> None:
        fmt = entry.quantizer.format
        if fmt.range == "token":
            # each reader writes its own arithmetic; nothing is shared but the name
            self.quantized[out] = _Codes("", "", "", entry, source)
            self.builder.node("Identity", [source], f"{entry.name}.token", output=out)
            return
        if fmt.symmetric or fmt.bits != 8:
            raise ExportError(
                f"{entry.name} has the dynamic format {fmt}; ONNX quantizes dynamically to 8 bits asymmetric "
                "only: "
                "use activations='int8-batch', or a static format"
            )
        codes, scale, zero = self.builder.nodes_out(
            "DynamicQuantizeLinear", [source], f"{entry.name}.quant", 3
        )
        self._offer(_Codes(codes, scale, zero, entry, source), out)

    def _pass_token(self, node: Any) -> None:
        """Tokens are quantized by their readers: a moved value still is to be."""
        value = self.quantized.get(node.input[0]) if node.input else None
        if value is not None and not value.codes and node.op_type in _MOVES:
            for out in node.output:
                self.quantized[out] = replace(value, source=out)

    def _offer(self, value: _Codes, out: str) -> None:
        """Make codes available under their float name."""
        self.builder.node(
            "DequantizeLinear",
            [value.codes, value.scale, value.zero_point],
            f"{out}.dequantize",
            output=out,
        )
        self.quantized[out] = value

    def _is_move(self, node: Any) -> bool:
        if node.op_type not in _MOVES or not self.quantized[node.input[0]].codes:
            return False
        if node.op_type == "Pad":
            fill = node.input[2] if len(node.input) > 2 else ""
            mode = _attributes(node).get("mode", b"constant")
            return mode != b"constant" or not fill or not np.any(self.constants.get(fill, 1))
        return node.op_type != "MaxPool" or len(node.output) == 1

    def _move(self, node: Any) -> None:
        """Run a moving operation on the codes."""
        value = self.quantized[node.input[0]]
        inputs = [value.codes, *node.input[1:]]
        attributes = _attributes(node)
        if node.op_type == "Pad" and attributes.get("mode", b"constant") == b"constant":
            inputs = [value.codes, node.input[1], value.zero_point, *node.input[3:]]
        codes = self.builder.nodes_out(
            node.op_type, inputs, f"{node.name}.codes", len(node.output), **attributes
        )
        for moved, out in zip(codes, node.output, strict=True):
            self._offer(replace(value, codes=moved, moved=True), out)

    def _is_global_mean(self, node: Any) -> bool:
        """True for a mean over both axes of images between quantizers, which has an integer operator."""
        dims = self.shapes.get(node.input[0])
        if node.op_type != "ReduceMean" or len(node.input) < 2 or dims is None or len(dims) != 4:
            return False
        axes = self.constants.get(node.input[1], np.zeros(0))
        is_static = not self._is_dynamic(self.quantized[node.input[0]])
        return is_static and {int(a) % 4 for a in axes} == {2, 3} and self._is_quantized_next(node.output[0])

    def _global_mean(self, node: Any) -> None:
        x, out = self._float_view(self.quantized[node.input[0]], node.name), node.output[0]
        if _attributes(node).get("keepdims", 1):
            self.builder.node("GlobalAveragePool", [x], node.name, output=out)
            return
        y = self.builder.node("GlobalAveragePool", [x], node.name)
        shape = self.builder.constant(f"{node.name}.shape", np.array([0, -1], np.int64))
        self.builder.node("Reshape", [y, shape], f"{node.name}.reshape", output=out)
        self.reshaped[out] = (y, shape)

    # --- layers -----------------------------------------------------------------------------------------

    def _layer(self, node: Any, layer: Layer) -> None:
        x, out = node.input[0], node.output[0]
        if layer.kind == "embedding":
            self._embedding(x, out, layer)
            return
        value = self.quantized.get(x)
        start = len(self.builder.nodes)
        form = storage(layer)
        grouped = layer.quantizer.format.granularity == "group"
        if form == "nbits":
            self._nbits(value.source if self._is_dynamic(value) and value else x, out, layer, value)
        elif value is None or grouped:
            reason = (
                "its input stays in float"
                if value is None
                else f"no integer operator takes weights of format {layer.quantizer.format}"
            )
            form = "float"
            self.notes.append((layer.name, f"{reason}: stored in {storage(layer)}, computed in float"))
            self._float(x, out, layer, _attributes(node)["rank"])
        elif layer.kind == "conv":
            self._conv(value, out, layer)
        elif not self._is_dynamic(value):
            self._gemm(value, out, layer, _attributes(node)["rank"])
        elif value.codes:
            self._matmul_dynamic(value, out, layer)
        else:
            self._matmul_token(value, out, layer)
        if form in ("int8", "int4", "table"):
            self.largest_code = max(self.largest_code, int(np.abs(codes_of(layer)[0]).max(initial=0)))
        self.forms[layer.name] = form
        self.products |= {node.name for node in self.builder.nodes[start:]}

    @staticmethod
    def _is_dynamic(value: _Codes | None) -> bool:
        return value is not None and value.entry.quantizer.format.is_dynamic

    def _operands(self, value: _Codes, layer: Layer) -> list[str]:
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

    def _conv(self, value: _Codes, out: str, layer: Layer) -> None:
        if not self._is_quantized_next(out):
            self._conv_to_float(value, out, layer)
            return
        x = self._float_view(value, layer.name)
        inputs = [x, *self._operands(value, layer)]
        self.builder.node("Conv", inputs, layer.name, output=out, **layer.geometry)

    def _is_quantized_next(self, out: str) -> bool:
        """True if every reader of a value is a quantizer, a bound in front of it aside."""
        readers = self.readers.get(out, [])
        return bool(readers) and all(
            reader.op_type == "Quantize"
            or (reader.op_type in ("Relu", "Clip") and self._is_quantized_next(reader.output[0]))
            for reader in readers
        )

    def _conv_to_float(self, value: _Codes, out: str, layer: Layer) -> None:
        """A convolution whose output stays in float: no fused operator does that, so its parts are written.

        ConvInteger takes u8 weights only: the codes are shifted by 128.
        """
        import onnx

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
        total = b.node("ConvInteger", [x, weight, x_zero, offset], name, **layer.geometry)
        x_scale, w_scale = value.entry.quantizer.scale.detach(), _tensor(scale)
        shape = (-1,) + (1,) * (layer.weight.ndim - 2)
        if layer.bias is not None:
            bias = integer_bias(layer.bias.detach(), x_scale, w_scale).numpy().reshape(shape)
            total = b.node("Add", [total, b.constant(f"{name}.bias", bias)], f"{name}.add_bias")
        real = b.node("Cast", [total], f"{name}.to_float", to=onnx.TensorProto.FLOAT)
        factor = (x_scale * w_scale).numpy().reshape(shape)
        b.node("Mul", [real, b.constant(f"{name}.factor", factor)], f"{name}.scaled", output=out)

    def _float_view(self, value: _Codes, name: str) -> str:
        parts = [value.codes, value.scale, value.zero_point]
        return self.builder.node("DequantizeLinear", parts, f"{name}.input")

    def _gemm(self, value: _Codes, out: str, layer: Layer, rank: int) -> None:
        """A linear layer as Gemm, on rows if the input has more axes: only Gemm takes the integer bias."""
        operands, name = self._operands(value, layer), layer.name
        if rank == 2:
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
        self.reshaped[out] = (y, shape)

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

    def _matmul_dynamic(self, value: _Codes, out: str, layer: Layer) -> None:
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

    def _matmul_token(self, value: _Codes, out: str, layer: Layer) -> None:
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

    def _nbits(self, x: str, out: str, layer: Layer, value: _Codes | None) -> None:
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
            domain=_MICROSOFT,
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
        """Look the codes up, then dequantize the rows that were asked for."""
        import onnx

        b, name = self.builder, layer.name
        self.forms[name] = storage(layer)
        if layer.quantizer.format.granularity == "group":
            b.node("Gather", [float_weight(b, layer), ids], name, output=out, axis=0)
            return
        codes, _, _, scale = integer_weight(b, layer)
        zero = layer.quantizer.zero_point.numpy().astype(np.float32)
        rows = b.node("Gather", [codes, ids], name, axis=0)
        value = b.node("Cast", [rows], f"{name}.to_float", to=onnx.TensorProto.FLOAT)
        for op, part in (("Sub", zero), ("Mul", scale)):
            if op == "Sub" and not zero.any():
                continue
            factor = b.constant(f"{name}.{op.lower()}", part.reshape(-1, 1) if len(part) > 1 else part)
            if len(part) > 1:
                factor = b.node("Gather", [factor, ids], f"{name}.{op.lower()}_rows", axis=0)
            value = b.node(op, [value, factor], f"{name}.{op.lower()}_all", output=out if op == "Mul" else "")

    # --- the end ----------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Drop what nothing reads and put the graph together."""
        import onnx

        wanted = {v.name for v in self.graph.output}
        kept: list[Any] = []
        for node in reversed(self.builder.nodes):
            if any(name in wanted for name in node.output):
                wanted.update(node.input)
                kept.append(node)
        initializers = [t for t in self.graph.initializer if t.name in wanted]
        initializers += [t for name, t in self.builder.constants.items() if name in wanted]
        del self.graph.node[:], self.graph.initializer[:], self.graph.value_info[:]
        self.graph.node.extend(reversed(kept))
        self.graph.initializer.extend(initializers)
        for message in [*self.graph.node, *self.graph.initializer, *self.graph.input, *self.graph.output]:
            del message.metadata_props[:]  # the exporter's notes: stack traces with paths of this machine
        del self.graph.metadata_props[:]
        version = next(o.version for o in self.proto.opset_import if o.domain == "")
        del self.proto.opset_import[:]
        self.proto.opset_import.append(onnx.helper.make_opsetid("", version))
        if any(node.domain == _MICROSOFT for node in kept):
            self.proto.opset_import.append(onnx.helper.make_opsetid(_MICROSOFT, 1))


def _attributes(node: Any) -> dict[str, Any]:
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
