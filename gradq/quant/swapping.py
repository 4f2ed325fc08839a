"""Layers become their quantized forms; layers that share a weight share its quantizer."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, fx, nn

from gradq.quant.attention import (
    QuantMultiheadAttention,
    QuantTransformerEncoder,
    QuantTransformerEncoderLayer,
)
from gradq.quant.config import Config
from gradq.quant.fake import WeightQuant
from gradq.quant.formats import Format
from gradq.quant.info import PrepareInfo
from gradq.quant.layers import CONVOLUTIONS, layer_kind
from gradq.quant.lstm import QuantLSTM, why_lstm_stays_float
from gradq.quant.modules import (
    QUANTIZED,
    QuantEmbedding,
    QuantLayer,
    QuantLinear,
)
from gradq.quant.operators import op_name
from gradq.quant.recurrent import QuantGRUCell, QuantLSTMCell, why_float
from gradq.quant.transposed import TRANSPOSED, why_transposed_stays_float

__all__ = ["Swapper", "lookup_format", "set_module"]

_FUSED_RECURRENT = (nn.GRU, nn.RNN, nn.RNNCell)
_COMPOSITES = (
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.Transformer,
)
_PRODUCTS = frozenset({
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "bilinear", "lstm", "gru", "rnn_tanh",
    "rnn_relu", "embedding_bag",
})  # fmt: skip
_FLOAT_WEIGHTS = (nn.ConvTranspose3d, nn.Bilinear, nn.EmbeddingBag)


def set_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of a qualified name."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def lookup_format(model: nn.Module, table: nn.Embedding, name: str, config: Config) -> Format | None:
    """Format of an embedding's table.

    A table that is a linear layer's weight, too, stays one: 7 bits, as that layer takes on processors without
    VNNI, hold for both.

    Args:
        model: holds the table and the layer.
        table: the embedding.
        name: its qualified name.
        config: formats.
    """
    fmt = config.weight_format(name, embedding=True)
    for other, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight is table.weight and fmt is not None:
            shared = config.weight_format(other)
            if shared is not None and shared.bits == 7 and shared == fmt.with_bits(7):
                return shared
    return fmt


class Swapper:
    """Replaces the layers of a graph, in place.

    Args:
        traced: the graph.
        config: formats, and what is skipped.
        info: the list of layers that stay in float, added to.
    """

    def __init__(self, traced: fx.GraphModule, config: Config, info: PrepareInfo) -> None:
        self.traced, self.config, self.info = traced, config, info
        # by identity; the values hold the objects, so that no id is used twice
        self.quantizers: dict[int, tuple[Tensor, WeightQuant]] = {}
        self.swapped: dict[int, tuple[nn.Module, nn.Module]] = {}

    def run(self) -> None:
        """Replace every layer that the graph calls."""
        for node in list(self.traced.graph.nodes):
            if node.op == "call_module":
                name = str(node.target)
                module = self.traced.get_submodule(name)
                new = self.swap(name, module, node)
                if new is not module:
                    set_module(self.traced, name, new)
            elif node.op == "get_attr" and _is_weight(self.traced, node):
                skipped = next(
                    (u.meta["gradq_skipped"] for u in node.users if "gradq_skipped" in u.meta), None
                )
                reason = "skipped by the configuration"
                if skipped is None:
                    reason = (
                        f"a bare parameter that {op_name(next(iter(node.users)))} reads; put it in a layer"
                    )
                self.info.float_islands.append((str(node.target), reason))

    def swap(self, name: str, module: nn.Module, node: fx.Node | None) -> nn.Module:
        """The quantized form of a module (or the module itself); `node` is None inside a composite."""
        if self.config.is_skipped(name):
            if any(True for _ in module.parameters()):
                self.info.float_islands.append((name, "skipped by the configuration"))
            return module
        if id(module) in self.swapped:
            return self.swapped[id(module)][1]
        if isinstance(module, _FUSED_RECURRENT):
            self.info.float_islands.append((name, why_float(module)))
            return module
        if isinstance(module, _FLOAT_WEIGHTS):
            self.info.float_islands.append((name, f"nn.{type(module).__name__} has no integer form here"))
            return module
        if isinstance(module, QuantLayer):
            return module
        if isinstance(module, nn.LSTM) and (reason := why_lstm_stays_float(module, self.config, name)):
            self.info.float_islands.append((name, reason))
            return module
        if isinstance(module, tuple(TRANSPOSED)) and (reason := why_transposed_stays_float(module)):
            self.info.float_islands.append((name, reason))
            return module
        new = self._swap(name, module, node)
        self.swapped[id(module)] = module, new
        return new

    def _swap(self, name: str, module: nn.Module, node: fx.Node | None) -> nn.Module:
        config = self.config
        kind = next((k for k in TRANSPOSED if isinstance(module, k)), None) or layer_kind(module)
        convolution = kind in CONVOLUTIONS or kind in TRANSPOSED
        whole_channels = convolution or isinstance(module, nn.LSTM)
        embedding = isinstance(module, nn.Embedding)
        kw = {"observer": config.observer, "weight_observer": config.weight_observer, "name": name}
        if isinstance(module, _COMPOSITES):
            return self._swap_inside(name, module)
        fmt = config.weight_format(name, convolution=whole_channels, embedding=embedding)
        if isinstance(module, nn.Embedding):
            fmt = lookup_format(self.traced, module, name, config)
        act = config.activation_format(convolution=convolution)
        own = act if node is None else None  # inside a composite there is no graph to place quantizers in
        new: QuantLayer
        if convolution:
            if fmt is None:
                return module
            new = (QUANTIZED | TRANSPOSED)[kind].from_float(module, fmt, None, **kw)  # type: ignore[index]
        elif isinstance(module, nn.MultiheadAttention):
            if fmt is None:
                return module
            new = QuantMultiheadAttention.from_float(
                module, fmt, act, num_inputs=_distinct_inputs(node), **kw
            )
        elif kind is nn.Linear:
            if fmt is None:
                return module
            new = QuantLinear.from_float(module, fmt, own, **kw)  # type: ignore[arg-type]
        elif embedding and fmt is not None:
            new = QuantEmbedding.from_float(module, fmt, **kw)  # type: ignore[arg-type]
        elif isinstance(module, nn.LSTM) and fmt is not None:
            new = QuantLSTM.from_float(module, fmt, weight_observer=config.weight_observer, name=name)
        elif isinstance(module, (nn.LSTMCell, nn.GRUCell)) and fmt is not None:
            cell = QuantLSTMCell if isinstance(module, nn.LSTMCell) else QuantGRUCell
            new = cell.from_float(module, fmt, act, **kw)
        else:
            self._list_float(name, module)
            return module
        self._share_quantizer(new, fmt)
        return new

    def _list_float(self, name: str, module: nn.Module) -> None:
        """A convolution or linear layer with a forward of its own stays in float, and is listed."""
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)) and self.config.weights is not None:
            self.info.float_islands.append(
                (
                    name,
                    f"{type(module).__name__} has a forward of its own; write it with functional.linear or "
                    "functional.conv2d on its weight, or inherit the forward, to quantize it",
                )
            )

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
    products = any(op_name(user) in _PRODUCTS for user in node.users)
    return products and isinstance(value, nn.Parameter) and value.ndim > 1


def _distinct_inputs(node: fx.Node | None) -> int:
    """1 for self attention, 2 if key and value are one tensor, 3 otherwise."""
    if node is None:
        return 1
    names = ("query", "key", "value")
    given = [*node.args, *(node.kwargs.get(n) for n in names[len(node.args) :])][:3]
    if given[0] is given[1] and given[1] is given[2]:
        return 1
    return 2 if given[1] is given[2] else 3
