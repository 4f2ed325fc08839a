"""What the operators of a graph are to quantization: which move elements, clip, add, pool, and so on."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from gradq.quant.lstm import QuantLSTM
from gradq.quant.modules import QuantLayer
from gradq.quant.recurrent import _QuantCell

__all__ = [
    "ADDS",
    "ATTENTION",
    "CLIPS",
    "FUNCTIONS",
    "INTEGER_FUNCTIONS",
    "POOLS",
    "SUBTRACTIONS",
    "behind_clips",
    "constants",
    "global_mean",
    "matches",
    "moves",
    "only_leaves",
    "op_name",
    "pads_with_zeros",
    "repeats",
    "source_of",
    "weight_layer",
]

_MOVES: tuple[Any, ...] = (
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
SUBTRACTIONS: tuple[Any, ...] = (
    operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_", "subtract",
)  # fmt: skip
POOLS: tuple[Any, ...] = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d, functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d,
    functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d,
    torch.mean, "mean",
)  # fmt: skip
FUNCTIONS: tuple[Any, ...] = (
    nn.SiLU, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.GELU, nn.LeakyReLU, nn.ELU, nn.Tanh, nn.PReLU,
    nn.Mish, functional.silu, torch.sigmoid, functional.sigmoid, functional.hardswish, functional.hardsigmoid,
    functional.gelu, functional.leaky_relu, functional.elu, torch.tanh, functional.tanh, functional.mish,
    "sigmoid", "tanh", operator.mul, operator.imul, torch.mul, "mul", "mul_", torch.cat, torch.concat,
)  # fmt: skip
# of the functions: those for which ONNX Runtime has an integer kernel
INTEGER_FUNCTIONS: tuple[Any, ...] = (
    nn.Sigmoid, nn.Hardsigmoid, nn.LeakyReLU, torch.sigmoid, functional.sigmoid, functional.hardsigmoid,
    functional.leaky_relu, "sigmoid",
    operator.mul, operator.imul, torch.mul, "mul", "mul_", torch.cat, torch.concat,
)  # fmt: skip
ATTENTION: tuple[Any, ...] = (
    nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer,
    nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer, nn.LSTMCell, nn.GRUCell,
    nn.LSTM, nn.GRU, nn.RNN,
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


def weight_layer(node: fx.Node, traced: fx.GraphModule) -> QuantLayer | None:
    """The quantized layer a node calls, if it reads its input through the graph's quantizers."""
    if node.op != "call_module":
        return None
    module = traced.get_submodule(str(node.target))
    reads_itself = isinstance(module, (_QuantCell, QuantLSTM))
    if isinstance(module, QuantLayer) and not module.is_embedding and not reads_itself:
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


def repeats(node: fx.Node, traced: fx.GraphModule) -> bool:
    """True if a node enlarges images by repeating elements."""
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        return isinstance(module, nn.Upsample) and module.mode == "nearest"
    name = op_name(node)
    if name == "interpolate":
        mode = node.kwargs.get("mode", node.args[3] if len(node.args) > 3 else "nearest")
        return mode == "nearest"
    return name.startswith("upsample_nearest")


def moves(node: fx.Node, traced: fx.GraphModule) -> bool:
    """True if a node moves, selects or repeats elements or adds zeros, so that codes stay codes."""
    return matches(node, traced, _MOVES) or pads_with_zeros(node, traced) or repeats(node, traced)


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


def behind_clips(node: fx.Node, traced: fx.GraphModule) -> fx.Node:
    """Walk on from a layer through ReLU and its like, which belong to it if nothing else reads it."""
    while len(node.users) == 1 and matches(following := next(iter(node.users)), traced, CLIPS):
        node = following
    return node


def only_leaves(node: fx.Node, traced: fx.GraphModule) -> bool:
    """True if a value reaches nothing but the model's output, through what moves elements."""
    return all(
        user.op == "output"
        or "keep" in user.meta
        or (user.op == "call_module" and str(user.target) == "rebuild_output")
        or (moves(user, traced) and only_leaves(user, traced))
        for user in node.users
    )
