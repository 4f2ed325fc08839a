"""Accuracy control: quantize, and leave as few layers in float as an allowed loss asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradq.errors import ConfigError
from gradq.quant.batches import ToInputs, evaluating, float_mode, kept, run_batch
from gradq.quant.calibrate import calibrate
from gradq.quant.config import Config, chosen_config
from gradq.quant.fake import FakeQuantize
from gradq.quant.modules import QuantLayer
from gradq.quant.prepare import prepare
from gradq.quant.readers import input_quantizers

__all__ = ["ControlReport", "prepare_within"]


@dataclass(frozen=True)
class ControlReport:
    """What `prepare_within` found.

    Attributes:
        float_figure: figure of the float model, by `evaluate`.
        figure: figure of the quantized one.
        skipped: layers that stay in float, the costliest first; put them into `Config.skip`.
        costs: layer → squared error of the outputs, relative to their power, with only that layer quantized.
        tried: (number of layers in float, figure) of every attempt, in order.
    """

    float_figure: float
    figure: float
    skipped: tuple[str, ...]
    costs: dict[str, float]
    tried: tuple[tuple[int, float], ...]

    @property
    def loss(self) -> float:
        """Of the figure, against float."""
        return self.float_figure - self.figure

    def __str__(self) -> str:
        """Two lines for people."""
        names = ", ".join(self.skipped) or "none"
        return (
            f"float {self.float_figure:.4g}, quantized {self.figure:.4g} (loss {self.loss:.4g})\n"
            f"{len(self.skipped)} of {len(self.costs)} layers in float: {names}"
        )


def prepare_within(
    model: nn.Module,
    example_inputs: Any,
    loader: Iterable[Any],
    evaluate: Callable[[nn.Module], float],
    *,
    max_loss: float,
    config: Config | None = None,
    num_batches: int | None = None,
    to_inputs: ToInputs | None = None,
    show_progress: bool = True,
) -> tuple[nn.Module, ControlReport]:
    """Prepare and calibrate a model so that a figure of yours loses at most so much.

    If everything quantized loses too much, the layers are ordered by what each costs alone, and the costliest
    ones are left in float: twice as many until it suffices, then as few of them as suffice by halving. Every
    attempt is prepared, calibrated and evaluated anew.

    Args:
        model: a model as for `prepare`; untouched.
        example_inputs: inputs as for `prepare`.
        loader: calibration batches, kept in memory; no labels are needed.
        evaluate: model → figure, higher is better (accuracy in per cent, minus the perplexity, …). It is
            called with the float model and with quantized ones, in evaluation mode.
        max_loss: largest loss of the figure, in its own unit.
        config: formats and placement; what it skips stays in float anyway.
        num_batches: batches to use; None for all.
        to_inputs: batch → the model's arguments, if the default does not fit.
        show_progress: progress bars on stderr.

    Returns:
        The quantized model, calibrated, and what was found.

    Raises:
        ConfigError: a negative loss; or a loss that is exceeded even with every layer in float.
        CalibrationError: no batch.
    """
    if not max_loss >= 0:
        raise ConfigError(f"max_loss is {max_loss}; legal: 0 or more, in the unit of your figure")
    config = chosen_config(config)
    batches = kept(loader, num_batches)
    with evaluating(model):
        target = float(evaluate(model))
    tried: list[tuple[int, float]] = []

    def attempt(skipped: list[str]) -> tuple[nn.Module, float]:
        chosen = replace(config, skip=(*config.skip, *skipped))
        quantized = prepare(model, example_inputs, chosen)
        if any(isinstance(m, FakeQuantize) for m in quantized.modules()):
            calibrate(quantized, batches, to_inputs=to_inputs, show_progress=show_progress)
        with evaluating(quantized):
            figure = float(evaluate(quantized))
        tried.append((len(skipped), figure))
        return quantized, figure

    def suffices(figure: float) -> bool:
        return target - figure <= max_loss  # NaN does not

    quantized, figure = attempt([])
    costs = _costs(quantized, batches, to_inputs)
    order = sorted(costs, key=lambda name: -costs[name])
    best, count, too_few = (quantized, figure), 0, -1
    while not suffices(best[1]):
        if count >= len(order):
            raise ConfigError(
                f"the figure is {best[1]:.6g} with every layer in float and {target:.6g} without any "
                f"quantizer; max_loss is {max_loss:g}: allow more, or use Config(placement='matmul')"
            )
        too_few, count = count, min(len(order), max(1, 2 * count))
        best = attempt(order[:count])
    while count - too_few > 1:
        middle = (count + too_few) // 2
        found = attempt(order[:middle])
        if suffices(found[1]):
            best, count = found, middle
        else:
            too_few = middle
    return best[0], ControlReport(target, best[1], tuple(order[:count]), costs, tuple(tried))


def _costs(model: nn.Module, batches: list[Any], to_inputs: ToInputs | None) -> dict[str, float]:
    """Layer → relative squared error of the outputs with only its weights and inputs quantized."""
    readers = input_quantizers(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}
    with evaluating(model), float_mode(model):
        truth = [_outputs(model, batch, to_inputs) for batch in batches]
        power = sum(float(t.square().sum()) for outputs in truth for t in outputs) or 1.0
        costs = {}
        for name, layer in layers.items():
            own: list[FakeQuantize] = [q for _, _, q in layer.quantized_weights()]
            own += readers.get(name, [])
            for quantizer in own:
                quantizer.mode = "quantize"
            error = sum(
                float((a - b).square().sum())
                for batch, outputs in zip(batches, truth, strict=True)
                for a, b in zip(_outputs(model, batch, to_inputs), outputs, strict=True)
            )
            for quantizer in own:
                quantizer.mode = "float"
            costs[name] = error / power
    return costs


def _outputs(model: nn.Module, batch: Any, to_inputs: ToInputs | None) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(run_batch(model, batch, to_inputs))
    return [t.double() for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
