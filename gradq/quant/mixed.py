"""Mixed bits: a width for each weight by measured sensitivities, within a budget.

The search is greedy. Every weight starts at the largest width; the step down that costs least for each bit it
saves is taken until the budget holds. On the models measured an integer program finds the same assignment.
"""

from __future__ import annotations

import copy

from torch import nn

from gradq.errors import ConfigError
from gradq.quant.batches import unwrap
from gradq.quant.calibrate import weights
from gradq.quant.modules import _QuantConv
from gradq.quant.prepare import finalize
from gradq.quant.readers import widen_scales
from gradq.quant.sensitivity import SensitivityReport

__all__ = ["assign_bits", "average_bits", "choose_bits", "model_bytes"]


def choose_bits(
    report: SensitivityReport, *, average_bits: float | None = None, max_cost: float | None = None
) -> dict[str, int]:
    """Choose a width for each weight.

    Args:
        report: sensitivities from `sensitivity`.
        average_bits: largest average number of bits of an element over all weights.
        max_cost: largest sum of the layers' costs (KL). Exactly one of the two is given.

    Returns:
        Name of the weight → width in bits.

    Raises:
        ConfigError: no budget, two budgets, or one that cannot be met.
    """
    if (average_bits is None) == (max_cost is None):
        raise ConfigError("give exactly one of average_bits and max_cost")
    widths = report.widths()
    sizes = {row.name: row.num_elements for row in report.rows}
    total = sum(sizes.values())
    if average_bits is not None and average_bits < widths[0]:
        raise ConfigError(
            f"average_bits is {average_bits}; legal: {widths[0]} to {widths[-1]}, the widths measured"
        )
    costs = {(row.name, row.bits): row.cost for row in report.rows}
    # By noise of the measurement a smaller width may seem to cost less than a larger one; it does not.
    for name in sizes:
        for low, high in zip(reversed(widths[:-1]), reversed(widths[1:]), strict=True):
            costs[name, low] = max(costs[name, low], costs[name, high])
    chosen = dict.fromkeys(sizes, widths[-1])
    if max_cost is not None and sum(costs[name, widths[-1]] for name in sizes) > max_cost:
        raise ConfigError(f"max_cost is {max_cost}; even {widths[-1]} bits everywhere cost more")

    def steps() -> list[tuple[float, str, int]]:
        # Every smaller width is a candidate, because a step over a bad width may cost least.
        return [
            ((costs[name, low] - costs[name, now]) / ((now - low) * sizes[name]), name, low)
            for name, now in chosen.items()
            for low in widths
            if low < now
        ]

    while average_bits is None or sum(sizes[n] * b for n, b in chosen.items()) > average_bits * total:
        candidates = sorted(steps())
        if max_cost is not None:
            spent = sum(costs[n, b] for n, b in chosen.items())
            candidates = [
                c for c in candidates if spent + costs[c[1], c[2]] - costs[c[1], chosen[c[1]]] <= max_cost
            ]
        if not candidates:
            break
        _, name, low = candidates[0]
        chosen[name] = low
    if average_bits is not None:
        _spend_rest(chosen, costs, sizes, widths, average_bits * total)
    return chosen


def _spend_rest(
    chosen: dict[str, int],
    costs: dict[tuple[str, int], float],
    sizes: dict[str, int],
    widths: list[int],
    budget_bits: float,
) -> None:
    """Spend what the last, coarse step left of the budget on the widths that gain most for each bit."""
    while True:
        spent = sum(sizes[n] * b for n, b in chosen.items())
        raises = [
            ((costs[name, now] - costs[name, high]) / ((high - now) * sizes[name]), name, high)
            for name, now in chosen.items()
            for high in widths
            if high > now and spent + (high - now) * sizes[name] <= budget_bits
        ]
        if not raises or max(raises)[0] <= 0:
            return
        _, name, high = max(raises)
        chosen[name] = high


def assign_bits(
    model: nn.Module,
    report: SensitivityReport,
    *,
    average_bits: float | None = None,
    max_cost: float | None = None,
) -> dict[str, int]:
    """Choose widths and set them, in place; the scales of the weights are fitted again.

    Args:
        model: model from `prepare`.
        report: sensitivities from `sensitivity` of this model.
        average_bits: largest average number of bits of an element over all weights.
        max_cost: largest sum of the layers' costs (KL). Exactly one of the two is given.

    Returns:
        Name of the weight → width in bits.

    Raises:
        ConfigError: no budget, two budgets, one that cannot be met, or a report of another model.
    """
    found = weights(unwrap(model))
    chosen = choose_bits(report, average_bits=average_bits, max_cost=max_cost)
    if chosen.keys() != found.keys():
        odd = sorted(chosen.keys() ^ found.keys())
        raise ConfigError(f"the report is of another model: {odd[0]} is in one and not in the other")
    for name, bits in chosen.items():
        weight, quantizer = found[name]
        quantizer.set_bits(bits, weight)
    widen_scales(model)
    return chosen


def average_bits(model: nn.Module) -> float:
    """Average number of bits of an element over all quantized weights; only codes count."""
    pairs = weights(unwrap(model)).values()
    return sum(w.numel() * q.format.bits for w, q in pairs) / max(1, sum(w.numel() for w, _ in pairs))


def model_bytes(model: nn.Module) -> int:
    """Bytes that a model takes in storage: codes, scales, zero points and tables; the rest in its own dtype.

    Batch norm that is still live is counted as the bias it will be folded into.
    """
    model = unwrap(model)
    if any(isinstance(m, _QuantConv) and m.bn is not None for m in model.modules()):
        model = finalize(copy.deepcopy(model))
    found = list(weights(model).values())
    own = {id(p) for _, q in found for p in q.parameters()}
    storages = {w.untyped_storage().data_ptr() for w, _ in found}
    bits = sum(q.num_bits_total(w) for w, q in found)
    for name, parameter in model.named_parameters():
        scale = name.endswith("log2_scale")
        if id(parameter) in own or scale or parameter.untyped_storage().data_ptr() in storages:
            bits += 40 if scale and id(parameter) not in own else 0
        else:
            bits += parameter.numel() * parameter.element_size() * 8
    return bits // 8
