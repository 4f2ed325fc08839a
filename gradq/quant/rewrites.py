"""Rewrites of the float graph before layers are swapped: folded batch norm, equalization."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from gradq.quant.config import Config
from gradq.quant.folding import FoldRecord, equalize_pair, fold_batch_norm
from gradq.quant.info import PrepareInfo
from gradq.quant.layers import BATCH_NORMS, CONVOLUTIONS, layer_kind, num_outputs
from gradq.quant.modules import _QuantConv
from gradq.quant.operators import ADDS, matches
from gradq.quant.swapping import set_module
from gradq.quant.transposed import TRANSPOSED

__all__ = [
    "attach_live",
    "drop_what_does_nothing",
    "equalize",
    "expand_gates",
    "fold_batch_norms",
    "look_up_bags",
]

_GATED: tuple[tuple[tuple[Any, ...], Any], ...] = (
    ((nn.SiLU, functional.silu, "silu", "silu_"), torch.sigmoid),
    ((nn.Hardswish, functional.hardswish, "hardswish", "hardswish_"), functional.hardsigmoid),
)


def fold_batch_norms(traced: fx.GraphModule, config: Config, info: PrepareInfo, dims: dict[str, int]) -> None:
    """Fold each batch norm into the layer before it, or note it to stay live, in place.

    Args:
        traced: the graph of torch's layers.
        config: whether batch norm is folded.
        info: where folds and what is left are noted.
        dims: node name → dimensions of its value on the example.
    """
    calls: dict[str, int] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not isinstance(traced.get_submodule(node.target), BATCH_NORMS):
            continue
        bn: Any = traced.get_submodule(node.target)
        before = node.args[0]
        layer: Any = traced.get_submodule(before.target) if before.op == "call_module" else None
        reason = None
        if layer is None or not _folds(layer):
            reason = "no convolution or linear layer in front of it"
        elif dims.get(before.name) != _dims_of_channels(layer) or bn.num_features != num_outputs(layer):
            reason = f"its channels are another axis than the outputs of {before.target}"
        elif layer_kind(layer) not in CONVOLUTIONS and config.batch_norm == "train":
            reason = "live batch norm is for convolutions; use batch_norm='fold'"
        elif len(before.users) > 1 or calls[before.target] > 1 or calls[node.target] > 1:
            reason = f"{before.target} or its output is used more than once"
        elif bn.running_var is None:
            reason = "it keeps no running statistics"
        elif config.is_skipped(before.target):
            reason = f"{before.target} is skipped by the configuration"
        if config.is_skipped(node.target):
            continue  # listed with everything that is skipped
        if reason is not None:
            info.float_islands.append((node.target, f"batch norm not folded: {reason}"))
            continue
        record = FoldRecord(before.target, node.target)
        if config.batch_norm == "train":
            info.live.append(record)
            continue
        folded = copy.copy(layer)
        folded._parameters = dict(layer._parameters)
        folded._parameters["weight"], folded._parameters["bias"] = fold_batch_norm(layer, bn)
        set_module(traced, before.target, folded)
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
        traced.delete_submodule(node.target)
        info.folded.append(record)
    traced.recompile()


def _folds(layer: nn.Module) -> bool:
    """True for the layers that batch norm can be folded into."""
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return type(layer) in (*TRANSPOSED, nn.ConvTranspose3d)
    return layer_kind(layer) is not None


def _dims_of_channels(layer: nn.Module) -> int:
    """Dimensions of an output whose second axis is the layer's channels: (N, C) or (N, C, *spatial)."""
    weight: Any = layer.weight
    return int(weight.ndim)


def equalize(traced: fx.GraphModule) -> None:
    """Equalize every pair of layers with nothing but ReLU and pooling between them, in place."""
    kinds = (*CONVOLUTIONS, nn.Linear)
    uses: dict[int, int] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            for parameter in traced.get_submodule(node.target).parameters():
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for node in traced.graph.nodes:
        if node.op != "call_module" or layer_kind(traced.get_submodule(node.target)) not in kinds:
            continue
        first, following = traced.get_submodule(node.target), node
        while len(following.users) == 1:
            following = next(iter(following.users))
            relu = matches(following, traced, (nn.ReLU, torch.relu, torch.nn.functional.relu, "relu"))
            if not relu and not matches(following, traced, (nn.MaxPool2d, nn.Dropout, nn.Identity)):
                break
        if following.op != "call_module" or following is node:
            continue
        second: Any = traced.get_submodule(following.target)
        if layer_kind(second) is not layer_kind(first) or getattr(second, "groups", 1) != 1:
            continue
        if any(uses[id(p)] > 1 for p in (*first.parameters(), *second.parameters())):
            continue
        equalize_pair(first, second)


def expand_gates(traced: fx.GraphModule) -> None:
    """Write SiLU as ``x·sigmoid(x)`` and Hardswish as ``x·hardsigmoid(x)`` behind convolutions, in place.

    Product and gate have integer kernels; the function as one has none, and is computed in float between two
    conversions.
    """
    for node in list(traced.graph.nodes):
        gate = next((g for table, g in _GATED if matches(node, traced, table)), None)
        if gate is None:
            continue
        x: Any = node.args[0]
        layer = traced.get_submodule(str(x.target)) if x.op == "call_module" else None
        convolves = type(layer) in TRANSPOSED or (layer is not None and layer_kind(layer) in CONVOLUTIONS)
        if not convolves:
            continue
        with traced.graph.inserting_before(node):
            gated = traced.graph.call_function(gate, (x,))
            product = traced.graph.call_function(operator.mul, (x, gated))
        gated.stack_trace = product.stack_trace = node.stack_trace
        node.replace_all_uses_with(product)
        traced.graph.erase_node(node)
    traced.recompile()


def drop_what_does_nothing(traced: fx.GraphModule, floats: dict[str, int]) -> None:
    """Take out additions of the number 0 (``sum`` starts with one) and what no output needs, in place.

    Each of them would be quantized: one rounding more, and a kernel.

    Args:
        traced: the graph.
        floats: nodes whose value is a floating tensor → number of its dimensions.
    """
    for node in list(traced.graph.nodes):
        if not matches(node, traced, ADDS) or len(node.args) != 2 or node.kwargs or node.name not in floats:
            continue
        kept = [value for value in node.args if not (isinstance(value, (int, float)) and value == 0)]
        if len(kept) == 1 and isinstance(kept[0], fx.Node) and kept[0].name in floats:
            node.replace_all_uses_with(kept[0])
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code(lambda n: n.is_impure() or bool(n.meta.get("keep")))
    traced.recompile()


def look_up_bags(traced: fx.GraphModule, config: Config) -> None:
    """Write `nn.EmbeddingBag` on rows of ids as a lookup and a sum, in place: lookups are quantized.

    Bags of unequal lengths (offsets), weighted ones and those that leave out an index stay as they are.
    """
    made: dict[str, nn.Embedding] = {}
    modes: dict[str, str] = {}
    for node in list(traced.graph.nodes):
        bag = traced.get_submodule(node.target) if node.op == "call_module" else None
        if type(bag) is not nn.EmbeddingBag and node.target not in made:
            continue
        if node.target not in made:
            assert isinstance(bag, nn.EmbeddingBag)
            calls = [n for n in traced.graph.nodes if n.op == "call_module" and n.target == node.target]
            plain = bag.max_norm is None and bag.padding_idx is None and not bag.sparse
            plain = plain and not config.is_skipped(node.target)
            if not plain or any(len(n.args) != 1 or n.kwargs for n in calls):
                continue
            table = nn.Embedding(bag.num_embeddings, bag.embedding_dim, device="meta")
            table._parameters["weight"] = bag._parameters["weight"]
            table.train(bag.training)
            made[node.target], modes[node.target] = table, bag.mode
            set_module(traced, node.target, table)
        with traced.graph.inserting_after(node):
            kind = {"sum": "sum", "mean": "sum", "max": "amax"}[modes[node.target]]
            out = traced.graph.call_method(kind, (node, 1))
        _hand_over(node, out)
        if modes[node.target] == "mean":
            with traced.graph.inserting_after(out):
                length = traced.graph.call_method("size", (node.args[0], 1))
            with traced.graph.inserting_after(length):
                _hand_over(out, traced.graph.call_function(operator.truediv, (out, length)))
    traced.recompile()


def _hand_over(node: fx.Node, new: fx.Node) -> None:
    """Let every reader of a node read what stands behind it."""
    for user in list(node.users):
        if user is not new:
            user.replace_input_with(node, new)


def attach_live(traced: fx.GraphModule, info: PrepareInfo) -> None:
    """Move each live batch norm into its convolution, in place."""
    nodes = {str(n.target): n for n in traced.graph.nodes if n.op == "call_module"}
    for record in info.live:
        layer = traced.get_submodule(record.layer)
        if not isinstance(layer, _QuantConv):
            continue
        layer.attach_batch_norm(traced.get_submodule(record.batch_norm))
        node = nodes[record.batch_norm]
        node.replace_all_uses_with(node.args[0])
        traced.graph.erase_node(node)
        traced.delete_submodule(record.batch_norm)
    traced.recompile()
