"""What ONNX Runtime made of a graph: operators after its optimizations, and what is left in float."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradq.errors import ExportError
from gradq.export.runtime import metadata_of, session

__all__ = ["FLOAT_PRODUCTS", "Operators", "operators"]

# fmt: off
FLOAT_PRODUCTS = frozenset({
    "Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "NhwcFusedConv", "FusedGemm", "FusedMatMul",
    "Einsum", "TransposeMatMul",
})
# Operators that are exact in integers, or the same single float operation in every implementation.
_EXACT = frozenset({
    "QLinearConv", "QGemm", "QLinearMatMul", "QLinearAdd", "ConvInteger", "MatMulInteger", "QuantizeLinear",
    "DequantizeLinear", "MaxPool", "NhwcMaxPool", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze",
    "Identity", "Slice", "Split", "Clip", "Shape", "Concat", "Gather", "Cast", "Constant", "Pad", "Relu",
    "Add", "Sub", "Mul", "QLinearGlobalAveragePool", "Expand", "DepthToSpace",
    "GatherBlockQuantized",
})
# fmt: on


@dataclass(frozen=True)
class Operators:
    """The optimized graph of a file on this processor.

    Attributes:
        counts: operator → how many.
        float_products: names of float matrix products and convolutions that read a weight.
        activation_products: number of products of two activations (attention).
        unexpected: those of `float_products` that the export did not announce, with what feeds their weight.
        inexact: operators whose float arithmetic may differ from torch's in the last bit, those included that
            the runtime computed once at load, on constants.
    """

    counts: dict[str, int]
    float_products: list[str]
    activation_products: int
    unexpected: list[str]
    inexact: list[str]


def operators(path: str | os.PathLike[str]) -> Operators:
    """Load a file into ONNX Runtime and read the graph it will run.

    Raises:
        ExportError: the file cannot be loaded, or its metadata is damaged.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session(path, optimized=optimized)
        graph = onnx.load(str(optimized)).graph
    facts = metadata_of(path)
    constants = {t.name for t in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    counts = Counter(node.op_type for node in graph.node)
    products, unexpected, between = [], [], 0
    for node in graph.node:
        if node.op_type not in FLOAT_PRODUCTS:
            continue
        weights = [_origin(name, producers) for name in node.input[:2]]
        if not any(origin in constants for origin, _ in weights):
            between += 1
            continue
        products.append(node.name or node.output[0])
        if any(through and origin in constants for origin, through in weights):
            unexpected.append(f"{products[-1]} ({node.op_type} on a dequantized weight)")
    try:
        announced = int(facts.get("gradq.float_products", "0"))
        names = {name for name, _ in json.loads(facts.get("gradq.float_islands", "[]"))}
    except (ValueError, TypeError) as error:
        raise ExportError(f"{path}: gradq's metadata in it is damaged: {error}; export it again") from error
    if len(products) > announced and not unexpected:
        unexpected = [p for p in products if not any(p.startswith(n) for n in names)] or products
    return Operators(
        counts=dict(counts),
        float_products=products,
        activation_products=between,
        unexpected=unexpected,
        inexact=sorted((set(counts) | _folded(path)) - _EXACT),
    )


def _folded(path: str | os.PathLike[str]) -> set[str]:
    """Operators of the file that depend on no input of the model."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    free = {value.name for value in graph.input}
    found = set()
    for node in graph.node:
        if any(name in free for name in node.input):
            free.update(node.output)
        else:
            found.add(node.op_type)
    return found


def _origin(name: str, producers: dict[str, Any]) -> tuple[str, bool]:
    """Where a value comes from, looking through DequantizeLinear; and whether there was one."""
    through = False
    while name in producers and producers[name].op_type in ("DequantizeLinear", "Cast", "Transpose"):
        through = through or producers[name].op_type == "DequantizeLinear"
        name = producers[name].input[0]
    return name, through
