"""One calibrated model in the number formats of another processor, without new data.

Ranges that were calibrated or trained are kept where the format allows it. Where weights get fewer bits,
their ranges are fitted again; where activations become symmetric, the new range covers the asymmetric one.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from gradq.errors import ConfigError
from gradq.quant.batches import unwrap
from gradq.quant.calibrate import quantizers, weights
from gradq.quant.fake import ActQuant, WeightQuant
from gradq.quant.formats import Format, parse_format
from gradq.quant.modules import QuantLayer, QuantLinear

__all__ = ["VARIANTS", "variant"]

VARIANTS = ("x86-vnni", "x86-avx2", "arm", "edge-int4")


@torch.no_grad()
def variant(model: nn.Module, target: str) -> nn.Module:
    """A copy of a calibrated model in a target's formats.

    * ``x86-vnni``: the model as it is, with u8 activations and weights of up to 8 bits.
    * ``x86-avx2``: 8-bit weights get 7 bits: without VNNI two products of 8-bit weights overflow 16 bits.
    * ``arm``: activations become s8 symmetric.
    * ``edge-int4``: linear layers get 4-bit weights in groups of 32, for batch 1, where half the memory
      traffic of 8 bits counts, and the runtime quantizes their inputs; convolutions get 4 bits per channel.

    Args:
        model: model from `prepare` and `calibrate`; it is not changed.
        target: name of the target, one of `VARIANTS`.

    Returns:
        The copy. Its `gradq.quant.integer_reference` beside the model's shows what the formats cost.

    Raises:
        ConfigError: a target that is none of them.
    """
    if target not in VARIANTS:
        raise ConfigError(f"target is {target!r}; legal: {', '.join(VARIANTS)}")
    out = copy.deepcopy(unwrap(model)).eval()
    if target == "x86-avx2":
        for weight, quantizer in weights(out).values():
            if quantizer.format.is_uniform and quantizer.format.bits == 8:
                quantizer.set_bits(7, weight)
    elif target == "arm":
        for act in quantizers(out).values():
            _make_symmetric(act)
    elif target == "edge-int4":
        _make_int4(out)
    return out


def _make_symmetric(quantizer: ActQuant) -> None:
    fmt = quantizer.format
    if fmt.symmetric or fmt.is_dynamic:
        return
    scale, zero = quantizer.scale.detach(), quantizer.zero_point
    low, high = (fmt.qmin - zero) * scale, (fmt.qmax - zero) * scale
    quantizer.format = replace(fmt, symmetric=True)
    new = quantizer.format
    quantizer.set_range(torch.maximum(high / new.qmax, low / new.qmin), torch.zeros_like(zero))


def _make_int4(model: nn.Module) -> None:
    grouped, per_channel = parse_format("int4-g32", "weights"), parse_format("int4", "weights")
    replaced: dict[int, WeightQuant] = {}
    read_by_linear = _inputs_of_linear(model)
    for module in model.modules():
        if not isinstance(module, QuantLayer) or module.is_embedding:
            continue
        fmt = grouped if isinstance(module, QuantLinear) else per_channel
        old = module.weight_quant
        if id(old) not in replaced:
            replaced[id(old)] = _refitted(old, module.effective_weight(), fmt)
        module.weight_quant = replaced[id(old)]
    for name, quantizer in quantizers(model).items():
        if name in read_by_linear:
            new = ActQuant("int8-token", observer=quantizer.observer_kind, name=quantizer.name)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)


def _refitted(old: WeightQuant, weight: torch.Tensor, fmt: Format) -> WeightQuant:
    new = WeightQuant(fmt, weight.shape, observer=old.observer_kind, name=old.name).to(weight.device)
    new.fit(weight)
    return new


def _inputs_of_linear(model: nn.Module) -> set[str]:
    """Names of the activation quantizers that nothing but linear layers read."""
    found = {f"{n}.input_quant" for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    if isinstance(model, torch.fx.GraphModule):
        for node in model.graph.nodes:
            if node.op != "call_module" or not isinstance(model.get_submodule(node.target), ActQuant):
                continue
            if node.users and all(
                u.op == "call_module" and isinstance(model.get_submodule(str(u.target)), QuantLinear)
                for u in node.users
            ):
                found.add(str(node.target))
    return found
