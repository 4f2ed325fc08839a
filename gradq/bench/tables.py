"""Tables of a report, as Markdown and as plain cells: a scenario's rows, and those of collectives."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradq.bench.scenario import COMPUTE, PLAIN
from gradq.bench.summary import Losses, Row, Summary

__all__ = ["COLUMNS", "Table", "cells", "collectives_table", "escape", "label", "one_line", "scenario_table"]

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
    "validation loss",
    "within 2 sd of bf16",
)


def one_line(text: str) -> str:
    """The text without line breaks and control characters, which would end a row or colour a terminal."""
    return re.sub(r"[\x00-\x20\x7f-\x9f\u2028\u2029]+", " ", text).strip()


def escape(text: str) -> str:
    """The text on one line, such that Markdown shows it as it is."""
    text = one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", text)  # inside a word it stands for itself


@dataclass(frozen=True)
class Table:
    """A table of plain texts; whoever shows it escapes them.

    Attributes:
        head: a text a column.
        rows: the rows, as many texts each as there are columns.
        below: the sentences under the table.
        texts: the number of columns from the left that hold words, not numbers.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    below: Sequence[str] = ()
    texts: int = 1

    def markdown(self) -> str:
        """The table in Markdown, whatever stands in its cells."""
        lines = [_row(self.head), "|" + "---|" * self.texts + "---:|" * (len(self.head) - self.texts)]
        lines += [_row(row) for row in self.rows]
        return "\n\n".join(["\n".join(lines), *(["\n".join(map(escape, self.below))] if self.below else [])])


def _row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(map(escape, texts)) + " |"


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


def scenario_table(summary: Summary) -> Table:
    """A scenario's table; the number of samples and what is missing stand below."""
    below = []
    samples = sorted({row.step_ms.samples for row in summary.rows})
    if samples:
        count = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
        text = f"{count} samples a codec (a sample is a block of {summary.scenario.block} steps), "
        below.append(f"{text}seeds {', '.join(map(str, summary.seeds))}.")
    if any(row.losses for row in summary.rows):
        below.append("Validation loss: held-out data, after the last step. The plots show the training loss.")
    below += [f"{label(codec)} did not run: {reason}" for codec, reason in summary.refused.items()]
    return Table(COLUMNS, [cells(row) for row in summary.rows], below)


def collectives_table(rows: list[dict[str, Any]]) -> Table:
    """The table of `gradq bench collectives`, in the manner of nccl-tests."""
    head = (
        *("size", "count", "dtype", "codec", "time ms"),
        *("algbw GB/s", "busbw GB/s", "wire bytes", "ratio", "#wrong"),
    )
    lines = [
        (
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
        for row in rows
    ]
    return Table(head, lines, texts=0)
