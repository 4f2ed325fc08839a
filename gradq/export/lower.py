"""Writes the opaque nodes of a captured graph out as ONNX: QDQ by the recipe for ONNX Runtime.

* An activation is quantized once, at its source: ``QuantizeLinear``. What only moves elements (reshape, max
  pooling, …) runs on the codes; every reader gets them through ``DequantizeLinear``.
* Layers: see `gradq.export.lower_layers`.
* A ReLU in front of a quantizer is a bound on the codes: nothing if saturation implies it.

The runtime replaces ``DQ → Conv → Q`` by QLinearConv, ``DQ → Gemm`` by QGemm and so on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gradq.errors import ExportError
from gradq.export.capture import Captured
from gradq.export.lower_layers import Bound, Codes, LayerLowering, attributes_of
from gradq.export.lstm import Recurrence, write_lstm
from gradq.export.nodes import DOMAIN, MICROSOFT, Quantizer
from gradq.quant.integer import saturation

__all__ = ["MOVES", "Lowered", "Lowering", "lower"]

# fmt: off
MOVES = frozenset({
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "MaxPool", "Slice", "Split", "Expand",
    "Identity", "DepthToSpace", "Pad", "Gather", "Resize",
})
# fmt: on


@dataclass
class Lowered:
    """The finished graph.

    Attributes:
        proto: the ONNX model.
        forms: layer name → how it computes (``int8``, ``int4``, ``table``, ``nbits``, ``float``).
        notes: (name, reason) of quantized layers that compute in float, or otherwise than simulated.
        products: names of the nodes that multiply by a quantized layer's weight.
        largest_code: largest magnitude of a weight in an integer kernel; above 64 a processor without VNNI
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
    return Lowering(captured).run()


class Lowering(LayerLowering):
    """A whole graph.

    Args:
        captured: the graph with opaque nodes; changed in place.
    """

    def run(self) -> Lowered:
        """Replace every opaque node."""
        import onnx

        for node in self.graph.node:
            self.builder.unique(node.name)
        for tensor in self.graph.initializer:
            self.builder.unique(tensor.name)
            if len(tensor.dims) == 0 or max(tensor.dims, default=0) <= 8:
                self.constants[tensor.name] = onnx.numpy_helper.to_array(tensor)
        for node in self.graph.node:
            if node.output and node.output[0] in self.written:
                continue
            if node.domain == DOMAIN:
                entry = self.entries[attributes_of(node)["index"]]
                if isinstance(entry, Quantizer):
                    self._quantize(node, entry)
                elif isinstance(entry, Recurrence):
                    self._recurrence(node, entry)
                elif entry.subpixel is None:
                    self._layer(node, entry)
                else:
                    self._transposed(node, entry)
            elif node.input and node.input[0] in self.quantized and self._is_move(node):
                self._move(node)
            elif node.input and node.input[0] in self.quantized and self._is_global_mean(node):
                self._global_mean(node)
            elif node.op_type == "Sub" and self._is_difference(node):
                self._difference(node)
            elif node.op_type == "HardSigmoid" and self._is_integer_gate(node):
                self._integer_gate(node)
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
            self.clips[node.output[0]] = Bound(node.input[0], low, high)

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
        clip = self.clips.get(source, Bound(source, None, None))
        low, high = saturation(entry.quantizer, clip.low, clip.high)
        value, shuffles = self.reshaped.get(clip.source, (clip.source, ()))
        codes = self.builder.node("QuantizeLinear", [value, scale, zero], name)
        limits = np.iinfo(dtype)
        if low > limits.min or high < limits.max:
            ends = [
                self.builder.constant(f"{name}.{end}", np.array(bound, dtype))
                for end, bound in (("low", low), ("high", high))
            ]
            codes = self.builder.node("Clip", [codes, *ends], f"{name}.clip")
        for op, inputs, attributes in shuffles:
            codes = self.builder.node(op, [codes, *inputs], f"{name}.{op.lower()}", **attributes)
        self._offer(Codes(codes, scale, zero, entry, source), out)

    def _quantize_dynamic(self, source: str, out: str, entry: Quantizer) -> None:
        fmt = entry.quantizer.format
        if fmt.range == "token":
            # each reader writes its own arithmetic; nothing is shared but the name
            self.quantized[out] = Codes("", "", "", entry, source)
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
        self._offer(Codes(codes, scale, zero, entry, source), out)

    def _pass_token(self, node: Any) -> None:
        """Tokens are quantized by their readers: a moved value still is to be."""
        value = self.quantized.get(node.input[0]) if node.input else None
        if value is not None and not value.codes and node.op_type in MOVES:
            for out in node.output:
                self.quantized[out] = replace(value, source=out)

    def _offer(self, value: Codes, out: str) -> None:
        """Make codes available under their float name."""
        self.builder.node(
            "DequantizeLinear",
            [value.codes, value.scale, value.zero_point],
            f"{out}.dequantize",
            output=out,
        )
        self.quantized[out] = value

    def _is_move(self, node: Any) -> bool:
        if node.op_type not in MOVES or not self.quantized[node.input[0]].codes:
            return False
        if node.op_type == "Pad":
            fill = node.input[2] if len(node.input) > 2 else ""
            mode = attributes_of(node).get("mode", b"constant")
            return mode != b"constant" or not fill or not np.any(self.constants.get(fill, 1))
        if node.op_type == "Resize":
            return bool(attributes_of(node).get("mode", b"nearest") == b"nearest")
        return node.op_type != "MaxPool" or len(node.output) == 1

    def _move(self, node: Any) -> None:
        """Run a moving operation on the codes."""
        value = self.quantized[node.input[0]]
        inputs = [value.codes, *node.input[1:]]
        attributes = attributes_of(node)
        if node.op_type == "Pad" and attributes.get("mode", b"constant") == b"constant":
            inputs = [value.codes, node.input[1], value.zero_point, *node.input[3:]]
        codes = self.builder.nodes_out(
            node.op_type, inputs, f"{node.name}.codes", len(node.output), **attributes
        )
        unpadded = self._spatial_zeros(node, value) if node.op_type == "Pad" else None
        for moved, out in zip(codes, node.output, strict=True):
            self._offer(replace(value, codes=moved, moved=True, unpadded=unpadded), out)

    def _spatial_zeros(self, node: Any, value: Codes) -> tuple[str, tuple[int, ...]] | None:
        """What a convolution may do instead of a Pad: zeros around the spatial axes, as it pads itself."""
        ends = self.constants.get(node.input[1])
        axes = len(node.input) > 3 and node.input[3]
        if axes or ends is None or attributes_of(node).get("mode", b"constant") != b"constant":
            return None
        rank = len(ends) // 2
        begin, end = ends[:rank], ends[rank:]
        if rank < 3 or (ends < 0).any() or begin[:2].any() or end[:2].any():
            return None
        return value.codes, tuple(int(n) for n in (*begin[2:], *end[2:]))

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
        if attributes_of(node).get("keepdims", 1):
            self.builder.node("GlobalAveragePool", [x], node.name, output=out)
            return
        y = self.builder.node("GlobalAveragePool", [x], node.name)
        shape = self.builder.constant(f"{node.name}.shape", np.array([0, -1], np.int64))
        self.builder.node("Reshape", [y, shape], f"{node.name}.reshape", output=out)
        self.reshaped[out] = (y, (("Reshape", [shape], {}),))

    def _is_difference(self, node: Any) -> bool:
        """True for a subtraction of static codes in front of a quantizer."""
        given = [self.quantized.get(name) for name in node.input]
        static = all(value is not None and value.codes and not self._is_dynamic(value) for value in given)
        return static and self._is_quantized_next(node.output[0])

    def _difference(self, node: Any) -> None:
        """As the integer addition of the second operand's codes with a negative scale: none subtracts."""
        left, right = (self.quantized[name] for name in node.input)
        negative = -right.entry.quantizer.scale.detach().numpy().reshape(())
        scale = self.builder.constant(f"{node.name}.negative", negative)
        x, y = self._float_view(left, node.name), self._float_view(replace(right, scale=scale), node.name)
        self.builder.node("Add", [x, y], node.name, output=node.output[0])

    def _is_integer_gate(self, node: Any) -> bool:
        """True for ``clip(x/6 + 1/2, 0, 1)`` between static quantizers."""
        value, given = self.quantized.get(node.input[0]), attributes_of(node)
        if value is None or not value.codes or self._is_dynamic(value):
            return False
        usual = abs(given.get("alpha", 0.2) - 1 / 6) < 1e-6 and given.get("beta", 0.5) == 0.5
        return bool(usual) and self._is_quantized_next(node.output[0])

    def _integer_gate(self, node: Any) -> None:
        """As an integer addition: the codes with a sixth of their scale, and the constant 1/2.

        The quantizer behind it bounds the sum; a clip in front of it is noted as for ReLU.
        """
        value, name, b = self.quantized[node.input[0]], node.name, self.builder
        sixth = (value.entry.quantizer.scale.detach() / 6).numpy().reshape(())
        dtype = np.int8 if value.entry.quantizer.format.symmetric else np.uint8
        parts = [value.codes, b.constant(f"{name}.sixth", sixth), value.zero_point]
        x = b.node("DequantizeLinear", parts, f"{name}.input")
        half = [
            b.constant(f"{name}.{key}", v)
            for key, v in (("one", np.array(1, dtype)), ("half", np.array(0.5, np.float32)),
                           ("zero", np.array(0, dtype)))
        ]  # fmt: skip
        y = b.node("Add", [x, b.node("DequantizeLinear", half, f"{name}.constant")], name)
        low, high = (b.constant(f"{name}.{k}", np.array(v, np.float32)) for k, v in (("low", 0), ("high", 1)))
        b.node("Clip", [y, low, high], f"{name}.clip", output=node.output[0])
        self.clips[node.output[0]] = Bound(y, 0.0, 1.0)

    def _recurrence(self, node: Any, layer: Recurrence) -> None:
        start = len(self.builder.nodes)
        self.largest_code = max(self.largest_code, write_lstm(self.builder, node, layer))
        self.forms[layer.name] = "int8"
        self.products |= {made.name for made in self.builder.nodes[start:]}

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
        if any(node.domain == MICROSOFT for node in kept):
            self.proto.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
