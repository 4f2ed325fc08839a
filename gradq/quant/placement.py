"""Where quantizers go: exactly one on each activation tensor that integer kernels read or write.

The rules, over the fx graph after batch norm is folded and layers are swapped:

1. The *source* of a tensor is found by walking back through operations that only move elements (reshape,
dropout,
   max pooling, …): they keep the codes, so the tensor is quantized once, at its source.
2. ``matmul`` placement quantizes the sources that weight layers read. Other readers keep the float values.
3. ``full`` placement quantizes every source that weight layers, additions, concatenations, poolings and
activation
   functions read, a convolution's output in front of an addition included; every reader gets the quantized
   values. ReLU and its like belong to the layer before them: the quantizer stands behind them.
4. What only reaches the model's output stays in float.
5. A constant (computed from parameters and numbers alone: a mask, positions, a mean to subtract) is no
   activation: it is never quantized, and what combines it with an activation computes in float.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from gradq.quant.config import Config
from gradq.quant.fake import ActQuant
from gradq.quant.formats import Format
from gradq.quant.modules import QuantLayer
from gradq.quant.recurrent import _QuantCell

__all__ = [
    "CLIPS",
    "MOVES",
    "constants",
    "global_mean",
    "has_attention",
    "matches",
    "moves",
    "op_name",
    "pads_with_zeros",
    "place_activations",
    "source_of",
    "weight_layer",
]

MOVES: tuple[Any, ...] = (
    nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.MaxPool1d,
    nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.ChannelShuffle,
    nn.PixelShuffle, torch.flatten, torch.reshape, torch.transpose, torch.permute, torch.squeeze,
    torch.unsqueeze, torch.chunk, torch.split, torch.movedim, torch.swapaxes, functional.dropout,
    functional.max_pool1d, functional.max_pool2d, functional.max_pool3d, functional.adaptive_max_pool2d,
    "flatten", "reshape", "view", "transpose", "permute", "squeeze", "unsqueeze", "chunk", "split",
    "contiguous", "expand", "swapaxes", "movedim", "unbind", "t", "slice", "select", "clone", "alias",
    "detach", "pixel_shuffle", "narrow",
)  # fmt: skip
_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
CLIPS: tuple[Any, ...] = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, functional.relu, functional.relu6, functional.hardtanh, torch.relu,
    torch.relu_, functional.relu_, "relu", "relu_",
)  # fmt: skip
ADDS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
_POOLS: tuple[Any, ...] = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d, functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d,
    functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d,
    torch.mean, "mean",
)  # fmt: skip
_FUNCTIONS: tuple[Any, ...] = (
    nn.SiLU, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.GELU, nn.LeakyReLU, nn.ELU, nn.Tanh, nn.PReLU,
    nn.Mish, functional.silu, torch.sigmoid, functional.sigmoid, functional.hardswish, functional.hardsigmoid,
    functional.gelu, functional.leaky_relu, functional.elu, torch.tanh, functional.tanh, functional.mish,
    "sigmoid", "tanh", operator.mul, operator.imul, torch.mul, "mul", "mul_", torch.cat, torch.concat,
)  # fmt: skip
_ATTENTION: tuple[Any, ...] = (
    nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer,
    nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer, nn.LSTMCell, nn.GRUCell,
    functional.scaled_dot_product_attention, functional.layer_norm, functional.rms_norm, functional.softmax,
    torch.softmax, "softmax",
)  # fmt: skip


def op_name(node: fx.Node) -> str:
    """Name of the function, method or ATen operator that a node calls, without its overload."""
    if node.op == "call_method":
        return str(node.target)
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(node.target if packet is None else packet, "__name__", ""))


@functools.cache
def _names(table: tuple[Any, ...]) -> frozenset[str]:
    """Names of a table's functions and methods: those of ATen's operators are the same."""
    return frozenset(t if isinstance(t, str) else t.__name__ for t in table if not isinstance(t, type))


def matches(node: fx.Node, traced: fx.GraphModule, table: tuple[Any, ...]) -> bool:
    """True if a node is one of the modules, functions, methods or ATen operators (by name) of a table."""
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        return isinstance(module, tuple(t for t in table if isinstance(t, type)))
    if isinstance(node.target, torch._ops.OpOverload):
        return op_name(node) in _names(table)
    if node.op in ("call_function", "call_method"):
        return any(node.target is t or (isinstance(t, str) and node.target == t) for t in table)
    return False


def global_mean(node: fx.Node, traced: fx.GraphModule) -> bool | None:
    """Whether a node keeps the axes of the mean it takes over both axes of images; None if it does not."""
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        is_mean = isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1), [1, 1])
        return True if is_mean else None
    arguments = [*node.args[1:], *[None] * 2]
    if op_name(node) == "adaptive_avg_pool2d":
        return True if node.kwargs.get("output_size", arguments[0]) in (1, (1, 1), [1, 1]) else None
    if op_name(node) == "mean":
        axes = node.kwargs.get("dim", arguments[0])
        if isinstance(axes, (tuple, list)) and {int(a) % 4 for a in axes} == {2, 3}:
            return bool(node.kwargs.get("keepdim", arguments[1]))
    return None


def has_attention(traced: fx.GraphModule) -> bool:
    """True if the model attends or normalizes layers: then only its matmuls are quantized."""
    return any(matches(node, traced, _ATTENTION) for node in traced.graph.nodes)


def weight_layer(node: fx.Node, traced: fx.GraphModule) -> QuantLayer | None:
    """The quantized layer a node calls, if it reads its input through the graph's quantizers."""
    if node.op != "call_module":
        return None
    module = traced.get_submodule(str(node.target))
    if isinstance(module, QuantLayer) and not module.is_embedding and not isinstance(module, _QuantCell):
        return module if type(module).__name__ != "QuantMultiheadAttention" else None
    return None


def pads_with_zeros(node: fx.Node, traced: fx.GraphModule) -> bool:
    """True if a node pads with zeros: those are a code, too."""
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        return isinstance(module, _PADS) and getattr(module, "value", 0) == 0
    if node.op != "call_function" or op_name(node) not in ("pad", "constant_pad_nd", "_pad"):
        return False
    given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | dict(node.kwargs)
    if op_name(node) == "constant_pad_nd":
        given["mode"], given["value"] = "constant", node.args[2] if len(node.args) > 2 else 0
    return given.get("mode", "constant") == "constant" and given.get("value") in (None, 0)


def moves(node: fx.Node, traced: fx.GraphModule) -> bool:
    """True if a node moves elements, selects them or adds zeros, so that codes stay codes."""
    return matches(node, traced, MOVES) or pads_with_zeros(node, traced)


def source_of(node: fx.Node, traced: fx.GraphModule) -> fx.Node:
    """Walk back through what only moves elements."""
    while True:
        if moves(node, traced) and node.args and isinstance(node.args[0], fx.Node):
            node = node.args[0]
            continue
        if (
            node.op == "call_function"
            and node.target is operator.getitem
            and isinstance(node.args[0], fx.Node)
        ):
            parent = node.args[0]
            if matches(parent, traced, (torch.chunk, torch.split, "chunk", "split", "unbind")):
                node = parent
                continue
        return node


def constants(traced: fx.GraphModule) -> set[fx.Node]:
    """The nodes that depend on no input of the model."""
    found: set[fx.Node] = set()
    for node in traced.graph.nodes:
        if node.op not in ("placeholder", "output") and all(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def place_activations(traced: fx.GraphModule, floats: dict[str, int], config: Config) -> list[str]:
    """Insert the activation quantizers, in place.

    Args:
        traced: the graph with its layers swapped.
        floats: nodes whose value is a floating tensor.
        config: formats, observer and placement.

    Returns:
        Names of the quantizers, in the graph's order.
    """
    full = config.placement == "full" or (config.placement == "auto" and not has_attention(traced))
    formats: dict[fx.Node, Format] = {}
    edges: list[tuple[fx.Node, fx.Node, fx.Node]] = []  # (source, the value read, reader)
    fixed = constants(traced)
    for node in traced.graph.nodes:
        layer = weight_layer(node, traced)
        if node in fixed or any(n in fixed and n.name in floats for n in node.all_input_nodes):
            continue
        reads = layer is not None or (full and matches(node, traced, ADDS + _POOLS + _FUNCTIONS))
        fmt = config.activation_format(convolution=layer is None or layer.is_convolution)
        if not reads or fmt is None:
            continue
        for value in node.all_input_nodes:
            if not floats.get(value.name):  # a number is no activation
                continue
            source = value if fmt.range == "token" else source_of(value, traced)
            edges.append((source, value, node))
            if source not in formats or formats[source].is_dynamic:
                formats[source] = fmt
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    names = []
    for source in sorted(formats, key=order.__getitem__):
        names.append(_insert(traced, source, formats[source], config, edges, everyone=full))
    return names


def _insert(
    traced: fx.GraphModule,
    source: fx.Node,
    fmt: Format,
    config: Config,
    edges: list[tuple[fx.Node, fx.Node, fx.Node]],
    *,
    everyone: bool,
) -> str:
    name = f"quant_{source.name}"
    device = next((p.device for p in traced.parameters()), torch.device("cpu"))
    traced.add_module(name, ActQuant(fmt, observer=config.observer, name=source.name).to(device))
    with traced.graph.inserting_after(_last_placeholder(traced, source)):
        node = traced.graph.call_module(name, (source,))
    if everyone:
        readers = [user for user in source.users if user is not node and "keep" not in user.meta]
    else:
        readers = []
        for start, value, reader in edges:
            if start is source:
                readers.append(reader if value is source else _first_move(value, source))
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
