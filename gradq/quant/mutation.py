"""In-place statements: whoever reads a tensor after it was changed in place reads the result of the change.

fx records ``h.add_(x)`` as a node that nobody reads and lets later readers of ``h`` point to the old value.
The example is run once; which values change while which node runs is read from torch's version counters, so
modules, functions and methods are all seen, and views with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from gradq.errors import TraceError
from gradq.quant.batches import evaluating

__all__ = ["functionalize", "line_of"]

_HERE, _TORCH = str(Path(__file__).parent), str(Path(torch.__file__).parent)


def functionalize(traced: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
    """Let every reader of a changed tensor read the change, in place.

    Args:
        traced: the graph.
        inputs: example inputs, in the order of its placeholders; untouched.

    Raises:
        TraceError: a view of the tensor is read later, or a parameter or buffer is changed; the message names
            the line and a form that works.
    """
    changes = _changes(traced, inputs)
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    for node, changed in changes.items():
        read_later = [m for m in changed if m is not node and _later(m, node, order)]
        state = [m for m in changed if m.op == "get_attr"]
        target = node.all_input_nodes[0] if node.all_input_nodes else None
        whole = [m for m in read_later if m is target]
        if state or (read_later and read_later != whole) or (whole and not changes[node].get(node, False)):
            what = (
                state[0]
                if state
                else next(m for m in read_later if m is not target or not changes[node].get(node))
            )
            raise TraceError(
                f"{line_of(node)} changes {what.name} in place, and "
                + ("it is a parameter or buffer of the model" if state else "a view of it is read later")
                + "; write it without the change in place: y = y + x instead of y.add_(x), torch.where or "
                "torch.cat instead of an assignment to a part, or leave the module that holds the "
                "line in float with "
                "Config(skip=(name,))"
            )
        for value in whole:
            for user in [u for u in value.users if order[u] > order[node]]:
                user.replace_input_with(value, node)
    traced.recompile()


def _later(value: fx.Node, node: fx.Node, order: dict[fx.Node, int]) -> bool:
    return any(order[user] > order[node] for user in value.users)


def _changes(traced: fx.GraphModule, inputs: tuple[Any, ...]) -> dict[fx.Node, dict[fx.Node, bool]]:
    """Node → what it changes in place; for itself whether it returns the very tensor it changed."""
    found: dict[fx.Node, dict[fx.Node, bool]] = {}
    values: dict[fx.Node, Tensor] = {}

    class Watcher(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            before = {m: v._version for m, v in values.items()}
            out = super().run_node(n)
            changed = {m: True for m, v in values.items() if v._version != before[m]}
            if changed:
                first = n.all_input_nodes[0] if n.all_input_nodes else None
                same = (
                    isinstance(out, Tensor) and first in values and out.shape == values[first].shape
                    and out.data_ptr() == values[first].data_ptr()
                )  # fmt: skip
                found[n] = {**changed, n: same}
            if isinstance(out, Tensor):
                values[n] = out
            return out

    copied = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), inputs)
    with evaluating(traced):
        Watcher(traced, garbage_collect_values=False).run(*copied)
    return found


def line_of(node: fx.Node) -> str:
    """``file:line`` of a node in the user's code, or the node itself."""
    trace = node.stack_trace or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    for i in range(len(lines) - 1, -1, -1):
        if lines[i].startswith("File ") and not any(part in lines[i] for part in (_TORCH, _HERE)):
            parts = lines[i].split(", ")
            source = lines[i + 1] if i + 1 < len(lines) else ""
            return f"{parts[0][5:].strip(chr(34))}:{parts[1].removeprefix('line ')}: {source}"
    return node.format_node() or node.name
