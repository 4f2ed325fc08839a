"""`gradq.quant.QuantLSTM` in a file: ONNX Runtime's DynamicQuantizeLSTM, a node a layer.

Shapes: T steps, B batch, I input size, H hidden size, D directions. torch has the gates' rows in the order
input, forget, cell, output; ONNX in the order input, output, forget, cell, and its weights lie turned,
(D, I, 4H).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradq.export.nodes import DOMAIN, MICROSOFT
from gradq.export.weights import Builder, stored_codes
from gradq.quant.fake import WeightQuant
from gradq.quant.lstm import QuantLSTM

__all__ = ["Recurrence", "emit_lstm", "recurrence_of", "write_lstm"]

_GATES = (0, 3, 1, 2)  # torch's number of each of ONNX's gates
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Recurrence:
    """One layer of a recurrent module in the graph.

    Attributes:
        name: qualified name of the module, and the layer's number.
        hidden_size: H.
        weights: pairs (weight, quantizer), one a direction: those for the input, and those for the hidden
            state.
        bias: (D, 8H) fp32 in ONNX's order, or None.
    """

    name: str
    hidden_size: int
    weights: tuple[list[tuple[Tensor, WeightQuant]], list[tuple[Tensor, WeightQuant]]]
    bias: Array | None


def recurrence_of(module: QuantLSTM, layer: int) -> Recurrence:
    """What the file has of a module's layer; parameters have their values."""
    suffixes = module.suffixes(layer)
    name = module.weight_quant.name.rpartition(".")[0]

    def weights(key: str) -> list[tuple[Tensor, WeightQuant]]:
        return [(getattr(module, key + s), module.quantizer(key + s)) for s in suffixes]

    bias = None
    if module.bias:
        keys = ("bias_ih", "bias_hh")
        rows = [_in_order(getattr(module, key + s).detach().numpy()) for s in suffixes for key in keys]
        bias = np.concatenate(rows).reshape(len(suffixes), -1)
    return Recurrence(
        f"{name}.l{layer}", module.hidden_size, (weights("weight_ih"), weights("weight_hh")), bias
    )


def emit_lstm(index: int, x: Tensor, hx: tuple[Tensor, Tensor] | None, directions: int, hidden: int) -> Any:
    """The opaque node: (T, B, D·H), (D, B, H), (D, B, H)."""
    T, B = x.shape[:2]
    states = (directions, B, hidden)
    y, h, c = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::Recurrence", [x, *(hx or ())], {"index": index}, dtypes=[x.dtype] * 3,
        shapes=[(T, directions, B, hidden), states, states], version=1,
    )  # fmt: skip
    if directions == 1:
        return y.squeeze(1), h, c
    return y.transpose(1, 2).reshape(T, B, directions * hidden), h, c


def write_lstm(builder: Builder, node: Any, layer: Recurrence) -> int:
    """Write an opaque node out.

    Returns:
        The largest magnitude of a code.
    """
    largest, parts = 0, []
    for key, given in zip(("ih", "hh"), layer.weights, strict=True):
        codes = np.stack([_in_order(q.quantize(w.detach()).numpy()) for w, q in given])
        scale = np.stack([_in_order(_per_channel(q, codes.shape[1])) for _, q in given])
        name = f"{layer.name}.{key}"
        turned = np.ascontiguousarray(codes.transpose(0, 2, 1))
        bits = max(q.format.bits if q.format.is_uniform else 8 for _, q in given)
        parts.append((
            stored_codes(builder, f"{name}.codes", turned, bits),
            builder.constant(f"{name}.scale", scale),
            builder.constant(f"{name}.zero_point", np.zeros(scale.shape, np.int8)),
        ))  # fmt: skip
        largest = max(largest, int(np.abs(codes).max(initial=0)))
    x, *states = node.input
    bias = "" if layer.bias is None else builder.constant(f"{layer.name}.bias", layer.bias)
    (w, w_scale, w_zero), (r, r_scale, r_zero) = parts
    builder.nodes_out(
        "DynamicQuantizeLSTM",
        [x, w, r, bias, "", *(states or ["", ""]), "", w_scale, w_zero, r_scale, r_zero],
        layer.name, 3, outputs=list(node.output), domain=MICROSOFT, hidden_size=layer.hidden_size,
        direction="bidirectional" if len(layer.weights[0]) == 2 else "forward",
    )  # fmt: skip
    return largest


def _per_channel(quantizer: WeightQuant, rows: int) -> Array:
    scale = quantizer.scale.detach().numpy()
    return np.broadcast_to(scale, (rows,)) if len(scale) == 1 else scale


def _in_order(rows: Array) -> Array:
    """Rows of torch's four gates in ONNX's order."""
    gates = np.split(rows, 4)
    return np.concatenate([gates[i] for i in _GATES])
