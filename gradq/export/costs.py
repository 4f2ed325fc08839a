"""What a file's time goes into, by ONNX Runtime's profile: what stays in float is listed with its cost."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradq.export.inspect import FLOAT_PRODUCTS
from gradq.export.runtime import session

__all__ = ["Cost", "costs"]

_CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast"})
_INTEGER = ("QLinear", "QGemm", "MatMulInteger", "DynamicQuantize", "ConvInteger", "QAttention",
            "MatMulNBits", "GatherBlockQuantized")  # fmt: skip
_MOVES = frozenset({
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "MaxPool", "NhwcMaxPool", "Slice", "Split",
    "Expand", "Identity", "DepthToSpace", "Pad", "Gather", "Concat", "Shape", "ReorderInput",
    "ReorderOutput",
})  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """A part of the time of a call.

    Attributes:
        name: the operator; of a float product with a weight also the layer.
        nodes: number of nodes that are counted.
        share: part of the time of all operators, 0 to 1.
        kind: ``integers``, ``float``, ``conversion`` between the two, or ``moving`` elements.
    """

    name: str
    nodes: int
    share: float
    kind: str


def costs(
    path: str | os.PathLike[str], inputs: Mapping[str, Any], *, threads: int = 1, seconds: float = 0.5
) -> list[Cost]:
    """Profile a file.

    Args:
        path: the file.
        inputs: arrays by the session's names.
        threads: threads inside an operator.
        seconds: time for which it is called.

    Returns:
        The costliest first. Operators of a kind are taken together, float products with a weight are not.

    Raises:
        ExportError: the file cannot be loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        running = session(path, threads=threads, profile=Path(folder) / "profile", optimized=optimized)
        layers = _layers(path, optimized)
        for _ in range(2):  # buffers are made in the first calls
            running.run(None, dict(inputs))
        end, calls = time.perf_counter() + seconds, 0
        while calls < 3 or time.perf_counter() < end:
            running.run(None, dict(inputs))
            calls += 1
        events = json.loads(Path(running.end_profiling()).read_text())
    spent: Counter[str] = Counter()
    nodes: dict[str, set[str]] = {}
    kinds: dict[str, str] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        operator, node = event["args"]["op_name"], event["name"].removesuffix("_kernel_time")
        name = f"{operator} of {layers[node]}" if node in layers else operator
        spent[name] += event["dur"]
        nodes.setdefault(name, set()).add(node)
        kinds[name] = _kind(operator)
    total = sum(spent.values()) or 1
    return [Cost(name, len(nodes[name]), us / total, kinds[name]) for name, us in spent.most_common()]


def _layers(path: str | os.PathLike[str], optimized: Path) -> dict[str, str]:
    """Node → the layer whose weight it multiplies by, of float products; those of activations are left out.

    The runtime may store a weight in another order under another name; the bias keeps its name, and the node
    that of its output.
    """
    import onnx

    graph, given = onnx.load(str(optimized)).graph, onnx.load(str(path), load_external_data=False).graph
    held, named = {t.name for t in graph.initializer}, {t.name for t in given.initializer}
    by_output = {out: n for node in given.node for out in node.output for n in node.input if n in named}
    found = {}
    for node in graph.node:
        if node.op_type not in FLOAT_PRODUCTS or not any(name in held for name in node.input[:2]):
            continue
        parameter = next((name for name in node.input if name in named), None)
        parameter = parameter or by_output.get(node.name.removesuffix("_nchwc"), node.name)
        found[node.name] = parameter.rpartition(".")[0] or parameter
    return found


def _kind(operator: str) -> str:
    if operator in _CONVERSIONS:
        return "conversion"
    if operator in _MOVES:
        return "moving"
    return "integers" if operator.startswith(_INTEGER) else "float"
