"""Scales of channels that can be moved from an activation into the weights around it, exactly in float.

Where only linear layers read what a norm (or a linear layer) writes, channel c of it can be divided by s and
column c of the readers' weights multiplied by s: the model computes the same. Activation-aware scaling and
SmoothQuant choose s; this file finds the places in a prepared graph and folds the scales in.

Shapes: C channels of the activation, O outputs of a reader.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from gradq.quant.fake import ActQuant, WeightQuant
from gradq.quant.modules import QuantLinear
from gradq.quant.operators import matches, op_name

__all__ = ["Place", "find_places"]

_PASSES = (nn.Identity, nn.Dropout, functional.dropout, "contiguous", "clone", "detach", "alias")
_NORMS = (nn.LayerNorm, nn.RMSNorm)
_RELU = (nn.ReLU, torch.relu, functional.relu, "relu")


@dataclass
class Place:
    """One activation and what stands around it.

    Attributes:
        source: name of the layer or parameter that the scales are taken from.
        divided: tensors whose first axis is the channels; they are divided by the scales.
        readers: name → linear layer that reads the activation; its columns are multiplied.
        refit: quantizers of `divided` weights, to be fitted again.
        activations: quantizers that see the activation, or what it is made of, and so lose their ranges.
    """

    source: str
    divided: list[Tensor]
    readers: dict[str, QuantLinear]
    refit: list[tuple[WeightQuant, QuantLinear]]
    activations: list[ActQuant]

    @torch.no_grad()
    def fold(self, scales_C: Tensor) -> None:
        """Move scales into the weights, in place; quantizers of weights are fitted again.

        Activation quantizers with fixed ranges ask for `gradq.quant.calibrate` from now on.

        Args:
            scales_C: (C,) positive.
        """
        for part in self.divided:
            shape = (-1, *(1,) * (part.ndim - 1))
            part.copy_((part.double() / scales_C.double().view(shape)).to(part.dtype))
        for reader in self.readers.values():
            reader.weight.copy_((reader.weight.double() * scales_C.double()).to(reader.weight.dtype))
            reader.weight_quant.fit(reader.weight)
        for quantizer, layer in self.refit:
            quantizer.fit(layer.weight)
        for act in self.activations:
            act.initialized = act.format.is_dynamic


def find_places(traced: fx.GraphModule) -> tuple[list[Place], dict[str, str]]:
    """Every place of a graph, in the order in which it runs, and why the other linear layers have none.

    Args:
        traced: the graph from `gradq.quant.prepare`.

    Returns:
        The places; linear layer → reason.
    """
    uses = _uses(traced)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in traced.graph.nodes:
        if _linear(node, traced) is not None and isinstance(node.args[0], fx.Node):
            groups.setdefault(_behind(node.args[0], traced), []).append(node)
    places: list[Place] = []
    left = {n: "not called by the graph" for n, m in traced.named_modules() if isinstance(m, QuantLinear)}
    for source, calls in groups.items():
        found = _place(source, calls, traced, uses)
        for call in calls:
            if isinstance(found, str):
                left[str(call.target)] = found
            else:
                left.pop(str(call.target), None)
        if isinstance(found, Place):
            places.append(found)
    return places, left


def _linear(node: fx.Node, traced: fx.GraphModule) -> QuantLinear | None:
    module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, QuantLinear) else None


def _passes(node: fx.Node, traced: fx.GraphModule) -> bool:
    """True for what gives every channel on as it is, quantized or not."""
    return _quantizer(node, traced) is not None or matches(node, traced, _PASSES)


def _quantizer(node: fx.Node, traced: fx.GraphModule) -> ActQuant | None:
    module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, ActQuant) else None


def _behind(node: fx.Node, traced: fx.GraphModule) -> fx.Node:
    """Walk back through what passes channels on."""
    while _passes(node, traced) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _ends(node: fx.Node, traced: fx.GraphModule, passed: list[ActQuant]) -> list[fx.Node]:
    """What reads a node's values, seen through what passes channels on."""
    found: list[fx.Node] = []
    for user in node.users:
        if _asks_shape(user):
            continue
        if not _passes(user, traced):
            found.append(user)
            continue
        quantizer = _quantizer(user, traced)
        passed += [] if quantizer is None else [quantizer]
        found += _ends(user, traced, passed)
    return found


def _asks_shape(node: fx.Node) -> bool:
    """True for ``x.shape``, ``x.size()``, ``x.dim()`` and their like, which read no values."""
    if node.target is getattr:
        return node.args[1] in ("shape", "dtype", "device", "ndim")
    return op_name(node) in ("size", "dim", "sym_size", "numel")


def _uses(traced: fx.GraphModule) -> dict[int, int]:
    """Parameter → how often the graph uses it."""
    found: dict[int, int] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            held = list(traced.get_submodule(str(node.target)).parameters())
        elif node.op == "get_attr" and (parameter := _held(node, traced)) is not None:
            held = [parameter] * len(node.users)
        else:
            continue
        for parameter in held:
            found[id(parameter)] = found.get(id(parameter), 0) + 1
    return found


def _held(node: object, traced: fx.GraphModule) -> nn.Parameter | None:
    """The parameter that a node reads, if it has one axis."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    found = getattr(traced.get_submodule(owner), name, None)
    return found if isinstance(found, nn.Parameter) and found.ndim == 1 else None


def _place(
    source: fx.Node, calls: list[fx.Node], traced: fx.GraphModule, uses: dict[int, int]
) -> Place | str:
    """The place behind a node, or why there is none."""
    acts: list[ActQuant] = []
    others = [n for n in _ends(source, traced, acts) if n not in calls]
    if others:
        return f"{op_name(others[0]) or others[0].target} reads its input, too"
    layers = {str(n.target): traced.get_submodule(str(n.target)) for n in calls}
    readers = {name: layer for name, layer in layers.items() if isinstance(layer, QuantLinear)}
    shared = [name for name, layer in readers.items() if uses[id(layer.weight)] > 1]
    if shared:
        return f"the weight of {shared[0]} is used more than once"
    for layer in readers.values():
        acts += [] if layer.input_quant is None else [layer.input_quant]
    columns = next(iter(readers.values())).in_features
    name, divided, linear = _source(source, traced, acts)
    if any(t.shape[0] != columns for t in divided):
        return f"{name} has other channels"
    if not divided:
        return f"no norm or linear layer that could take scales writes its input ({name} does)"
    if any(uses.get(id(t), 1) > 1 for t in divided):
        return f"the weight of {name} is used more than once"
    if linear is not None and linear.bias_correction is not None:
        divided.append(linear.bias_correction)
    refit = [] if linear is None else [(linear.weight_quant, linear)]
    return Place(name, divided, readers, refit, acts)


def _source(
    node: fx.Node, traced: fx.GraphModule, acts: list[ActQuant]
) -> tuple[str, list[Tensor], QuantLinear | None]:
    """Name of what writes an activation, the tensors that scale it by channel, and the layer if it is one."""
    name = str(node.target) if node.op == "call_module" else op_name(node) or str(node.target)
    given: list[object] = [*node.args, *node.kwargs.values()]
    if node.op == "call_module" and matches(node, traced, _NORMS):
        norm = traced.get_submodule(str(node.target))
        weight = norm.weight
        plain = not isinstance(weight, Tensor) or weight.ndim != 1
        return name, [] if plain else list(norm.parameters(recurse=False)), None
    if name in ("layer_norm", "rms_norm"):
        return _held_by(given, traced) or (name, [], None)
    if name == "mul" and (found := _held_by(given, traced)) is not None:
        return found
    if name == "mul":  # one factor is a linear layer's, which takes the scales
        for factor in given:
            layer = _only_reader(factor, node, traced, acts)
            if layer is not None:
                return layer
        return name, [], None
    if matches(node, traced, _RELU):
        return _only_reader(node.args[0], node, traced, acts) or (name, [], None)
    linear = _linear(node, traced)
    return (name, [], None) if linear is None else (name, _rows(linear), linear)


def _held_by(given: list[object], traced: fx.GraphModule) -> tuple[str, list[Tensor], None] | None:
    """The parameters that a function of a graph is given, under the name of the first."""
    nodes = [value for value in given if isinstance(value, fx.Node)]
    held = [(str(node.target), p) for node in nodes if (p := _held(node, traced)) is not None]
    return (held[0][0], [p for _, p in held], None) if held else None


def _only_reader(
    value: object, reader: fx.Node, traced: fx.GraphModule, acts: list[ActQuant]
) -> tuple[str, list[Tensor], QuantLinear | None] | None:
    """The linear layer that writes a value which nothing but a node reads."""
    if not isinstance(value, fx.Node):
        return None
    node = _behind(value, traced)
    layer = _linear(node, traced)
    passed: list[ActQuant] = []
    if layer is None or any(end is not reader for end in _ends(node, traced, passed)):
        return None
    acts += passed
    return str(node.target), _rows(layer), layer


def _rows(layer: QuantLinear) -> list[Tensor]:
    return [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
