"""GPTQ: round a linear layer's weights one input at a time; the inputs not yet rounded make up for it.

Shapes: O outputs, I inputs, n rows (tokens) that the layer reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gradq.errors import ConfigError
from gradq.quant.batches import ToInputs, evaluating, kept, progress, run_batch, unwrap, watching
from gradq.quant.fake import WeightQuant
from gradq.quant.modules import QuantLinear

__all__ = ["gptq"]


def gptq(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    num_batches: int | None = None,
    damping: float = 0.01,
    to_inputs: ToInputs | None = None,
    show_progress: bool = True,
) -> nn.Module:
    """Choose the codes of every linear layer by the second moments of what it reads, in place.

    GPTQ (Frantar et al. 2023, arXiv:2210.17323): inputs are rounded in the order of their energy, and the
    error of each is spread over those that follow by the inverse of the inputs' second moments. Scales stay
    as they were fitted. One input is looked at after another, each with what the layers before it now give
    it, so that only one layer's (I, I) moments are held at a time. The codes become the weights. For uniform
    formats; layers with other formats, layers whose weight is an embedding, too, and layers that are not
    linear are left as they are, and so is a layer for which the nearest codes are better on these batches.

    Args:
        model: a model from `prepare` or `swap`, calibrated.
        loader: batches; no labels are needed.
        num_batches: batches to use; None for all.
        damping: share of the mean energy that is added to every input's.
        to_inputs: batch → the model's arguments, if the default does not fit.
        show_progress: a progress bar on stderr.

    Returns:
        The model.

    Raises:
        ConfigError: a damping that is not positive.
        CalibrationError: no batch, or a quantizer without a range.
    """
    if not damping > 0:
        raise ConfigError(f"damping is {damping}; legal: greater than 0, for instance 0.01")
    model = unwrap(model)
    batches = kept(loader, num_batches)
    with evaluating(model):
        groups = _in_order(model, batches[0], to_inputs)
        for layers in progress(groups, "rounding by second moments", show=show_progress):
            moments = _moments(model, layers[0], batches, to_inputs)
            for layer in layers:
                layer.weight.copy_(_rounded(layer.weight.detach(), layer.weight_quant, moments, damping))
    return model


def _in_order(model: nn.Module, batch: Any, to_inputs: ToInputs | None) -> list[list[QuantLinear]]:
    """The linear layers that run, in the order in which they first run; weights of several layers once.

    Layers that read the same tensor one after another stand together: they share its moments.
    """
    order: list[list[QuantLinear]] = []
    seen: set[int] = set()
    last: list[Any] = [None, None]
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found = [
        m
        for m in model.modules()
        if isinstance(m, QuantLinear) and m.weight_quant.format.is_uniform and id(m.weight) not in tied
    ]

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        assert isinstance(module, QuantLinear)
        if id(module.weight) in seen:
            return
        seen.add(id(module.weight))
        if order and last[0] is inputs[0] and last[1] is module.input_quant:
            order[-1].append(module)
        else:
            order.append([module])
        last[:] = inputs[0], module.input_quant

    hooks = [m.register_forward_hook(note) for m in found]
    with watching(hooks):
        run_batch(model, batch, to_inputs)
    return order


def _moments(model: nn.Module, layer: QuantLinear, batches: list[Any], to_inputs: ToInputs | None) -> Tensor:
    """(I, I) fp64 second moments of what the layer multiplies its weight by."""
    size, device = layer.in_features, layer.weight.device
    total = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0] if layer.input_quant is None else layer.input_quant(inputs[0])
        rows = x.detach().reshape(-1, layer.in_features)
        total.addmm_(rows.t().double(), rows.double())

    with watching([layer.register_forward_pre_hook(add)]):
        for batch in batches:
            run_batch(model, batch, to_inputs)
    return total


def _rounded(weight: Tensor, quantizer: WeightQuant, moments: Tensor, damping: float) -> Tensor:
    """(O, I): the weight on its grid."""
    fmt, inputs = quantizer.format, weight.shape[1]
    energy = moments.diagonal()
    silent = energy == 0
    damped = moments.clone()
    damped.diagonal().add_(damping * energy.mean() + silent.double())
    nearest = quantizer(weight).double()
    scale, zero_point = (
        quantizer.unrows(part.double()[:, None].expand_as(quantizer.rows(weight)), weight.shape)
        for part in (quantizer.scale.detach(), quantizer.zero_point)
    )
    if quantizer.num_rows == 1:
        scale, zero_point = scale.expand_as(weight), zero_point.expand_as(weight)
    order = energy.argsort(descending=True)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    left, out = weight.double()[:, order], torch.empty_like(nearest)
    for i, column in enumerate(order.tolist()):
        s, z = scale[:, column], zero_point[:, column]
        codes = ((left[:, i] / s).round() + z).clamp(fmt.qmin, fmt.qmax)
        out[:, column] = (codes - z) * s
        if i + 1 < inputs:
            error = (left[:, i] - out[:, column]) / factor[i, i]
            left[:, i + 1 :].addr_(error, factor[i, i + 1 :], alpha=-1.0)

    def lost(candidate: Tensor) -> float:
        difference = candidate - weight.double()
        return float(((difference @ moments) * difference).sum())

    best = out if lost(out) < lost(nearest) else nearest
    return best.to(weight.dtype)
