"""Tables as plain text."""

from __future__ import annotations

__all__ = ["columns"]


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
