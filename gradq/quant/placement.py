"""Where quantizers go: exactly one on each activation tensor that integer kernels read or write.

The rules, over the graph after batch norm is folded and layers are swapped:

1. The *source* of a tensor is found by walking back through operations that only move elements (reshape,
   dropout, max pooling, padding with zeros, …): they keep the codes, so the tensor is quantized once, at its
   source. ReLU and its like belong to the layer before them: the quantizer stands behind them.
2. The sources that weight layers read are quantized.
3. A convolution's output is quantized, unless it only reaches the model's output: with a float output no
   fused kernel exists, and INT8 is slower than float.
4. ``full`` placement quantizes every source that additions, concatenations, poolings and activation functions
   read, and every reader gets the quantized values; subtractions of two tensors likewise, where an operator
   of this kind or a weight layer reads the difference. ``matmul`` placement quantizes for weight layers only.
5. ``auto`` is ``full`` for models without attention and layer norm. With them it goes by region: an addition,
   pooling, concatenation or product whose operands all come from convolutions (through operations of this
   kind) is computed in integers; around linear layers only what they read is quantized, which is faster and
   more accurate for attention.
6. What only reaches the model's output stays in float.
7. A constant (computed from parameters and numbers alone: a mask, positions, a mean to subtract) is no
   activation: it is never quantized, and what combines it with an activation computes in float.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from gradq.quant.config import Config
from gradq.quant.fake import ActQuant
from gradq.quant.formats import Format
from gradq.quant.operators import (
    ADDS,
    ATTENTION,
    CLIPS,
    FUNCTIONS,
    INTEGER_FUNCTIONS,
    POOLS,
    SUBTRACTIONS,
    behind_clips,
    constants,
    matches,
    moves,
    only_leaves,
    source_of,
    weight_layer,
)

__all__ = ["has_attention", "place_activations"]


def has_attention(traced: fx.GraphModule) -> bool:
    """True if the model attends or normalizes layers: then additions and functions are placed by region."""
    return any(matches(node, traced, ATTENTION) for node in traced.graph.nodes)


@dataclass
class _Plan:
    """What is to be quantized.

    Attributes:
        formats: source → format.
        everyone: sources whose every reader gets the quantized values.
        edges: (source, the value read, reader) of the others.
    """

    formats: dict[fx.Node, Format] = field(default_factory=dict)
    everyone: set[fx.Node] = field(default_factory=set)
    edges: list[tuple[fx.Node, fx.Node, fx.Node]] = field(default_factory=list)

    def add(self, source: fx.Node, fmt: Format, *, everyone: bool) -> None:
        """Quantize a source; a static format wins over a dynamic one."""
        if source not in self.formats or self.formats[source].is_dynamic:
            self.formats[source] = fmt
        if everyone:
            self.everyone.add(source)


def place_activations(traced: fx.GraphModule, floats: dict[str, int], config: Config) -> list[str]:
    """Insert the activation quantizers, in place.

    Args:
        traced: the graph with its layers swapped.
        floats: nodes whose value is a floating tensor → its dimensions.
        config: formats, observer and placement.

    Returns:
        Names of the quantizers, in the graph's order.
    """
    plan = _Plan()
    _for_layers(traced, floats, config, plan)
    static = config.activation_format(convolution=True)
    if static is not None:
        if config.placement == "full" or (config.placement == "auto" and not has_attention(traced)):
            _everywhere(traced, floats, static, plan)
        elif config.placement == "auto":
            _by_region(traced, floats, static, plan)
        _behind_convolutions(traced, floats, static, plan)
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    return [_insert(traced, source, config, plan) for source in sorted(plan.formats, key=order.__getitem__)]


def _operands(node: fx.Node, floats: dict[str, int]) -> list[fx.Node]:
    """The floating tensors a node reads; numbers are no activations."""
    return [value for value in node.all_input_nodes if floats.get(value.name)]


def _for_layers(traced: fx.GraphModule, floats: dict[str, int], config: Config, plan: _Plan) -> None:
    """Rule 2."""
    fixed = constants(traced)
    for node in traced.graph.nodes:
        layer = weight_layer(node, traced)
        fmt = None if layer is None else config.activation_format(convolution=layer.is_convolution)
        if layer is None or fmt is None or any(value in fixed for value in _operands(node, floats)):
            continue
        for value in _operands(node, floats):
            source = value if fmt.range == "token" else source_of(value, traced)
            plan.edges.append((source, value, node))
            plan.add(source, fmt, everyone=False)


def _everywhere(traced: fx.GraphModule, floats: dict[str, int], fmt: Format, plan: _Plan) -> None:
    """Rule 4."""
    fixed = constants(traced)
    for node in traced.graph.nodes:
        operands = _operands(node, floats)
        reads = matches(node, traced, ADDS + POOLS + FUNCTIONS) or _is_integer_difference(
            node, operands, traced
        )
        if reads and not any(v in fixed for v in operands):
            for value in operands:
                plan.add(source_of(value, traced), fmt, everyone=True)
    plan.everyone.update(plan.formats)


def _by_region(traced: fx.GraphModule, floats: dict[str, int], fmt: Format, plan: _Plan) -> None:
    """Rule 5: forward from the convolutions, as long as integer kernels go on."""
    integer: set[fx.Node] = set()
    for node in traced.graph.nodes:
        layer = weight_layer(node, traced)
        operands = _operands(node, floats)
        if layer is not None and layer.is_convolution:
            integer.add(node)
        elif operands and all(source_of(v, traced) in integer for v in operands):
            if matches(node, traced, CLIPS) or moves(node, traced):
                integer.add(node)
            elif matches(node, traced, ADDS + POOLS + INTEGER_FUNCTIONS) or _is_integer_difference(
                node, operands, traced
            ):
                integer.add(node)
                for value in operands:
                    plan.add(source_of(value, traced), fmt, everyone=True)
    plan.everyone.update(plan.formats.keys() & integer)


def _is_integer_difference(node: fx.Node, operands: list[fx.Node], traced: fx.GraphModule) -> bool:
    """True for a subtraction of two tensors whose difference will be codes again.

    Where it is not, as at the model's output, quantized operands would only add their rounding.
    """
    return len(operands) == 2 and matches(node, traced, SUBTRACTIONS) and _meets_integers(node, traced)


def _meets_integers(node: fx.Node, traced: fx.GraphModule) -> bool:
    """True if a weight layer or an operator on codes reads a value, directly or through moves and clips."""
    return any(
        weight_layer(user, traced) is not None
        or matches(user, traced, ADDS + POOLS + FUNCTIONS + SUBTRACTIONS)
        or ((moves(user, traced) or matches(user, traced, CLIPS)) and _meets_integers(user, traced))
        for user in node.users
    )


def _behind_convolutions(traced: fx.GraphModule, floats: dict[str, int], fmt: Format, plan: _Plan) -> None:
    """Rule 3."""
    for node in traced.graph.nodes:
        layer = weight_layer(node, traced)
        if layer is None or not layer.is_convolution or node.name not in floats:
            continue
        if source_of(node.args[0], traced) not in plan.formats:
            continue  # its input stays in float, and so does it
        end = behind_clips(node, traced)
        if end not in plan.formats and not only_leaves(end, traced):
            plan.add(end, fmt, everyone=True)


def _insert(traced: fx.GraphModule, source: fx.Node, config: Config, plan: _Plan) -> str:
    name = f"quant_{source.name}"
    device = next((p.device for p in traced.parameters()), torch.device("cpu"))
    quantizer = ActQuant(plan.formats[source], observer=config.observer, name=source.name)
    traced.add_module(name, quantizer.to(device))
    with traced.graph.inserting_after(_last_placeholder(traced, source)):
        node = traced.graph.call_module(name, (source,))
    if source in plan.everyone:
        readers = [user for user in source.users if user is not node and "keep" not in user.meta]
    else:
        readers = [
            reader if value is source else _first_move(value, source)
            for start, value, reader in plan.edges
            if start is source
        ]
    for reader in dict.fromkeys(readers):
        reader.replace_input_with(source, node)
    return name


def _last_placeholder(traced: fx.GraphModule, source: fx.Node) -> fx.Node:
    """Where to insert behind a source: placeholders stay together at the top."""
    if source.op != "placeholder":
        return source
    placeholders: list[fx.Node] = [n for n in traced.graph.nodes if n.op == "placeholder"]
    return placeholders[-1]


def _first_move(value: fx.Node, source: fx.Node) -> fx.Node:
    """The operation next to the source on the way to `value`."""
    node = value
    while node.args[0] is not source:
        node = node.args[0]  # type: ignore[assignment]
    return node
