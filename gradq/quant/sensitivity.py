"""Which layers cost accuracy: quantize one weight at a time, measure what happens to the outputs.

The measure is the KL divergence of the softmax of the outputs from the float model's, averaged over samples:
it asks what the user asks. (The weights' own squared error fails as a sensitivity below 4 bits.) For outputs
that are not logits use ``metric="mse"``: the squared error relative to the outputs' power.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from gradq.errors import CalibrationError, ConfigError, GradqError
from gradq.quant.batches import ToInputs, evaluating, float_mode, kept, progress, run_batch, unwrap
from gradq.quant.calibrate import weights

__all__ = ["SensitivityReport", "SensitivityRow", "divergence", "sensitivity"]


@dataclass(frozen=True)
class SensitivityRow:
    """One weight at one width.

    Attributes:
        name: the weight's qualified name.
        bits: its width.
        num_elements: its elements.
        cost: KL divergence (nats a sample) or relative squared error of the outputs.
    """

    name: str
    bits: int
    num_elements: int
    cost: float


@dataclass(frozen=True)
class SensitivityReport:
    """All rows, and ways to look at them.

    Attributes:
        rows: one for each weight and width.
        metric: ``kl`` or ``mse``.
    """

    rows: list[SensitivityRow] = field(default_factory=list)
    metric: str = "kl"

    def cost(self, name: str, bits: int) -> float:
        """The cost of one weight at one width.

        Raises:
            ConfigError: it was not measured.
        """
        for row in self.rows:
            if row.name == name and row.bits == bits:
                return row.cost
        raise ConfigError(f"the report has no row for {name} at {bits} bits; measured: {self.widths()} bits")

    def widths(self) -> list[int]:
        """The widths measured, ascending."""
        return sorted({row.bits for row in self.rows})

    def names(self) -> list[str]:
        """The weights, most sensitive (at the smallest width) first."""
        smallest = min(self.widths(), default=0)
        rows = [row for row in self.rows if row.bits == smallest]
        return [row.name for row in sorted(rows, key=lambda row: -row.cost)]

    def __str__(self) -> str:
        """A table, most sensitive layer first."""
        widths = self.widths()
        width = max([len(n) for n in self.names()] + [5])
        lines = [f"{'layer':{width}} {'elements':>10}" + "".join(f"{b:>8}-bit" for b in widths)]
        for name in self.names():
            size = next(row.num_elements for row in self.rows if row.name == name)
            lines.append(
                f"{name:{width}} {size:>10}" + "".join(f"{self.cost(name, b):>12.3g}" for b in widths)
            )
        return "\n".join([*lines, f"({self.metric} of the outputs with only that layer quantized)"])

    def to_csv(self, path: str | Path) -> None:
        """Write the rows to a CSV file."""
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["name", "bits", "num_elements", self.metric])
            writer.writerows([row.name, row.bits, row.num_elements, row.cost] for row in self.rows)

    def plot(self, path: str | Path) -> None:
        """Draw one line a width over the layers and save it (PNG, SVG or PDF by the suffix).

        Raises:
            GradqError: matplotlib is not installed; the message says how to install it.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise GradqError(
                "plotting needs matplotlib; install it with: pip install 'gradq[plot]'"
            ) from error
        names = self.names()
        figure = Figure(figsize=(max(6.0, 0.35 * len(names) + 2), 4.5), layout="constrained")
        axes = figure.subplots()
        for bits in self.widths():
            axes.plot(
                range(len(names)), [self.cost(n, bits) for n in names], marker="o", label=f"{bits} bits"
            )
        axes.set_yscale("symlog", linthresh=1e-6)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_ylabel("KL divergence of the outputs" if self.metric == "kl" else "relative squared error")
        axes.legend()
        figure.savefig(path, dpi=120)


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def divergence(reference: Sequence[Tensor], output: Sequence[Tensor], metric: str = "kl") -> float:
    """How far outputs are from reference outputs.

    Args:
        reference: float tensors; for ``kl`` logits (…, classes).
        output: the same shapes.
        metric: ``kl`` or ``mse``.

    Returns:
        Mean KL divergence in nats, or squared error over power.
    """
    total = 0.0
    for a, b in zip(reference, output, strict=True):
        if metric == "kl":
            p, q = functional.log_softmax(a.double(), -1), functional.log_softmax(b.double(), -1)
            total += float((p.exp() * (p - q)).sum(-1).mean())
        else:
            total += float(
                (a.double() - b.double()).square().sum() / a.double().square().sum().clamp(min=1e-30)
            )
    return total / max(1, len(reference))


def sensitivity(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    widths: Sequence[int] = (2, 3, 4, 6, 8),
    metric: str = "kl",
    num_batches: int | None = 4,
    to_inputs: ToInputs | None = None,
    show_progress: bool = True,
) -> SensitivityReport:
    """Measure what each weight costs at each width, everything else in float.

    Args:
        model: prepared; it is left as it was.
        loader: batches; no labels are needed.
        widths: the bits to try.
        metric: ``kl`` for logits, ``mse`` otherwise.
        num_batches: batches to measure on; None for all.
        to_inputs: batch → the model's arguments, if the default does not fit.
        show_progress: a progress bar on stderr.

    Returns:
        The report: a table, a plot, and what `assign_bits` needs.

    Raises:
        ConfigError: an unknown metric or width.
        CalibrationError: no quantized weights, or no batch.
    """
    if metric not in ("kl", "mse"):
        raise ConfigError(f"metric is {metric!r}; legal: kl, mse")
    model = unwrap(model)
    found = weights(model)
    if not found:
        raise CalibrationError(f"{type(model).__name__} has no quantized weights; call quant.prepare first")
    batches = kept(loader, num_batches)
    rows: list[SensitivityRow] = []
    with evaluating(model), float_mode(model):
        reference = [_tensors(run_batch(model, batch, to_inputs)) for batch in batches]
        jobs = [(name, bits) for name in found for bits in widths]
        for name, bits in progress(jobs, "measuring sensitivity", show=show_progress):
            weight, quantizer = found[name]
            saved = (
                quantizer.format,
                {k: v.clone() for k, v in quantizer.state_dict().items() if isinstance(v, Tensor)},
            )
            try:
                quantizer.set_bits(bits, weight)
                quantizer.mode = "quantize"
                costs = [
                    divergence(r, _tensors(run_batch(model, b, to_inputs)), metric)
                    for r, b in zip(reference, batches, strict=True)
                ]
            finally:
                quantizer.mode = "float"
                _put_back(quantizer, *saved)
            rows.append(SensitivityRow(name, bits, weight.numel(), sum(costs) / len(costs)))
    return SensitivityReport(rows, metric)


def _put_back(quantizer: Any, fmt: Any, tensors: dict[str, Tensor]) -> None:
    """Give a quantizer its format and tensors back, in place."""
    quantizer.format = fmt
    with torch.no_grad():
        quantizer.log2_scale.copy_(tensors["log2_scale"])
        quantizer.zero_point.copy_(tensors["zero_point"])
        if "codebook" in tensors:
            quantizer.codebook = tensors["codebook"]
