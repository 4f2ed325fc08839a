"""`prepare` makes a quantized copy of a model; `restore` undoes it; `finalize` folds live batch norm.

The order: copy → trace → functionalize → fold batch norm, or write it as a convolution → equalize (if asked)
→ swap layers → place activation quantizers. After each step the graph must compute what the user's untouched
model computes.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from gradq.errors import TraceError
from gradq.quant.batches import unwrap
from gradq.quant.by_name import swap_info, unswapped
from gradq.quant.config import Config, chosen_config
from gradq.quant.exported import trace_by_export
from gradq.quant.folding import batch_norm_of, fold_batch_norm, unfold_batch_norm
from gradq.quant.info import FloatModel, PrepareInfo, copy_model, float_model, prepare_info
from gradq.quant.layers import make_layers
from gradq.quant.lone_norms import convolve_batch_norms
from gradq.quant.modules import _QuantConv
from gradq.quant.mutation import functionalize
from gradq.quant.placement import place_activations
from gradq.quant.plain import computed_weights, plain_copy, put_back
from gradq.quant.readers import widen_scales
from gradq.quant.rewrites import (
    attach_live,
    drop_what_does_nothing,
    equalize,
    expand_gates,
    fold_batch_norms,
    look_up_bags,
)
from gradq.quant.sameness import Expected, check_values
from gradq.quant.swapping import Swapper
from gradq.quant.tracing import bound_arguments, example_arguments, float_tensors, ordered_inputs, trace

__all__ = ["finalize", "float_graph", "prepare", "restore"]


def prepare(
    model: nn.Module, example_inputs: Any, config: Config | None = None, *, keep_float: bool = True
) -> fx.GraphModule:
    """Make a quantized copy of a model.

    Weights are fitted here; activations get their ranges in `gradq.quant.calibrate`. With its quantizers off
    the copy computes what the model computes on the example inputs in evaluation; anything else is an error.

    Args:
        model: any model `torch.fx` can trace; untouched.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments; used to trace and to
            check.
        config: formats and placement; if None `Config()`, with weights of 7 bits on x86 processors without
            VNNI, where 8 bits saturate.
        keep_float: keep a copy of the model as it is now, on the CPU, for `gradq.export.verify` to compare
            with; False saves that memory, and `verify` then asks for the float model.

    Returns:
        A graph module with the model's parameter names, in the model's training mode (in evaluation if the
        model takes another path there: such a copy cannot be trained).

    Raises:
        TraceError: the model cannot be traced, or its graph computes something else; the message names the
            line or the layer and what to do.
        UnsupportedError: a layer that cannot be quantized and is not in `Config.skip`; named.
        NonFiniteError: a weight that holds NaN or Inf; named.
    """
    args, kwargs = example_arguments(example_inputs)
    return _prepare(model, args, kwargs, chosen_config(config), keep_float)


def _prepare(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], config: Config, keep_float: bool
) -> fx.GraphModule:
    bound_arguments(model, args, kwargs)
    check_values(model)
    expected = Expected(model, args, kwargs)
    origin = copy_model(model)
    traced, transposed = _graph(origin, args, kwargs, config, expected)
    inputs = ordered_inputs(traced, args, kwargs)
    floats = float_tensors(traced, inputs)
    drop_what_does_nothing(traced, floats)
    look_up_bags(traced, config)
    expected.check(traced, "taking out what computes nothing")
    info = PrepareInfo(
        config=config, origin=origin, example_inputs=_kept((args, kwargs)),
        plain_weights=computed_weights(origin), transposed=transposed,
        float_model=FloatModel(model) if keep_float else None,
    )  # fmt: skip
    fold_batch_norms(traced, config, info, floats)
    expected.check(traced, "folding batch norm", info.folded)
    convolve_batch_norms(traced, config, info, floats)
    expected.check(traced, "writing batch norm as convolutions", info.folded)
    if config.equalize:
        equalize(traced)
        expected.check(traced, "equalization")
    if config.activations is not None and config.placement != "matmul":
        expand_gates(traced)
    floats = float_tensors(traced, inputs)
    Swapper(traced, config, info).run()
    attach_live(traced, info)
    info.activations = place_activations(traced, floats, config)
    traced.graph.lint()
    traced.recompile()
    expected.check(traced, "swapping layers and placing quantizers", [*info.folded, *info.live])
    traced.meta["gradq_quant"] = info
    return traced


def _graph(
    origin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], config: Config, expected: Expected
) -> tuple[fx.GraphModule, dict[str, str]]:
    """A graph of layers that computes the model, by `torch.fx` or, where that fails, by `torch.export`.

    fx comes first: it takes milliseconds, keeps every axis free and serves both modes at once.
    """
    problems: list[TraceError] = []
    for way in (trace, trace_by_export, functools.partial(trace_by_export, functional=True)):
        try:
            traced = way(plain_copy(origin), args, kwargs, config)  # tracing may run the model's Python
            expected.check(traced, "tracing")
            functionalize(traced, ordered_inputs(traced, args, kwargs))
            transposed = make_layers(traced)
            expected.check(traced, "rewriting statements that change tensors in place")
            return traced, transposed
        except TraceError as error:
            problems.append(error)
        if len(problems) == 2 and "in place" not in str(problems[1]):
            break
    raise TraceError(
        f"{problems[0]}\n{problems[-1]}\nRewrite that line; or leave the module that holds it in float with "
        "Config(skip=(name,)); or quantize without tracing: quant.swap(model) replaces layers in "
        "place by name."
    ) from problems[0]


def float_graph(model: nn.Module, original: nn.Module | None = None) -> fx.GraphModule:
    """The float model behind a prepared one as a graph, batch norm folded, nothing quantized.

    Args:
        model: a model from `prepare`.
        original: the float model, if `prepare` was told not to keep it.

    Raises:
        UnsupportedError: the model was not made by `prepare`.
        ConfigError: the float model was not kept and is not given.
    """
    info = prepare_info(model)
    original = float_model(model) if original is None else original
    assert info.example_inputs is not None
    args, kwargs = info.example_inputs
    config = replace(
        info.config, weights=None, activations=None, embeddings=None, overrides=(), batch_norm="fold"
    )
    return _prepare(original, args, kwargs, config, keep_float=False).eval()


def _kept(arguments: Any) -> Any:
    """The arguments on the CPU, apart from the caller's."""

    def keep(x: Any) -> Any:
        return x.detach().cpu().clone() if isinstance(x, Tensor) else x

    return torch.utils._pytree.tree_map(keep, arguments)


@torch.no_grad()
def finalize(model: nn.Module) -> nn.Module:
    """Fold every live batch norm into its convolution, in place: afterwards the model is ready to export.

    Weight scales that training made too small for their channel's int32 bias are widened.

    The folded weight is the very tensor that was quantized while training, so in evaluation the model
    computes the same up to the rounding of fp32.

    Args:
        model: a model from `prepare` with ``batch_norm="train"``, or built by hand. Others are left as they
            are.

    Returns:
        The model.
    """
    by_layer = {}
    if isinstance(model, fx.GraphModule):
        info = prepare_info(model)
        by_layer = {record.layer: record for record in info.live}
    for name, layer in model.named_modules():
        if isinstance(layer, _QuantConv) and layer.bn is not None:
            bn: Any = layer.bn
            weight, bias = fold_batch_norm(layer, bn)
            layer.bn = None
            layer._parameters["weight"], layer._parameters["bias"] = weight, bias
            if name in by_layer:
                info.live.remove(by_layer[name])
                info.folded.append(by_layer[name])
    return widen_scales(model)


@torch.no_grad()
def restore(model: nn.Module) -> nn.Module:
    """Undo `prepare`: a float model of the user's class, with the weights as they are now.

    A model that was not trained since comes back bit for bit. Folded batch norms are unfolded: their
    statistics and γ stay, weights and β carry what was learned.

    Args:
        model: a model from `prepare` or `swap`, possibly inside DDP.

    Returns:
        A new model; the quantized one is untouched.

    Raises:
        UnsupportedError: the model was not made by `prepare`.
    """
    if swap_info(unwrap(model)) is not None:
        return unswapped(unwrap(model))
    info = prepare_info(model)
    traced: Any = getattr(model, "module", model) if not isinstance(model, fx.GraphModule) else model
    assert info.origin is not None
    out = copy_model(info.origin)
    device = next((p.device for p in traced.parameters()), torch.device("cpu"))
    out.to(device)
    plain = plain_copy(out) if info.plain_weights else out
    folded = {record.layer for record in info.folded}
    for name, key in info.plain_weights:
        if name not in folded and (now := _held(traced, name, key)) is not None:
            plain.get_submodule(name).get_parameter(key).copy_(now)
    for name, target in info.transposed.items():
        plain.get_parameter(target).copy_(traced.get_submodule(name).weight.t())
    for record in info.folded:
        now = traced.get_submodule(record.layer)
        unfold_batch_norm(
            now.weight, now.bias, plain.get_submodule(record.layer), plain.get_submodule(record.batch_norm)
        )
    for name in info.convolved:
        now = traced.get_submodule(name)
        batch_norm_of(now.weight, now.bias, plain.get_submodule(name))
    for name, key in info.plain_weights:
        put_back(out.get_submodule(name), key, plain.get_submodule(name).get_parameter(key).detach())
    return out.train(traced.training)


def _held(traced: nn.Module, name: str, key: str) -> Tensor | None:
    """A parameter of the graph, or None if the graph does not use it."""
    try:
        return traced.get_submodule(name).get_parameter(key).detach()
    except AttributeError:
        return None
