"""The form of QDQ that TensorRT takes, for INT8 on a GPU: alone, or behind ONNX Runtime's TensorRT provider.

TensorRT fuses ``DequantizeLinear → operator → QuantizeLinear`` itself and is strict about what stands around
the operator (NVIDIA, "Explicit Quantization", TensorRT documentation):

* activations and weights s8 and symmetric, zero points 0; or both e4m3 (``fp8``), for GPUs that multiply it;
* biases in float: it has no INT32 to dequantize;
* nothing but ``DequantizeLinear`` reads codes: pooling and reshaping stand behind it; TensorRT moves them.

Not run on a GPU by us: the structure is tested, and the numbers in ONNX Runtime on a CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gradq.errors import ExportError
from gradq.export.capture import Captured
from gradq.export.lookup import write_standard_lookup
from gradq.export.lower import MOVES, Lowered, Lowering
from gradq.export.lower_layers import attributes_of
from gradq.export.lstm import Recurrence
from gradq.export.nodes import Layer, Quantizer
from gradq.export.weights import codes_of
from gradq.quant.formats import Format

__all__ = ["lower_for_tensorrt"]


def lower_for_tensorrt(captured: Captured) -> Lowered:
    """Replace every opaque node, in place in the captured model.

    Raises:
        ExportError: a format that TensorRT does not take; the tensor is named.
    """
    return _TensorRT(captured).run()


class _TensorRT(Lowering):
    def __init__(self, captured: Captured) -> None:
        super().__init__(captured)
        self.dequantized: set[str] = set()

    def _quantize(self, node: Any, entry: Quantizer) -> None:
        fmt, out, name = entry.quantizer.format, node.output[0], f"{entry.name}.quant"
        if fmt.is_dynamic or not fmt.symmetric or fmt.bits != 8:  # fp8 is static and symmetric
            raise ExportError(
                f"{entry.name} has the format {fmt}; TensorRT takes static symmetric 8-bit activations: "
                "prepare with quant.Config.for_target('gpu')"
            )
        scale = self.builder.constant(f"{name}.scale", entry.quantizer.scale.detach().numpy().reshape(()))
        zero = self._codes(f"{name}.zero_point", np.zeros((), np.int8), fmt)
        codes = self.builder.node("QuantizeLinear", [node.input[0], scale, zero], name)
        self.builder.node("DequantizeLinear", [codes, scale, zero], f"{name}.dequantize", output=out)
        self.dequantized.add(out)

    def _pass_token(self, node: Any) -> None:
        """Moved values are still those of their quantizer."""
        if node.input and node.input[0] in self.dequantized and node.op_type in MOVES:
            self.dequantized.update(node.output)

    def _layer(self, node: Any, layer: Layer) -> None:
        x, out, name, b = node.input[0], node.output[0], layer.name, self.builder
        fmt = layer.quantizer.format
        if layer.kind == "embedding" and fmt.is_float8:
            raise ExportError(f"{name} is an embedding in fp8; leave Config.embeddings at 'int8', or None")
        known = fmt.is_uniform or fmt.is_float8
        if not known or not fmt.symmetric or fmt.granularity == "group" or fmt.bits <= 4:
            raise ExportError(
                f"{name} has the format {fmt}; TensorRT takes symmetric weights of 8 bits with a scale a "
                "tensor or a channel: prepare with quant.Config.for_target('gpu')"
            )
        if layer.kind == "embedding":
            self.forms[name] = write_standard_lookup(b, layer, x, out)
            return
        start = len(b.nodes)
        bias = [] if layer.bias is None else [b.constant(f"{name}.bias", layer.bias.detach().numpy())]
        rank = attributes_of(node)["rank"]
        if layer.kind == "conv" or rank == 2:
            weight = self._dequantized(layer)
            kind, more = ("Conv", layer.geometry) if layer.kind == "conv" else ("Gemm", {"transB": 1})
            b.node(kind, [x, weight, *bias], name, output=out, **more)
        else:
            y = b.node("MatMul", [x, self._dequantized(layer, turned=True)], name, output="" if bias else out)
            if bias:
                b.node("Add", [y, *bias], f"{name}.add_bias", output=out)
        quantized = x in self.dequantized
        if not quantized:
            self.notes.append((name, f"its input stays in float: stored in {fmt.kind}8, computed in float"))
        self.forms[name] = f"{fmt.kind}8" if quantized else "float"
        if fmt.is_uniform:
            self.largest_code = max(self.largest_code, int(np.abs(codes_of(layer)[0]).max(initial=0)))
        self.products |= {made.name for made in b.nodes[start:]}

    def _recurrence(self, node: Any, layer: Recurrence) -> None:
        raise ExportError(
            f"{layer.name}: TensorRT has no integer LSTM; prepare with quant.Config.for_target('gpu'), which "
            "leaves it in float"
        )

    def _dequantized(self, layer: Layer, *, turned: bool = False) -> str:
        """The weight (O, …), or (I, O) if turned, with a scale an output or one for all."""
        fmt, name = layer.quantizer.format, layer.name
        codes, scale, _ = codes_of(layer)
        shape = () if len(scale) == 1 else (len(scale),)
        axis: dict[str, Any] = {"axis": int(turned)} if shape else {}
        parts = [
            self._codes(f"{name}.codes", np.ascontiguousarray(codes.T if turned else codes), fmt),
            self.builder.constant(f"{name}.scale", scale.reshape(shape)),
            self._codes(f"{name}.zero_point", np.zeros(shape, np.int8), fmt),
        ]
        return self.builder.node("DequantizeLinear", parts, f"{name}.dequantize", **axis)

    def _codes(self, name: str, codes: np.ndarray[Any, Any], fmt: Format) -> str:
        """A constant of codes: s8, or e4m3 by its bits."""
        if fmt.is_float8:
            return self.builder.constant(name, codes, packed="FLOAT8E4M3FN")
        return self.builder.constant(name, codes.astype(np.int8))
