"""Reports as tables: with rich where it is installed, in plain columns elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradq.export.verification import VerifyReport

__all__ = ["columns", "render", "report_rows", "title"]


def columns(header: list[str], rows: list[list[str]], *, title: str = "") -> str:
    """A table as text.

    Args:
        header: names of the columns.
        rows: cells.
        title: a line above.
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [title] if title else []
    for row in [header, ["─" * w for w in widths], *rows]:
        lines.append("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    return "\n".join(lines)


def render(report: VerifyReport) -> str:
    """The one table of `gradq.export.verify`."""
    return columns(["", "fp32", "int8", "ratio"], report_rows(report), title=title(report))


def title(report: VerifyReport) -> str:
    """What the table is of."""
    return f"{report.path.name} on {report.processor}: {'ok' if report.ok else 'FAILED'}"


def report_rows(report: VerifyReport) -> list[list[str]]:
    """Rows of (what, fp32, int8, ratio)."""
    sizes, agreement = report.size_bytes, report.agreement
    rows = [["size, MB", _mb(sizes["fp32"]), _mb(sizes["int8"]), f"{report.compression:.2f}x smaller"]]
    for size, times in report.latency.items():
        a, b = times["fp32"], times["int8"]
        rows.append(
            [
                f"latency, ms, batch {size}",
                f"{a.median_ms:.3g} ({a.low_ms:.3g} … {a.high_ms:.3g})",
                f"{b.median_ms:.3g} ({b.low_ms:.3g} … {b.high_ms:.3g})",
                f"{b.ratio:.2f}x faster ({b.ratio_low:.2f} … {b.ratio_high:.2f})",
            ]
        )
    if report.accuracy:
        before, after = report.accuracy["fp32"], report.accuracy["int8"]
        unit = " points" if report.metric == "accuracy, %" else ""
        rows.append([report.metric, f"{before:.4g}", f"{after:.4g}", f"{after - before:+.2f}{unit}"])
    fidelity = report.fidelity
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
    counts = report.operators.counts
    integer = {k: v for k, v in counts.items() if k.startswith(("QLinear", "QGemm", "MatMul", "DynamicQ"))}
    shown = ", ".join(f"{v} {k}" for k, v in sorted(integer.items(), key=lambda kv: -kv[1]))
    rows.append(["operators", "", shown or "none in integers", f"{sum(counts.values())} in all"])
    left = len(report.operators.float_products)
    rows.append(
        ["float products", "", f"{left} with weights", f"{report.operators.activation_products} in attention"]
    )
    rows += [["FAILED", "", text, ""] for text in report.failures]
    rows += [["warning", "", text, ""] for text in report.warnings]
    return rows


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}"
