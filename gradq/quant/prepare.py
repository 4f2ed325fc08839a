"""`prepare` makes a quantized copy of a model; `restore` undoes it; `finalize` folds live batch norm.

The order: copy → trace → check that the graph computes what the model did → fold batch norm → equalize (if
asked) → swap layers → place activation quantizers. The user's model is never touched.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from gradq.errors import NonFiniteError, TraceError, UnsupportedError
from gradq.quant.attention import (
    QuantMultiheadAttention,
    QuantTransformerEncoder,
    QuantTransformerEncoderLayer,
)
from gradq.quant.config import Config
from gradq.quant.fake import WeightQuant
from gradq.quant.folding import FoldRecord, equalize_pair, fold_batch_norm, unfold_batch_norm
from gradq.quant.formats import Format
from gradq.quant.modules import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantEmbedding,
    QuantLayer,
    QuantLinear,
    _QuantConv,
)
from gradq.quant.placement import matches, place_activations
from gradq.quant.recurrent import QuantGRUCell, QuantLSTMCell, refuse_recurrent
from gradq.quant.tracing import example_arguments, float_tensors, trace

__all__ = ["PrepareInfo", "finalize", "prepare", "prepare_info", "restore"]

_CONVOLUTIONS: dict[type[nn.Module], Any] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FUSED_RECURRENT = (nn.LSTM, nn.GRU, nn.RNN, nn.RNNCell)
_COMPOSITES = (
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.Transformer,
)
_FLOAT_WEIGHTS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Bilinear, nn.EmbeddingBag)


@dataclass
class PrepareInfo:
    """What `prepare` did; kept in ``qmodel.meta["gradq_quant"]``.

    Attributes:
        config: as given.
        float_islands: (name, reason) of layers with weights that stay in float.
        activations: names of the activation quantizers, in the graph's order.
        folded: which batch norms went into which layers.
        origin: the float model's copy, for `restore`; it shares every parameter that was not folded.
        example_inputs: positional and keyword arguments it was prepared with, for exporters.
    """

    config: Config
    float_islands: list[tuple[str, str]] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    folded: list[FoldRecord] = field(default_factory=list)
    live: list[FoldRecord] = field(default_factory=list)
    origin: nn.Module | None = None
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None


def prepare(model: nn.Module, example_inputs: Any, config: Config | None = None) -> fx.GraphModule:
    """Make a quantized copy of a model.

    Weights are fitted here; activations get their ranges in `gradq.quant.calibrate`.

    Args:
        model: any model `torch.fx` can trace; untouched.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments; used to trace and to
            check.
        config: formats and placement; `Config()` if None.

    Returns:
        A graph module with the model's parameter names, in the model's training mode.

    Raises:
        TraceError: fx cannot trace the model; the message names the line and what to do.
        UnsupportedError: a layer that cannot be quantized and is not in `Config.skip`; named.
        NonFiniteError: a weight that holds NaN or Inf; named.
    """
    config = config or Config()
    args, kwargs = example_arguments(example_inputs)
    _check_weights(model)
    origin = copy.deepcopy(model)
    traced = trace(origin, args, kwargs, config)
    _check_same(model, traced, args, kwargs)
    floats = float_tensors(traced, args, kwargs)
    info = PrepareInfo(config=config, origin=origin, example_inputs=_kept((args, kwargs)))
    _batch_norms(traced, config, info)
    if config.equalize:
        _equalize(traced)
    _Swapper(traced, config, info).run()
    _attach_live(traced, info)
    info.activations = place_activations(traced, floats, config)
    traced.graph.lint()
    traced.recompile()
    traced.meta["gradq_quant"] = info
    return traced


def _kept(arguments: Any) -> Any:
    """The arguments on the CPU, apart from the caller's."""

    def keep(x: Any) -> Any:
        return x.detach().cpu().clone() if isinstance(x, Tensor) else x

    return torch.utils._pytree.tree_map(keep, arguments)


def prepare_info(model: nn.Module) -> PrepareInfo:
    """What `prepare` did to a model.

    Raises:
        UnsupportedError: the model was not made by `prepare`.
    """
    model = getattr(model, "module", model) if not isinstance(model, fx.GraphModule) else model
    info = getattr(model, "meta", {}).get("gradq_quant") if isinstance(model, fx.GraphModule) else None
    if not isinstance(info, PrepareInfo):
        raise UnsupportedError(
            f"{type(model).__name__} was not made by gradq.quant.prepare; this function needs its graph"
        )
    return info


def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(parameter.detach().isfinite().all()):
            raise NonFiniteError(
                f"parameter {name} holds NaN or Inf; repair or reload the checkpoint before quantizing"
            )


def _check_same(
    model: nn.Module, traced: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """The traced graph must compute what the model computes."""
    results = []
    for candidate in (copy.deepcopy(model).eval(), traced):
        mode = candidate.training
        candidate.eval()
        with torch.no_grad():
            results.append(candidate(*args, **kwargs))
        candidate.train(mode)
    expected, got = (torch.utils._pytree.tree_leaves(r) for r in results)
    for i, (a, b) in enumerate(zip(expected, got, strict=True)):
        if isinstance(a, Tensor) and not torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise TraceError(
                f"output {i} of the traced {type(model).__name__} differs from the model's by up to "
                f"{float((a - b).abs().max()):.3g}: its forward depends on state that fx does not see"
            )


def _batch_norms(traced: fx.GraphModule, config: Config, info: PrepareInfo) -> None:
    """Fold each batch norm into the layer before it, or note it to stay live."""
    calls: dict[str, int] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not isinstance(traced.get_submodule(node.target), _BATCH_NORMS):
            continue
        bn: Any = traced.get_submodule(node.target)
        before = node.args[0]
        layer = traced.get_submodule(before.target) if before.op == "call_module" else None
        reason = None
        if type(layer) not in (*_CONVOLUTIONS, nn.Linear):
            reason = "no convolution or linear layer in front of it"
        elif isinstance(layer, nn.Linear) and config.batch_norm == "train":
            reason = "live batch norm is for convolutions; use batch_norm='fold'"
        elif len(before.users) > 1 or calls[before.target] > 1 or calls[node.target] > 1:
            reason = f"{before.target} or its output is used more than once"
        elif bn.running_var is None:
            reason = "it keeps no running statistics"
        elif config.is_skipped(before.target) or config.is_skipped(node.target):
            reason = "skipped by the configuration"
        if reason is not None:
            info.float_islands.append((node.target, f"batch norm not folded: {reason}"))
            continue
        record = FoldRecord(before.target, node.target)
        if config.batch_norm == "train":
            info.live.append(record)
            continue
        assert layer is not None
        folded = copy.copy(layer)
        folded._parameters = dict(layer._parameters)
        folded._parameters["weight"], folded._parameters["bias"] = fold_batch_norm(layer, bn)
        _set_module(traced, before.target, folded)
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
        traced.delete_submodule(node.target)
        info.folded.append(record)


def _equalize(traced: fx.GraphModule) -> None:
    """Equalize every pair of layers with nothing but ReLU and pooling between them."""
    layers = (*_CONVOLUTIONS, nn.Linear)
    uses: dict[int, int] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            for parameter in traced.get_submodule(node.target).parameters():
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for node in traced.graph.nodes:
        if node.op != "call_module" or type(traced.get_submodule(node.target)) not in layers:
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
        if type(second) is not type(first) or getattr(second, "groups", 1) != 1:
            continue
        if any(uses[id(p)] > 1 for p in (*first.parameters(), *second.parameters())):
            continue
        equalize_pair(first, second)


def _set_module(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


class _Swapper:
    """Replaces layers by their quantized forms; layers that share a weight share its quantizer."""

    def __init__(self, traced: fx.GraphModule, config: Config, info: PrepareInfo) -> None:
        self.traced, self.config, self.info = traced, config, info
        # by identity; the values hold the objects, so that no id is used twice
        self.quantizers: dict[int, tuple[Tensor, WeightQuant]] = {}
        self.swapped: dict[int, tuple[nn.Module, nn.Module]] = {}

    def run(self) -> None:
        for node in list(self.traced.graph.nodes):
            if node.op == "call_module":
                name = str(node.target)
                module = self.traced.get_submodule(name)
                new = self.swap(name, module, node)
                if new is not module:
                    _set_module(self.traced, name, new)
            elif node.op == "get_attr" and _is_weight(self.traced, node):
                self.info.float_islands.append(
                    (str(node.target), "a bare parameter; put it in a layer to quantize it")
                )

    def swap(self, name: str, module: nn.Module, node: fx.Node | None) -> nn.Module:
        """The quantized form of a module (or the module itself); `node` is None inside a composite."""
        if self.config.is_skipped(name):
            if any(True for _ in module.parameters()):
                self.info.float_islands.append((name, "skipped by the configuration"))
            return module
        if id(module) in self.swapped:
            return self.swapped[id(module)][1]
        if isinstance(module, _FUSED_RECURRENT):
            refuse_recurrent(name, module)
        if isinstance(module, _FLOAT_WEIGHTS):
            self.info.float_islands.append((name, f"nn.{type(module).__name__} has no integer form here"))
            return module
        new = self._swap(name, module, node)
        self.swapped[id(module)] = module, new
        return new

    def _swap(self, name: str, module: nn.Module, node: fx.Node | None) -> nn.Module:
        config = self.config
        convolution, embedding = type(module) in _CONVOLUTIONS, isinstance(module, nn.Embedding)
        kw = {"observer": config.observer, "weight_observer": config.weight_observer, "name": name}
        if isinstance(module, _COMPOSITES):
            return self._swap_inside(name, module)
        if isinstance(module, QuantLayer):
            return module
        fmt = config.weight_format(name, convolution=convolution, embedding=embedding)
        act = config.activation_format(convolution=convolution)
        own = act if node is None else None  # inside a composite there is no graph to place quantizers in
        new: QuantLayer
        if convolution:
            if fmt is None:
                return module
            new = _CONVOLUTIONS[type(module)].from_float(module, fmt, None, **kw)
        elif isinstance(module, nn.MultiheadAttention):
            if fmt is None:
                return module
            new = QuantMultiheadAttention.from_float(
                module, fmt, act, num_inputs=_distinct_inputs(node), **kw
            )
        elif isinstance(module, nn.Linear):
            if fmt is None:
                return module
            new = QuantLinear.from_float(module, fmt, own, **kw)
        elif embedding and fmt is not None:
            new = QuantEmbedding.from_float(module, fmt, **kw)  # type: ignore[arg-type]
        elif isinstance(module, (nn.LSTMCell, nn.GRUCell)) and fmt is not None:
            cell = QuantLSTMCell if isinstance(module, nn.LSTMCell) else QuantGRUCell
            new = cell.from_float(module, fmt, act, **kw)
        else:
            return module
        self._share_quantizer(new, fmt)
        return new

    def _share_quantizer(self, layer: QuantLayer, fmt: Format) -> None:
        """Tied weights have one quantizer."""
        weight = layer.effective_weight()
        known = self.quantizers.setdefault(id(weight), (weight, layer.weight_quant))[1]
        if known is not layer.weight_quant and known.format == fmt:
            layer.weight_quant = known

    def _swap_inside(self, name: str, module: nn.Module) -> nn.Module:
        """Swap the layers inside one of torch's transformer containers, on a copy with shared parameters."""
        memo: dict[int, Any] = {id(p): p for p in [*module.parameters(), *module.buffers()]}
        module = copy.deepcopy(module, memo)
        if type(module) is nn.TransformerEncoder:
            module.__class__ = QuantTransformerEncoder
        if type(module) is nn.TransformerEncoderLayer:
            module.__class__ = QuantTransformerEncoderLayer
        for child_name, child in list(module.named_children()):
            path = f"{name}.{child_name}"
            if isinstance(child, nn.ModuleList):
                for i, item in enumerate(child):
                    child[i] = self.swap(f"{path}.{i}", item, None)
            elif isinstance(child, nn.MultiheadAttention) and not self.config.is_skipped(path):
                fmt = self.config.weight_format(path)
                if fmt is None:
                    continue
                new = QuantMultiheadAttention.from_float(
                    child,
                    fmt,
                    self.config.activation_format(),
                    num_inputs=2 if child_name == "multihead_attn" else 1,
                    observer=self.config.observer,
                    weight_observer=self.config.weight_observer,
                    name=path,
                )
                setattr(module, child_name, new)
            else:
                setattr(module, child_name, self.swap(path, child, None))
        return module


def _is_weight(traced: fx.GraphModule, node: fx.Node) -> bool:
    value: Any = traced
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return isinstance(value, nn.Parameter) and value.ndim > 1


def _distinct_inputs(node: fx.Node | None) -> int:
    """1 for self attention, 2 if key and value are one tensor, 3 otherwise."""
    if node is None:
        return 1
    names = ("query", "key", "value")
    given = [*node.args, *(node.kwargs.get(n) for n in names[len(node.args) :])][:3]
    if given[0] is given[1] and given[1] is given[2]:
        return 1
    return 2 if given[1] is given[2] else 3


def _attach_live(traced: fx.GraphModule, info: PrepareInfo) -> None:
    """Move each live batch norm into its convolution."""
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


@torch.no_grad()
def finalize(model: nn.Module) -> nn.Module:
    """Fold every live batch norm into its convolution, in place: afterwards the model is ready to export.

    The folded weight is the very tensor that was quantized while training, so in evaluation the model
    computes the same up to the rounding of fp32.

    Args:
        model: from `prepare` with ``batch_norm="train"``, or built by hand. Others are left as they are.

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
    return model


@torch.no_grad()
def restore(model: nn.Module) -> nn.Module:
    """Undo `prepare`: a float model of the user's class, with the weights as they are now.

    A model that was not trained since comes back bit for bit. Folded batch norms are unfolded: their
    statistics and γ stay, weights and β carry what was learned.

    Args:
        model: from `prepare`, possibly inside DDP.

    Returns:
        A new model; the quantized one is untouched.

    Raises:
        UnsupportedError: the model was not made by `prepare`.
    """
    info = prepare_info(model)
    traced: Any = getattr(model, "module", model) if not isinstance(model, fx.GraphModule) else model
    assert info.origin is not None
    out = copy.deepcopy(info.origin)
    device = next((p.device for p in traced.parameters()), torch.device("cpu"))
    out.to(device)
    for record in info.folded:
        now = traced.get_submodule(record.layer)
        unfold_batch_norm(
            now.weight, now.bias, out.get_submodule(record.layer), out.get_submodule(record.batch_norm)
        )
    return out.train(traced.training)
