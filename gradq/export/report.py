"""What `verify` found, and the one table that shows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gradq.export.comparison import Agreement, Fidelity
from gradq.export.costs import Cost
from gradq.export.inspect import Operators
from gradq.export.tables import columns
from gradq.export.timing import Latency

__all__ = ["VerifyReport"]

_SMALLEST_SHARE = 0.02  # of the time: below it an operator is not shown


@dataclass(frozen=True)
class VerifyReport:
    """Everything `verify` found; ``print(report)`` shows it as one table.

    Attributes:
        path: the file.
        processor: the processor that the session was chosen for.
        operators: operators of the optimized graph.
        agreement: agreement with the integer reference.
        fidelity: to the float model as it was given to `gradq.quant.prepare`.
        accuracy: ``fp32`` (the float model as given), ``int8`` and ``reference``, if the loader has labels:
            in per cent by the default metric, else what the metric gives.
        metric: ``accuracy, %``, or the name of the metric that was given.
        size_bytes: ``fp32`` and ``int8``.
        latency: batch size → ``fp32`` and ``int8``.
        costs: parts of the INT8 file's time at the largest of the batch sizes, by ONNX Runtime's profile.
        failures: sentences on what makes the file wrong.
        warnings: sentences on what makes it a poor trade.
    """

    path: Path
    processor: str
    operators: Operators
    agreement: Agreement
    fidelity: Fidelity
    accuracy: dict[str, float]
    size_bytes: dict[str, int]
    latency: dict[int, dict[str, Latency]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    metric: str = "accuracy, %"
    costs: list[Cost] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if nothing failed."""
        return not self.failures

    @property
    def compression(self) -> float:
        """fp32 bytes over int8 bytes."""
        return self.size_bytes["fp32"] / self.size_bytes["int8"]

    def __str__(self) -> str:
        """The table."""
        return columns(["", "fp32", "int8", "ratio"], self.rows(), title=self.title)

    @property
    def title(self) -> str:
        """What the table is of."""
        return f"{self.path.name} on {self.processor}: {'ok' if self.ok else 'FAILED'}"

    def rows(self) -> list[list[str]]:
        """The table's rows: what, fp32, int8, ratio."""
        sizes, agreement = self.size_bytes, self.agreement
        rows = [["size, MB", _mb(sizes["fp32"]), _mb(sizes["int8"]), f"{self.compression:.2f}x smaller"]]
        for size, times in self.latency.items():
            a, b = times["fp32"], times["int8"]
            rows.append(
                [
                    f"latency, ms, batch {size}",
                    f"{a.median_ms:.3g} ({a.low_ms:.3g} … {a.high_ms:.3g})",
                    f"{b.median_ms:.3g} ({b.low_ms:.3g} … {b.high_ms:.3g})",
                    f"{b.ratio:.2f}x faster ({b.ratio_low:.2f} … {b.ratio_high:.2f})",
                ]
            )
        if self.accuracy:
            before, after = self.accuracy["fp32"], self.accuracy["int8"]
            unit = " points" if self.metric == "accuracy, %" else ""
            rows.append([self.metric, f"{before:.4g}", f"{after:.4g}", f"{after - before:+.2f}{unit}"])
        fidelity = self.fidelity
        note = (
            "trained since prepare"
            if fidelity.trained
            else f"{100 * fidelity.same_choice:.2f} % with the same argmax"
        )
        rows.append(["signal to noise, float model as given", "", f"{fidelity.sqnr_db:.1f} dB", note])
        equal = "every bit" if agreement.equal == 1.0 else f"{100 * agreement.equal:.3f} % of the elements"
        kind = "exact" if agreement.exact else "float between the layers"
        rows.append(["equal to the integer reference", "", equal, f"{agreement.inputs} inputs, {kind}"])
        if agreement.equal < 1.0:
            rows.append(
                ["  largest difference", "", f"{100 * agreement.largest_difference:.2g} % of the largest", ""]
            )
        rows.append(["  same argmax", "", f"{100 * agreement.same_choice:.2f} %", ""])
        rows.append(["repeated calls", "", "equal" if agreement.repeatable else "DIFFER", ""])
        counts = self.operators.counts
        kinds = ("QLinear", "QGemm", "MatMul", "DynamicQ")
        integer = {name: count for name, count in counts.items() if name.startswith(kinds)}
        shown = ", ".join(f"{v} {k}" for k, v in sorted(integer.items(), key=lambda kv: -kv[1]))
        rows.append(["operators", "", shown or "none in integers", f"{sum(counts.values())} in all"])
        left, inside = len(self.operators.float_products), self.operators.activation_products
        rows.append(["float products", "", f"{left} with weights", f"{inside} in attention"])
        rows += self._cost_rows()
        rows += [["FAILED", "", text, ""] for text in self.failures]
        rows += [["warning", "", text, ""] for text in self.warnings]
        return rows

    def _cost_rows(self) -> list[list[str]]:
        """How much of the time is spent outside integer kernels, and in what."""
        if not self.costs:
            return []
        parts = {
            kind: sum(cost.share for cost in self.costs if cost.kind == kind)
            for kind in ("float", "conversion")
        }
        shown = f"{100 * parts['float']:.0f} % in float, {100 * parts['conversion']:.0f} % converting"
        rows = [["time, batch " + str(max(self.latency)), "", shown, "by ONNX Runtime's profile"]]
        for cost in self.costs:
            if cost.kind != "integers" and cost.share >= _SMALLEST_SHARE:
                count = "" if cost.nodes == 1 else f", {cost.nodes} nodes"
                rows.append([f"  {cost.name}", "", f"{100 * cost.share:.0f} %", f"{cost.kind}{count}"])
        return rows


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}"
