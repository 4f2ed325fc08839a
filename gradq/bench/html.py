"""The page of a report: one file, no scripts, nothing loaded; light and dark, narrow and wide."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape as escape_html

from gradq.bench.summary import Summary
from gradq.bench.tables import Table, one_line

__all__ = ["Section", "page"]

_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --panel: #f5f6f8; --ink: #1b1c1d;
  --muted: #6b6c6d; --grid: #dfe0e1; --accent: #b3165f; --good: #1c7a45; }
@media (prefers-color-scheme: dark) { :root { --ground: #14161a; --panel: #1d2026;
  --ink: #e8e9eb; --muted: #9a9da3; --grid: #363a42; --accent: #ff6fae; --good: #5fd394; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
p.lead, li { color: var(--muted); }
section { background: var(--panel); border-radius: .75rem; padding: 1rem 1.1rem;
  margin: 1.25rem 0; }
.verdict { font-weight: 600; border-left: 4px solid var(--accent); padding-left: .7rem;
  margin: .4rem 0 1rem; }
.scroll, figure { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .86rem;
  width: 100%; }
th, td { padding: .32rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }
th { color: var(--muted); font-weight: 600; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--panel); }
td.win { color: var(--good); font-weight: 600; }
td.lose { color: var(--accent); }
figure { margin: 1rem 0 0; }
figure svg { width: 100%; height: auto; display: block; min-width: 34rem; max-width: 60rem; }
ul { padding-left: 1.1rem; margin: .8rem 0 0; font-size: .85rem; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title: the heading.
        verdict: one sentence, "" for none.
        table: the table, None for none.
        figures: the figures as SVG texts, each with the name of its PNG.
        notes: the sentences below the figures.
    """

    title: str
    verdict: str
    table: Table | None
    figures: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


def page(sections: Sequence[Section], summaries: Sequence[Summary]) -> str:
    """The whole page."""
    parts = [
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>gradq bench</title><style>{_STYLE}</style></head><body><main>",
        "<h1>gradq bench</h1>",
        "<p class='lead'>Step times are medians of blocks in which all codecs took turns, relative to plain "
        "DDP's block of the same turn. Losing cells are shown too.</p>",
    ]
    if len(summaries) > 1:
        parts.append("<section><h2>Verdicts</h2><ul>")
        parts += [
            f"<li><strong>{_escape(summary.title)}</strong>: {_escape(summary.verdict())}</li>"
            for summary in summaries
        ]
        parts.append("</ul></section>")
    parts += [_section(section) for section in sections]
    parts.append("</main></body></html>\n")
    return "\n".join(parts)


def _escape(text: str) -> str:
    """The text on one line, such that HTML shows it as it is."""
    return escape_html(one_line(text))


def _section(section: Section) -> str:
    parts = [f"<section><h2>{_escape(section.title)}</h2>"]
    if section.verdict:
        parts.append(f"<p class='verdict'>{_escape(section.verdict)}</p>")
    if section.table is not None:
        parts.append(_table(section.table))
    parts += [f"<figure aria-label='{_escape(name)}'>{svg}</figure>" for svg, name in section.figures]
    if section.notes:
        parts.append("<ul>" + "".join(f"<li>{_escape(note)}</li>" for note in section.notes) + "</ul>")
    parts.append("</section>")
    return "\n".join(parts)


def _table(table: Table) -> str:
    """A table and the lines below it."""
    parts = ["<div class='scroll'><table><thead><tr>"]
    parts += [f"<th>{_escape(cell)}</th>" for cell in table.head]
    parts.append("</tr></thead><tbody>")
    relative = {index for index, cell in enumerate(table.head) if cell == "x plain DDP"}
    whole = table.head[0] == "x plain DDP"
    for row in table.rows:
        parts.append("<tr>")
        for index, cell in enumerate(row):
            judged = index in relative or (whole and index > 0 and not row[0].endswith("ms"))
            parts.append(f"<td{_judge(cell) if judged else ''}>{_escape(cell)}</td>")
        parts.append("</tr>")
    parts.append("</tbody></table></div>")
    parts += [f"<p class='lead'>{_escape(line)}</p>" for line in table.below]
    return "".join(parts)


def _judge(cell: str) -> str:
    if not re.fullmatch(r"[0-9.]+", cell):
        return ""
    value = float(cell)
    return " class='win'" if value <= 0.97 else " class='lose'" if value > 1.0 else ""
