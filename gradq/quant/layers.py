"""Which of torch's layers a module is, and layers made of functional calls on parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

__all__ = ["BATCH_NORMS", "CONVOLUTIONS", "layer_kind", "make_layers", "num_outputs"]

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FUNCTIONS: dict[Any, tuple[type[nn.Module], int]] = {
    functional.linear: (nn.Linear, 0),
    functional.conv1d: (nn.Conv1d, 1), torch.conv1d: (nn.Conv1d, 1),
    functional.conv2d: (nn.Conv2d, 2), torch.conv2d: (nn.Conv2d, 2),
    functional.conv3d: (nn.Conv3d, 3), torch.conv3d: (nn.Conv3d, 3),
}  # fmt: skip
_ATEN: dict[str, tuple[type[nn.Module], int]] = {
    "linear": (nn.Linear, 0), "conv1d": (nn.Conv1d, 1), "conv2d": (nn.Conv2d, 2), "conv3d": (nn.Conv3d, 3),
}  # fmt: skip


def layer_kind(module: nn.Module) -> type[nn.Module] | None:
    """`nn.Linear` or the convolution that a module computes, subclasses that inherit the forward included."""
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)
    for kind in kinds:
        if isinstance(module, kind):
            same = type(module).forward is kind.forward
            convolves = getattr(type(module), "_conv_forward", None) is getattr(kind, "_conv_forward", None)
            return kind if same and convolves else None
    return None


def num_outputs(layer: Any) -> int:
    """Output channels or features of a linear layer or (transposed) convolution."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def make_layers(traced: fx.GraphModule) -> dict[str, str]:
    """Turn ``functional.linear(x, weight, bias)``, ``x @ weight`` and convolutions on parameters into layers.

    The layers hold the very parameters, under their names where nothing else stands under the same prefix. A
    weight that stands right of ``@`` (or in ``addmm``) is held transposed.

    Args:
        traced: the graph; changed in place.

    Returns:
        Layer → name of the parameter that its weight is the transpose of.
    """
    transposed: dict[str, str] = {}
    for node in list(traced.graph.nodes):
        if node.op != "call_function" or "gradq_skipped" in node.meta:
            continue
        name = _product(traced, node)
        if name is not None:
            transposed[name[0]] = name[1]
            continue
        found = _FUNCTIONS.get(node.target) or _ATEN.get(_aten_name(node))
        if found is None:
            continue
        kind, dims = found
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        weight = _parameter(traced, given.get("weight"))
        bias = _parameter(traced, given.get("bias"))
        if weight is None or weight.ndim != 2 + dims or (given.get("bias") is not None and bias is None):
            continue
        numbers = [given.get(key, default) for key, default in zip(names[3:], (1, 0, 1, 1), strict=True)]
        if any(isinstance(n, fx.Node) for n in numbers):
            continue
        layer = _layer(kind, dims, weight, bias, numbers)
        layer.training = traced.training
        _call(traced, node, layer, given["input"], given["weight"], given.get("bias"))
    traced.recompile()
    return transposed


def _aten_name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return "" if packet is None else str(packet.__name__)


def _product(traced: fx.GraphModule, node: fx.Node) -> tuple[str, str] | None:
    """Make a layer of ``x @ weight`` or ``addmm(bias, x, weight)``: its name and the weight's."""
    name = _aten_name(node) or getattr(node.target, "__name__", "")
    if name == "addmm" and len(node.args) == 3 and not node.kwargs:
        bias_node, x, weight_node = node.args
    elif name in ("matmul", "mm") and len(node.args) == 2 and not node.kwargs:
        (x, weight_node), bias_node = node.args, None
    else:
        return None
    weight, bias = _parameter(traced, weight_node), _parameter(traced, bias_node)
    if weight is None or weight.ndim != 2 or (bias_node is not None and (bias is None or bias.ndim != 1)):
        return None
    turned = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad)
    layer = _layer(nn.Linear, 0, turned, bias, [])
    layer.training = traced.training
    target = str(weight_node.target)  # type: ignore[union-attr]
    return _call(traced, node, layer, x, weight_node, bias_node), target


def _call(traced: fx.GraphModule, node: fx.Node, layer: nn.Module, x: Any, weight: Any, bias: Any) -> str:
    """Put a call of the layer in the place of a node; the layer's name."""
    name = _place(traced, weight, bias, layer)
    with traced.graph.inserting_before(node):
        new = traced.graph.call_module(name, (x,))
    new.name = node.name
    new.stack_trace = node.stack_trace
    node.replace_all_uses_with(new)
    traced.graph.erase_node(node)
    for value in (weight, bias):
        if isinstance(value, fx.Node) and not value.users:
            traced.graph.erase_node(value)
    return name


def _parameter(traced: fx.GraphModule, value: Any) -> nn.Parameter | None:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    found: Any = traced
    for part in str(value.target).split("."):
        found = getattr(found, part)
    return found if isinstance(found, nn.Parameter) else None


def _layer(
    kind: Any, dims: int, weight: nn.Parameter, bias: nn.Parameter | None, numbers: list[Any]
) -> nn.Module:
    """An empty layer that holds the parameters."""
    if dims == 0:
        layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    else:
        stride, padding, dilation, groups = numbers
        layer = kind(
            weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), stride=_plain(stride),
            padding=_plain(padding), dilation=_plain(dilation), groups=groups, bias=bias is not None,
            device="meta",
        )  # fmt: skip
    layer._parameters["weight"], layer._parameters["bias"] = weight, bias
    return layer


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _place(traced: fx.GraphModule, weight: fx.Node, bias: Any, layer: nn.Module) -> str:
    """Name under which the layer stands: the parameters keep theirs if the layer may have their prefix."""
    prefix, _, leaf = str(weight.target).rpartition(".")
    own = {"weight"} if bias is None else {"weight", "bias"}
    holder = traced.get_submodule(prefix)
    held = {*holder._parameters, *holder._buffers, *holder._modules}
    keeps = leaf == "weight" and (bias is None or str(bias.target) == f"{prefix}.bias")
    others = [n for n in traced.graph.nodes if n.op == "get_attr" and str(n.target).startswith(f"{prefix}.")]
    alone = all(n is weight or n is bias for n in others) and all(len(n.users) == 1 for n in others)
    name = (
        prefix
        if prefix and keeps and held <= own and alone
        else f"{prefix}_{leaf}_layer".lstrip("_").replace(".", "_")
    )
    while name != prefix and hasattr(traced, name):
        name += "_"
    traced.add_submodule(name, layer)
    return name
