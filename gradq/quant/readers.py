"""Which quantizers a layer reads through, and weight scales that leave room for the layer's int32 bias.

An integer kernel adds the bias as an int32 with the scale ``input scale × weight scale``. Where the weights
of a channel are nearly zero (a dead filter to which batch norm adds a constant) that scale is so small that
the bias does not fit. The quantizer of such a channel gets a wider weight scale, so that the simulation, the
integer reference and every file use the same one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from gradq.quant.batches import unwrap
from gradq.quant.fake import ActQuant, WeightQuant
from gradq.quant.modules import QuantLayer
from gradq.quant.operators import source_of

__all__ = ["input_quantizers", "widen_scales"]

_LARGEST_BIAS = 2.0**30  # largest code of a bias, which leaves half the range for the sum of products
_SMALLEST_STEP = 2.0**-122  # smallest step of an accumulator that fp32 can invert and divide by a scale


def input_quantizers(model: nn.Module) -> dict[str, list[ActQuant]]:
    """Layer name → the activation quantizers of its inputs, one for each call; its own come first.

    Args:
        model: model from `prepare`, or one with layers placed by hand.
    """
    model = unwrap(model)
    found: dict[str, list[ActQuant]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            own = [getattr(module, key, None) for key in ("input_quant", "key_quant", "value_quant")]
            if any(q is not None for q in own):
                found[name] = [q for q in own if q is not None]
    for prefix, graph in model.named_modules():
        if not isinstance(graph, fx.GraphModule):
            continue
        for node in graph.graph.nodes:
            if node.op != "call_module" or not node.args or not isinstance(node.args[0], fx.Node):
                continue
            if not isinstance(graph.get_submodule(str(node.target)), QuantLayer):
                continue
            source = source_of(node.args[0], graph)
            quantizer = graph.get_submodule(str(source.target)) if source.op == "call_module" else None
            if isinstance(quantizer, ActQuant):
                name = f"{prefix}.{node.target}" if prefix else str(node.target)
                found.setdefault(name, []).append(quantizer)
    return found


@torch.no_grad()
def widen_scales(model: nn.Module) -> nn.Module:
    """Widen the weight scales of the channels whose bias would not fit into an int32, in place.

    Args:
        model: calibrated model.

    Returns:
        The model.
    """
    readers = input_quantizers(model)
    for name, layer in unwrap(model).named_modules():
        if not isinstance(layer, QuantLayer) or getattr(layer, "bn", None) is not None:
            continue
        static = [q.scale for q in readers.get(name, []) if not q.format.is_dynamic and q.initialized]
        if static:
            smallest = torch.stack(static).min()
            _widen(layer.weight_quant, layer.effective_bias(), smallest)
        hidden = getattr(layer, "hidden_quant", None)
        if hidden is not None and not hidden.format.is_dynamic and hidden.initialized:
            any_layer: Any = layer
            _widen(
                any_layer.hidden_weight_quant,
                any_layer.bias_hh if any_layer.bias else None,
                hidden.scale.min(),
            )
    return model


def _widen(quantizer: WeightQuant, bias: Tensor | None, input_scale: Tensor) -> None:
    fmt = quantizer.format
    if fmt.granularity == "group" or fmt.is_float8 or not quantizer.initialized:
        return  # layers of these formats have a bias in float
    scale = quantizer.scale.double()
    low = torch.full_like(scale, _SMALLEST_STEP) / input_scale
    if bias is not None:
        needed = bias.detach().double().abs() / _LARGEST_BIAS / input_scale
        low = torch.maximum(low, needed.max() if fmt.granularity == "tensor" else needed)
    if bool((scale < low).any()):
        # The scale is a little wider than needed, because it is kept as a rounded logarithm.
        wide = torch.where(scale < low, low * (1 + 2.0**-20), scale)
        quantizer.set_range(wide.float(), quantizer.zero_point.clone())
