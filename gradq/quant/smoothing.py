"""Activation-aware scaling (AWQ) and SmoothQuant: channel scales between a norm and the layers that read it.

Both move scales into weights (`gradq.quant.channel_scales`), so that the float model, the simulation, the
integer reference and every file need no operator more.

Shapes: C channels of an activation, O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from gradq.errors import ConfigError, UnsupportedError
from gradq.quant.batches import (
    ToInputs,
    evaluating,
    float_mode,
    kept,
    progress,
    run_batch,
    unwrap,
    watching,
)
from gradq.quant.channel_scales import Place, find_places
from gradq.quant.fake import WeightQuant
from gradq.quant.info import prepare_info

__all__ = ["ScalingReport", "awq", "smooth"]

_GRID = 20


@dataclass(frozen=True)
class ScalingReport:
    """What `awq` or `smooth` did.

    Attributes:
        scaled: linear layer → what its scales were taken from (a norm or a linear layer).
        left: linear layer → why it has none.
        gains: linear layer → squared error of its outputs after scaling over that before (`awq` only).
    """

    scaled: dict[str, str]
    left: dict[str, str]
    gains: dict[str, float]

    def __str__(self) -> str:
        """Some lines for people."""
        lines = [f"{len(self.scaled)} linear layers scaled, {len(self.left)} left"]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.left.items()])


def smooth(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    alpha: float = 0.5,
    num_batches: int | None = None,
    to_inputs: ToInputs | None = None,
    show_progress: bool = True,
) -> ScalingReport:
    """Move outlier channels of activations into the weights that read them, in place; calibrate afterwards.

    SmoothQuant (Xiao et al. 2023, arXiv:2211.10438): channel c of what a norm writes is divided by
    ``max|x_c|**alpha / max|w_c|**(1 - alpha)``, and the readers' columns are multiplied by it. In float the
    model computes the same. It pays where a few channels are far larger than the others, as in pre-norm
    transformers; where more than linear layers read a norm (post-norm), nothing can be moved.

    Args:
        model: a model from `prepare`; calibrated or not.
        loader: batches; no labels are needed.
        alpha: how much of the range is moved, 0 (nothing) to 1 (everything).
        num_batches: batches to use; None for all.
        to_inputs: batch → the model's arguments, if the default does not fit.
        show_progress: a progress bar on stderr.

    Returns:
        Which layers were scaled, and why the others were not.

    Raises:
        ConfigError: an alpha outside 0 to 1.
        CalibrationError: no batch.
        UnsupportedError: not from `prepare`, or no layer whose input can be scaled.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is {alpha}; legal: 0 to 1")
    plain, places, left, batches = _begin(model, loader, num_batches)
    peaks: dict[int, Tensor] = {}

    def see(index: int, x: Tensor) -> None:
        peak = x.abs().reshape(-1, x.shape[-1]).amax(0)
        peaks[index] = torch.maximum(peaks[index], peak) if index in peaks else peak

    with evaluating(plain):
        hooks = [_watch(p, lambda x, i=i: see(i, x)) for i, p in enumerate(places)]
        with watching(hooks), float_mode(plain):
            for batch in progress(batches, "looking at activations", show=show_progress):
                run_batch(plain, batch, to_inputs)
        for i, place in enumerate(places):
            weights = torch.stack([r.weight.abs().amax(0) for r in place.readers.values()]).amax(0)
            x, w = peaks[i].double(), weights.double()
            scales = x.pow(alpha) / w.pow(1 - alpha)
            place.fold(torch.where((x > 0) & (w > 0), scales, torch.ones_like(scales)).clamp(1e-5, 1e5))
    return ScalingReport(_sources(places), left, {})


def awq(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    num_batches: int | None = None,
    to_inputs: ToInputs | None = None,
    show_progress: bool = True,
) -> ScalingReport:
    """Scale the weights of channels that carry large activations up before they are rounded, in place.

    Activation-aware weight quantization (Lin et al. 2024, arXiv:2306.00978): channel c of what a norm writes
    is divided by ``mean|x_c|**a``, and the readers' columns are multiplied by it; the `a` between 0 (nothing)
    and 1 whose rounded weights change the readers' outputs least is taken, by the second moments of the
    inputs. In float the model computes the same. One norm is looked at after another, so that only one
    (C, C) matrix of moments is held at a time. `gptq` may follow.

    Args:
        model: a model from `prepare`; for weights of few bits, with or without quantized activations.
        loader: batches; no labels are needed.
        num_batches: batches to use; None for all.
        to_inputs: batch → the model's arguments, if the default does not fit.
        show_progress: a progress bar on stderr.

    Returns:
        Which layers were scaled, by how much it helped, and why the others were not.

    Raises:
        CalibrationError: no batch.
        UnsupportedError: not from `prepare`, or no layer whose input can be scaled.
    """
    plain, places, left, batches = _begin(model, loader, num_batches)
    gains: dict[str, float] = {}
    with evaluating(plain), float_mode(plain):
        for place in progress(places, "scaling by activations", show=show_progress):
            means, moments = _statistics(plain, place, batches, to_inputs)
            scales, gain = _best(place, means, moments)
            place.fold(scales)
            gains |= dict.fromkeys(place.readers, gain)
    return ScalingReport(_sources(places), left, gains)


def _begin(
    model: nn.Module, loader: Iterable[Any], num_batches: int | None
) -> tuple[nn.Module, list[Place], dict[str, str], list[Any]]:
    plain = unwrap(model)
    prepare_info(plain)  # raises for a model that has no graph
    assert isinstance(plain, fx.GraphModule)
    batches = kept(loader, num_batches)
    places, left = find_places(plain)
    if not places:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:3]) or "no linear layer"
        raise UnsupportedError(f"no layer's input can be scaled ({why}); leave this step out")
    return plain, places, left, batches


def _watch(place: Place, see: Any) -> Any:
    """Call ``see(x)`` for what the place's first reader reads."""
    reader = next(iter(place.readers.values()))
    return reader.register_forward_pre_hook(lambda _module, inputs: see(inputs[0].detach()))


def _sources(places: list[Place]) -> dict[str, str]:
    return {reader: place.source for place in places for reader in place.readers}


def _statistics(
    model: nn.Module, place: Place, batches: list[Any], to_inputs: ToInputs | None
) -> tuple[Tensor, Tensor]:
    """(C,) mean magnitudes and (C, C) second moments of an activation, fp32."""
    reader = next(iter(place.readers.values()))
    size = reader.in_features
    means = torch.zeros(size, device=reader.weight.device)
    moments = torch.zeros(size, size, device=reader.weight.device)

    def see(x: Tensor) -> None:
        rows = x.reshape(-1, size).float()
        means.add_(rows.abs().sum(0))
        moments.addmm_(rows.t(), rows)

    with watching([_watch(place, see)]):
        for batch in batches:
            run_batch(model, batch, to_inputs)
    return means, moments


def _best(place: Place, means: Tensor, moments: Tensor) -> tuple[Tensor, float]:
    """(C,) scales of the best exponent, and the error with them over the error without.

    The exponent is searched with scales of weights from their extremes, which are found quickly; it is taken
    if it helps with those that the layers have.
    """
    alive, none = means > 0, torch.ones_like(means)
    if not bool(alive.any()):
        return none, 1.0
    logs = torch.where(alive, means, means[alive].mean()).log()
    candidates = [(step / _GRID * (logs - logs.mean())).exp() for step in range(_GRID)]
    errors = [_error(place, scales, moments, "minmax") for scales in candidates]
    best = candidates[errors.index(min(errors))]
    before, after = _error(place, none, moments), _error(place, best, moments)
    return (best, after / before) if after < before else (none, 1.0)


def _error(place: Place, scales: Tensor, moments: Tensor, observer: str | None = None) -> float:
    """Squared error of the readers' outputs with their weights rounded under scales."""
    error = 0.0
    for reader in place.readers.values():
        weight, own = reader.weight.detach(), reader.weight_quant
        quantizer = WeightQuant(
            own.format, weight.shape, observer=observer or own.observer_kind, name=own.name
        )
        scaled = weight * scales
        quantizer.to(weight.device).fit(scaled)
        difference = (quantizer(scaled) / scales - weight).float()
        error += float(((difference @ moments) * difference).sum())
    return error
