"""Tables in Markdown: a scenario's rows, and a line a scenario for a whole sweep."""

from __future__ import annotations

from typing import Any

from gradq.bench.scenario import COMPUTE, PLAIN
from gradq.bench.summary import Losses, Row, Summary

__all__ = ["COLUMNS", "cells", "collectives_table", "label", "markdown_table"]

COLUMNS = (
    "codec",
    "x plain DDP",
    "20-80 %",
    "ms a step",
    "exposed ms",
    "codec ms",
    "MB sent",
    "on the interface",
    "CPU ms",
    "loss",
    "within 2 sd of bf16",
)


def label(codec: str) -> str:
    """How a codec is called in tables."""
    if codec == PLAIN:
        return "plain DDP"
    if codec == COMPUTE:
        return "compute only"
    if codec.startswith("free:"):
        return f"{codec.removeprefix('free:')}, free codec"
    return codec


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _loss(losses: Losses | None) -> tuple[str, str]:
    if losses is None:
        return "", ""
    text = f"{losses.mean:.4f}" + (f" ± {losses.sd:.4f}" if losses.sd is not None else "")
    if losses.within_two_sd is None:
        return text, ""
    sign = f"{losses.difference:+.4f}"
    return text, f"{'yes' if losses.within_two_sd else 'no'} ({sign})"


def cells(row: Row) -> list[str]:
    """The texts of a row, one a column."""
    loss, within = _loss(row.losses)
    on_interface = ""
    if row.interface_bytes is not None and row.wire_bytes:
        on_interface = f"{row.interface_bytes / 1e6:.2f}"
        if row.overhead is not None:
            on_interface += f" ({100 * row.overhead:+.1f} %)"
    return [
        label(row.codec),
        _number(row.ratio.median if row.ratio else None, 3),
        f"{row.ratio.p20:.3f}-{row.ratio.p80:.3f}" if row.ratio else "",
        f"{row.step_ms.median:.1f}",
        _number(row.exposed_ms.median if row.exposed_ms else None, 1),
        _number(row.codec_ms, 1),
        _number(row.wire_bytes / 1e6 if row.wire_bytes is not None else None, 3),
        on_interface,
        _number(row.cpu_ms, 0),
        loss,
        "baseline" if row.codec == "bf16" and within else within,
    ]


def markdown_table(summary: Summary) -> str:
    """A scenario's table; the number of samples stands below."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" + "---:|" * (len(COLUMNS) - 1)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in summary.rows]
    samples = sorted({row.step_ms.samples for row in summary.rows})
    text = "\n".join(lines)
    if samples:
        count = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
        text += f"\n\n{count} samples a codec (a sample is a block of {summary.scenario.block} steps), "
        text += f"seeds {', '.join(map(str, summary.seeds))}."
    for codec, reason in summary.refused.items():
        text += f"\n{label(codec)} did not run: {reason}"
    return text


def collectives_table(rows: list[dict[str, Any]]) -> str:
    """The table of `gradq bench collectives`, in the manner of nccl-tests."""
    head = (
        "size",
        "count",
        "dtype",
        "codec",
        "time ms",
        "algbw GB/s",
        "busbw GB/s",
        "wire bytes",
        "ratio",
        "#wrong",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---:|" * len(head)]
    for row in rows:
        texts = (
            f"{row['size_bytes']}",
            f"{row['count']}",
            row["dtype"],
            "all-reduce" if row["codec"] == PLAIN else row["codec"],
            f"{row['time_ms']:.3f}",
            f"{row['algbw_gbps']:.3f}",
            f"{row['busbw_gbps']:.3f}",
            f"{row['wire_bytes']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['wrong']}",
        )
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)
