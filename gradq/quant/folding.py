"""Fold batch norm into the layer before it, or write it as a convolution; undo that; equalize channels.

Shapes: O output channels. A fold is ``w·f`` and ``β + (b − μ)·f`` with ``f = γ/√(σ² + ε)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "FoldRecord",
    "batch_norm_of",
    "convolution_of",
    "equalize_pair",
    "fold_batch_norm",
    "unfold_batch_norm",
]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class FoldRecord:
    """Which batch norm went into which layer (qualified names in the user's model)."""

    layer: str
    batch_norm: str


def _factors(bn: Any) -> tuple[Tensor, Tensor]:
    """(O,) fp64 f, and fp64 β."""
    f = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        f = f * bn.weight.detach().double()
    beta = bn.bias.detach().double() if bn.bias is not None else torch.zeros_like(f)
    return f, beta


def _per_output(layer: Any, f: Tensor) -> Tensor:
    """(O,) factors in the shape of the layer's weight: (O, …) or, transposed, (I, O / groups, …)."""
    ones = (1,) * (layer.weight.ndim - 2)
    if not isinstance(layer, _TRANSPOSED):
        return f.view(-1, 1, *ones)
    apart = f.view(layer.groups, 1, -1).expand(-1, layer.in_channels // layer.groups, -1)
    return apart.reshape(layer.in_channels, -1, *ones)


@torch.no_grad()
def fold_batch_norm(layer: Any, bn: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of one layer that computes layer and batch norm (in evaluation).

    Args:
        layer: a linear layer or (transposed) convolution of O outputs.
        bn: its batch norm, O features. Neither is changed.

    Returns:
        weight like the layer's and bias (O,), new parameters.
    """
    f, beta = _factors(bn)
    weight = layer.weight.double() * _per_output(layer, f)
    bias = layer.bias.double() if layer.bias is not None else torch.zeros_like(f)
    bias = beta + (bias - bn.running_mean.double()) * f
    dtype = layer.weight.dtype
    return (
        nn.Parameter(weight.to(dtype), requires_grad=layer.weight.requires_grad),
        nn.Parameter(bias.to(dtype), requires_grad=layer.weight.requires_grad),
    )


@torch.no_grad()
def unfold_batch_norm(weight: Tensor, bias: Tensor, layer: Any, bn: Any) -> None:
    """Put folded (and since trained) parameters back into a layer and its batch norm, in place.

    If they are still what folding gives, the layer is left bit for bit as it was. Otherwise the statistics
    and γ stay, and the weight and β change; where γ is 0 the weight is kept and cannot have mattered.

    Args:
        weight: folded weight, of the shape of the layer's.
        bias: (O,) folded bias.
        layer: the original layer.
        bn: its batch norm.
    """
    folded_weight, folded_bias = fold_batch_norm(layer, bn)
    if torch.equal(folded_weight, weight) and torch.equal(folded_bias, bias):
        return
    f, _ = _factors(bn)
    dead = f == 0
    if bool(dead.any()) and bn.weight is not None:
        # a channel with γ = 0 has no inverse: give it f = 1
        bn.weight[dead] = (bn.running_var[dead] + bn.eps).sqrt()
        f, _ = _factors(bn)
    layer.weight.copy_((weight.double() / _per_output(layer, f)).to(layer.weight.dtype))
    old = layer.bias.double() if layer.bias is not None else torch.zeros_like(f)
    beta = bias.double() - (old - bn.running_mean.double()) * f
    if bn.bias is not None:
        bn.bias.copy_(beta.to(bn.bias.dtype))
    elif layer.bias is not None:
        layer.bias.copy_((bias.double() / f + bn.running_mean.double()).to(layer.bias.dtype))
    else:
        bn.running_mean.copy_(-(bias.double() / f).to(bn.running_mean.dtype))


@torch.no_grad()
def convolution_of(bn: Any, dims: int) -> nn.Conv1d | nn.Conv2d:
    """A batch norm in evaluation as a depthwise convolution of one element.

    Args:
        bn: C features with running statistics, γ and β; not changed.
        dims: spatial dimensions of what it reads, 1 or 2.

    Returns:
        weight (C, 1, 1) or (C, 1, 1, 1) and bias (C,), new parameters.
    """
    f, beta = _factors(bn)
    kind = nn.Conv1d if dims == 1 else nn.Conv2d
    layer = kind(bn.num_features, bn.num_features, 1, groups=bn.num_features, device="meta")
    for key, value in (
        ("weight", f.view(-1, 1, *(1,) * dims)),
        ("bias", beta - bn.running_mean.double() * f),
    ):
        layer._parameters[key] = nn.Parameter(value.to(bn.weight.dtype), bn.weight.requires_grad)
    return layer.train(bn.training)


@torch.no_grad()
def batch_norm_of(weight: Tensor, bias: Tensor, bn: Any) -> None:
    """Put the (since trained) parameters of a batch norm's convolution back into it, in place.

    If they are still what `convolution_of` gives, the norm is left bit for bit as it was. Otherwise the
    statistics stay, and γ and β change.

    Args:
        weight: (C, 1, 1) or (C, 1, 1, 1).
        bias: (C,).
        bn: the original batch norm.
    """
    layer = convolution_of(bn, weight.ndim - 2)
    if torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias):  # type: ignore[arg-type]
        return
    f = weight.flatten().double()
    bn.weight.copy_((f * (bn.running_var.double() + bn.eps).sqrt()).to(bn.weight.dtype))
    bn.bias.copy_((bias.double() + bn.running_mean.double() * f).to(bn.bias.dtype))


@torch.no_grad()
def equalize_pair(first: Any, second: Any) -> Tensor:
    """Cross-layer equalization of two layers with only ReLU (or nothing) between them, in place.

    Each channel's range becomes the geometric mean of its range in both layers
    (Nagel et al. 2019, arXiv:1906.04721); the pair computes the same function.

    Args:
        first: weight (O, …), bias (O,) or None.
        second: weight (P, O, …), not grouped.

    Returns:
        (O,) the factors the first layer's channels were divided by.
    """
    r1 = first.weight.detach().flatten(1).abs().amax(1).double()
    r2 = second.weight.detach().transpose(0, 1).flatten(1).abs().amax(1).double()
    usable = (r1 > 0) & (r2 > 0)
    s = torch.where(usable, (r1 / torch.sqrt(r1 * r2).clamp(min=1e-30)).clamp(1e-4, 1e4), torch.ones_like(r1))
    first.weight.copy_(
        (first.weight.double() / s.view(-1, *(1,) * (first.weight.ndim - 1))).to(first.weight.dtype)
    )
    if first.bias is not None:
        first.bias.copy_((first.bias.double() / s).to(first.bias.dtype))
    shape = (1, -1, *(1,) * (second.weight.ndim - 2))
    second.weight.copy_((second.weight.double() * s.view(shape)).to(second.weight.dtype))
    return s
