"""Batch norms behind convolutions that have no layer in front of them to go into: integers all the same.

DenseNet normalizes before ReLU and convolution, a pre-activation residual block behind an addition, and many
networks behind a ReLU. In evaluation such a norm multiplies each channel by one number and adds another: a
depthwise convolution of one element. Written so, the norm and the ReLU behind it are one integer kernel in
the place of a conversion, a norm, a ReLU and a conversion. A scale for each channel holds its single weight
exactly; what the norm reads is quantized, as for every convolution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from gradq.quant.config import Config
from gradq.quant.folding import convolution_of
from gradq.quant.info import PrepareInfo
from gradq.quant.layers import BATCH_NORMS, CONVOLUTIONS, layer_kind
from gradq.quant.operators import (
    ADDS,
    CLIPS,
    INTEGER_FUNCTIONS,
    POOLS,
    behind_clips,
    matches,
    moves,
    only_leaves,
    source_of,
)
from gradq.quant.swapping import set_module
from gradq.quant.transposed import TRANSPOSED

__all__ = ["convolve_batch_norms"]


def convolve_batch_norms(
    traced: fx.GraphModule, config: Config, info: PrepareInfo, dims: dict[str, int]
) -> None:
    """Write the batch norms that could not be folded as depthwise convolutions, in place, where that pays.

    It pays where what a norm reads comes from convolutions alone, through operators with integer kernels, and
    more than the model's output reads the norm.

    Args:
        traced: the graph of torch's layers, batch norm folded where it can be.
        config: formats, placement, and what is skipped.
        info: what was rewritten is noted in it, and is no longer among what stays in float.
        dims: node name → dimensions of its value on the example.
    """
    static = config.activation_format(convolution=True)
    if static is None or static.is_float8 or config.placement == "matmul" or config.batch_norm == "train":
        return
    calls: dict[str, int] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    integer: set[fx.Node] = set()
    for node in list(traced.graph.nodes):
        name = str(node.target)
        module = traced.get_submodule(name) if node.op == "call_module" else None
        inside = all(source_of(v, traced) in integer for v in node.all_input_nodes if dims.get(v.name))
        if module is not None and _is_integer_convolution(module, name, config):
            integer.add(node)
        elif not inside or not any(dims.get(v.name) for v in node.all_input_nodes):
            continue
        elif isinstance(module, BATCH_NORMS):
            fits = calls[name] == 1 and dims[node.name] in (3, 4) and _has_convolution(module, name, config)
            if fits and not only_leaves(behind_clips(node, traced), traced):
                set_module(traced, name, convolution_of(module, dims[node.name] - 2))
                info.convolved.append(name)
                integer.add(node)
        elif moves(node, traced) or matches(node, traced, CLIPS + ADDS + POOLS + INTEGER_FUNCTIONS):
            integer.add(node)
    info.float_islands = [island for island in info.float_islands if island[0] not in info.convolved]
    traced.recompile()


def _is_integer_convolution(module: nn.Module, name: str, config: Config) -> bool:
    """True if a layer will run as an integer convolution."""
    convolves = type(module) in TRANSPOSED or layer_kind(module) in CONVOLUTIONS
    fmt = config.weight_format(name, convolution=True) if convolves else None
    return fmt is not None and not fmt.is_float8 and not config.is_skipped(name)


def _has_convolution(bn: Any, name: str, config: Config) -> bool:
    """True if a batch norm's factors can be the weight of a convolution with a scale a channel."""
    fmt = config.weight_format(name, convolution=True)
    exact = fmt is not None and fmt.granularity == "channel" and not fmt.is_float8
    known = bn.running_var is not None and bn.affine and bn.weight.dtype == torch.float32
    return exact and known and not config.is_skipped(name)
