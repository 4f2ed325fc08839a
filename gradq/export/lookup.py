"""Embeddings in a file: codes are looked up, and the rows that were asked for are dequantized."""

from __future__ import annotations

import numpy as np

from gradq.export.nodes import MICROSOFT, Layer
from gradq.export.weights import Builder, codes_of, float_weight, integer_weight, storage

__all__ = ["takes_one_operator", "write_lookup", "write_standard_lookup"]

_SMALLEST_BLOCK = 16


def _block(layer: Layer) -> int:
    """Elements that share a scale, as the operator counts them: a power of two, a whole row or more."""
    fmt, width = layer.quantizer.format, layer.weight.shape[1]
    if fmt.granularity == "group":
        return fmt.group_size
    return max(_SMALLEST_BLOCK, 1 << (width - 1).bit_length())


def takes_one_operator(layer: Layer) -> bool:
    """True if GatherBlockQuantized takes a table: uniform, symmetric, a scale a row or a group."""
    fmt, block = layer.quantizer.format, _block(layer)
    fits = block >= _SMALLEST_BLOCK and block & (block - 1) == 0
    return fits and fmt.is_uniform and fmt.symmetric and fmt.granularity != "tensor"


def write_lookup(builder: Builder, layer: Layer, ids: str, out: str) -> str:
    """One operator; four standard ones take longer than the product behind them.

    Args:
        builder: the collection of nodes and constants, added to.
        layer: a table for which `takes_one_operator` holds.
        ids: name of the ids.
        out: name of the rows.

    Returns:
        The form of the weight: ``int8`` or ``int4``.
    """
    codes, scale, _ = codes_of(layer)
    narrow = layer.quantizer.format.bits <= 4
    stored = codes if narrow else (codes + 128).astype(np.uint8)
    inputs = [
        builder.constant(f"{layer.name}.codes", stored, packed="INT4" if narrow else ""), ids,
        builder.constant(f"{layer.name}.scale", scale.reshape(len(codes), -1)),
    ]  # fmt: skip
    builder.node(
        "GatherBlockQuantized", inputs, layer.name, output=out, domain=MICROSOFT, gather_axis=0,
        quantize_axis=1, block_size=_block(layer), bits=4 if narrow else 8,
    )  # fmt: skip
    return "int4" if narrow else "int8"


def write_standard_lookup(builder: Builder, layer: Layer, ids: str, out: str) -> str:
    """The same in standard operators, for every format.

    Args:
        builder: the collection of nodes and constants, added to.
        layer: the table.
        ids: name of the ids.
        out: name of the rows.

    Returns:
        The form of the weight.
    """
    import onnx

    b, name = builder, layer.name
    if layer.quantizer.format.granularity == "group":
        b.node("Gather", [float_weight(b, layer), ids], name, output=out, axis=0)
        return storage(layer)
    codes, scale_name, zero_name, scale = integer_weight(b, layer)
    rows = b.node("Gather", [codes, ids], name, axis=0)
    if len(scale) == 1:
        b.node("DequantizeLinear", [rows, scale_name, zero_name], f"{name}.dequantize", output=out)
        return storage(layer)
    zero = layer.quantizer.zero_point.numpy().astype(np.float32)
    value = b.node("Cast", [rows], f"{name}.to_float", to=onnx.TensorProto.FLOAT)
    for op, part in (("Sub", zero), ("Mul", scale)):
        if op == "Sub" and not zero.any():
            continue
        factor = b.constant(f"{name}.{op.lower()}", part.reshape(-1, 1))
        factor = b.node("Gather", [factor, ids], f"{name}.{op.lower()}_rows", axis=0)
        value = b.node(op, [value, factor], f"{name}.{op.lower()}_all", output=out if op == "Mul" else "")
    return storage(layer)
