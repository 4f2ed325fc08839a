"""Refinements of post-training quantization that need data but no labels: bias correction, weight rounding.

Both compare what a layer computes in the quantized model with what it computes in the float model, one layer
after another in the order in which they run, on a few fixed batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradq.errors import ConfigError
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
from gradq.quant.modules import QuantLayer, QuantLinear, _QuantConv
from gradq.quant.readers import widen_scales

__all__ = ["correct_bias", "round_weights"]

Layer = QuantLinear | _QuantConv


def _layers(model: nn.Module, batches: list[Any], to_inputs: ToInputs | None) -> dict[str, Layer]:
    """Linear layers and convolutions that run, in the order in which they run; none with live batch norm."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (QuantLinear, _QuantConv)) and getattr(module, "bn", None) is None
    }
    order: dict[str, Layer] = {}
    _record(model, found, batches[:1], to_inputs, lambda name, i, o: order.setdefault(name, found[name]))
    return order


def _record(
    model: nn.Module,
    layers: dict[str, Layer],
    batches: list[Any],
    to_inputs: ToInputs | None,
    keep: Callable[[str, Tensor, Tensor], Any],
) -> None:
    """Run the batches; ``keep(name, input, output)`` is called for every layer that runs, with copies.

    (Copies, because a ReLU that follows may work in place.)
    """

    def hook_for(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            keep(name, inputs[0].detach().clone(), output.detach().clone())

        return hook

    hooks = [layer.register_forward_hook(hook_for(name)) for name, layer in layers.items()]
    with watching(hooks):
        for batch in batches:
            run_batch(model, batch, to_inputs)


def _channel_mean(layer: QuantLayer, out: Tensor) -> Tensor:
    """(O,) mean over everything but the channels."""
    axis = 1 if layer.is_convolution else out.ndim - 1
    return out.double().mean([d for d in range(out.ndim) if d != axis])


def correct_bias(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    num_batches: int | None = 4,
    to_inputs: ToInputs | None = None,
    show_progress: bool = True,
) -> nn.Module:
    """Correct each bias by what quantization shifts the mean of the layer's output, in place.

    The correction stands beside the bias and counts while weights are quantized: the float model, which
    `gradq.export.verify` compares with and `restore` gives back, is not moved.

    Nagel et al. 2019 (arXiv:1906.04721, §4.2, the empirical form). Layers without a bias and layers with live
    batch norm are left as they are.

    Args:
        model: prepared and calibrated.
        loader: batches; no labels are needed.
        num_batches: batches to use; None for all.
        to_inputs: batch → the model's arguments, if the default does not fit.
        show_progress: a progress bar on stderr.

    Returns:
        The model.

    Raises:
        CalibrationError: no batch, or a quantizer without a range.
    """
    model = unwrap(model)
    batches = kept(loader, num_batches)
    with evaluating(model):
        layers = {n: m for n, m in _layers(model, batches, to_inputs).items() if m.bias is not None}
        sums: dict[str, list[Tensor]] = {name: [] for name in layers}
        with float_mode(model):
            _record(
                model, layers, batches, to_inputs, lambda n, i, o: sums[n].append(_channel_mean(layers[n], o))
            )
        for name, layer in progress(
            layers.items(), "correcting biases", total=len(layers), show=show_progress
        ):
            now = _means(model, name, layer, batches, to_inputs)
            bias: Any = layer.bias
            layer.correct_bias((torch.stack(sums[name]).mean(0) - now).to(bias.dtype))
    return widen_scales(model)


def _means(
    model: nn.Module, name: str, layer: Layer, batches: list[Any], to_inputs: ToInputs | None
) -> Tensor:
    """(O,) mean output of one layer in the model as it is."""
    found: list[Tensor] = []
    _record(model, {name: layer}, batches, to_inputs, lambda n, i, o: found.append(_channel_mean(layer, o)))
    return torch.stack(found).mean(0)


def _inputs_and_outputs(
    model: nn.Module, name: str, layer: Layer, batches: list[Any], to_inputs: ToInputs | None
) -> tuple[list[Tensor], list[Tensor]]:
    """What one layer reads and writes, batch by batch."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(name: str, x: Tensor, out: Tensor) -> None:
        inputs.append(x)
        outputs.append(out)

    _record(model, {name: layer}, batches, to_inputs, keep)
    return inputs, outputs


def round_weights(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    num_batches: int | None = 4,
    steps: int = 200,
    lr: float = 1e-2,
    to_inputs: ToInputs | None = None,
    show_progress: bool = True,
) -> nn.Module:
    """Choose for each weight whether to round it up or down, so that each layer's output stays, in place.

    AdaRound (Nagel et al. 2020, arXiv:2004.10568): a rectified sigmoid says how far up a weight is rounded;
    it is driven to 0 or 1 while the layer's output error is minimized. The chosen codes become the weights,
    which are therefore on the grid afterwards. For uniform formats; other layers and live batch norm are left
    as they are.

    Args:
        model: prepared and calibrated.
        loader: batches; no labels are needed.
        num_batches: batches to use; None for all.
        steps: Adam steps a layer.
        lr: their learning rate.
        to_inputs: batch → the model's arguments, if the default does not fit.
        show_progress: a progress bar on stderr.

    Returns:
        The model.

    Raises:
        ConfigError: a step count or learning rate that cannot work.
        CalibrationError: no batch, or a quantizer without a range.
    """
    if steps < 1 or lr <= 0:
        raise ConfigError(f"steps is {steps} and lr {lr}; legal: at least 1, greater than 0")
    model = unwrap(model)
    batches = kept(loader, num_batches)
    with evaluating(model):
        layers = {
            n: m for n, m in _layers(model, batches, to_inputs).items() if m.weight_quant.format.is_uniform
        }
        for name, layer in progress(
            layers.items(), "rounding weights", total=len(layers), show=show_progress
        ):
            with float_mode(model):
                _, targets = _inputs_and_outputs(model, name, layer, batches, to_inputs)
            inputs, _ = _inputs_and_outputs(model, name, layer, batches, to_inputs)
            _round_layer(layer, inputs, targets, steps, lr)
    return model


def _round_layer(layer: Any, inputs: list[Tensor], targets: list[Tensor], steps: int, lr: float) -> None:
    quantizer = layer.weight_quant
    fmt = quantizer.format
    rows = quantizer.rows(layer.weight.detach()).float()
    scale, zero_point = quantizer.scale.detach()[:, None], quantizer.zero_point[:, None]
    down = torch.floor(rows / scale)
    fraction = rows / scale - down
    # h = clip(1.2·sigmoid(v) − 0.1, 0, 1) starts at the fraction: at first nothing is rounded
    v = torch.logit((fraction + 0.1) / 1.2).requires_grad_()
    optimizer = torch.optim.Adam([v], lr)

    def run(x: Tensor, h: Tensor) -> Tensor:
        codes = (down + h + zero_point).clamp(fmt.qmin, fmt.qmax)
        weight = quantizer.unrows((codes - zero_point) * scale, layer.weight.shape).to(layer.weight.dtype)
        if layer.input_quant is not None:
            x = layer.input_quant(x)
        if isinstance(layer, _QuantConv):
            convolution: Any = layer
            out: Tensor = convolution._conv_forward(x, weight, layer.effective_bias())
            return out
        return functional.linear(x, weight, layer.effective_bias())

    power = sum(float(t.square().mean()) for t in targets) / len(targets) + 1e-12
    with torch.enable_grad():
        for step in range(steps):
            h = (1.2 * torch.sigmoid(v) - 0.1).clamp(0, 1)
            i = step % len(inputs)
            loss = (run(inputs[i], h) - targets[i]).square().mean() / power
            progress_share = step / steps
            if progress_share > 0.2:
                beta = 20 - 18 * (progress_share - 0.2) / 0.8
                loss = loss + 1e-2 * (1 - (2 * h - 1).abs().pow(beta)).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        h = ((1.2 * torch.sigmoid(v) - 0.1) >= 0.5).float()
        nearest = fraction.round()

        def error(choice: Tensor) -> float:
            return sum(
                float((run(x, choice) - t).square().mean()) for x, t in zip(inputs, targets, strict=True)
            )

        best = h if error(h) <= error(nearest) else nearest
        codes = (down + best + zero_point).clamp(fmt.qmin, fmt.qmax)
        layer.weight.copy_(quantizer.unrows((codes - zero_point) * scale, layer.weight.shape))
