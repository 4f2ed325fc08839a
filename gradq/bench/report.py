"""`gradq report`: every record of a folder as one HTML page, a Markdown file and PNG plots."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradq.bench import plots, sweep
from gradq.bench.html import page
from gradq.bench.recording import read_lines
from gradq.bench.records import SCHEMA_VERSION
from gradq.bench.summary import Summary, summarise
from gradq.bench.tables import collectives_table, markdown_table
from gradq.errors import BenchError, ConfigError

__all__ = ["Section", "write_report"]


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title: its heading.
        verdict: one sentence, "" for none.
        table: Markdown.
        figures: SVG texts with the PNG's name.
        notes: what else must be said.
    """

    title: str
    verdict: str
    table: str
    figures: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Read all records in a folder and write `report.html`, `report.md` and the plots.

    Args:
        folder: holds `*.jsonl` of `gradq bench` and `*.json` of `gradq bench collectives`.
        out: where the report goes; the folder itself by default.

    Returns:
        The HTML page.

    Raises:
        ConfigError: there are no records. BenchError: the report cannot be written.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; gradq bench writes records to --out")
    summaries = [summarise(path) for path in sorted(folder.rglob("*.jsonl")) if _is_record(path)]
    summaries = sorted((summary for summary in summaries if summary.rows), key=_order)
    tables = [record for path in sorted(folder.rglob("*.json")) if (record := _collectives(path))]
    if not summaries and not tables:
        raise ConfigError(f"{folder} has no records with samples; make some: gradq bench --out {folder}")
    out = out or folder
    try:
        out.mkdir(parents=True, exist_ok=True)
        sections = [*_sweeps(summaries, out), *(_scenario(summary, out) for summary in summaries)]
        sections += [_collectives_section(record) for record in tables]
        (out / "report.md").write_text(_markdown(sections))
        path = out / "report.html"
        path.write_text(page(sections, summaries))
    except OSError as error:
        raise BenchError(f"cannot write the report to {out}: {error.strerror}") from error
    return path


def _order(summary: Summary) -> tuple[str, int, int, float, str]:
    """By model and ranks, the slowest link first."""
    scenario = summary.scenario
    rate = scenario.link.rate_bps
    return scenario.model, scenario.nodes, scenario.ranks_per_node, rate or float("inf"), scenario.name


def _is_record(path: Path) -> bool:
    try:
        lines = read_lines(path)
    except (ConfigError, UnicodeDecodeError):
        return False
    return bool(lines) and isinstance(lines[0], dict) and lines[0].get("benchmark") == "bench"


def _collectives(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    if not isinstance(record, dict) or not str(record.get("benchmark")).startswith("collectives"):
        return None
    return record if record.get("schema_version") == SCHEMA_VERSION else None


def _scenario(summary: Summary, out: Path) -> Section:
    stem = summary.scenario.name
    figures = []
    for kind, draw in (("step", plots.draw_steps), ("loss", plots.draw_losses)):
        name = f"{stem}_{kind}.png"
        if svg := plots.save(lambda draw=draw: draw(summary), out / name):  # type: ignore[misc]
            figures.append((svg, name))
    return Section(
        f"{stem}: {summary.title}",
        summary.verdict(),
        markdown_table(summary),
        tuple(figures),
        _notes(summary),
    )


def _notes(summary: Summary) -> tuple[str, ...]:
    notes = []
    link = summary.header.get("link", {})
    for pair in link.get("measured", []):
        notes.append(
            f"link {pair['from']} to {pair['to']}: {pair['mbit_s']:.0f} Mbit/s measured with raw TCP"
        )
    times = [
        f"{row.codec} {row.time_to_loss_s:.2f} s" for row in summary.rows if row.time_to_loss_s is not None
    ]
    if times:
        notes.append(
            "time to the training loss that plain DDP has after 80 % of its steps: " + ", ".join(times)
        )
    busy = [row.busy for row in summary.rows if row.busy is not None]
    if busy:
        notes.append(f"cores in use while measuring: {100 * min(busy):.0f} to {100 * max(busy):.0f} %")
    restarts = [event for event in summary.events if event["event"] == "restart"]
    if restarts:
        notes.append(f"{len(restarts)} restart(s) after a lost worker; finished samples were kept")
    for event in summary.events:
        seed = f" (seed {event['seed']})" if "seed" in event else ""
        notes.append(f"{event['event']}{seed}: {event.get('reason', '')}".strip())
    unfinished = sorted(set(summary.scenario.seeds) - set(summary.finished))
    if unfinished:
        notes.append(f"unfinished: seeds {', '.join(map(str, unfinished))}; the same command continues")
    environment = summary.header["environment"]
    notes.append(
        f"{environment['cpu']}, {environment['cores']} cores, torch {environment['torch']}, commit "
        f"{summary.header['commit']}, {summary.header['time'][:16]}: {summary.header['command']}"
    )
    return tuple(notes)


def _sweeps(summaries: list[Summary], out: Path) -> list[Section]:
    sections = []
    for group in sweep.groups(summaries):
        name = "sweep_" + "".join(c if c.isalnum() else "-" for c in group.title) + ".png"
        ratios = group.ratios()
        svg = plots.save(lambda: plots.draw_bandwidth(group.title, ratios), out / name) if ratios else ""  # noqa: B023
        sections.append(Section(f"Sweep: {group.title}", "", group.table(), ((svg, name),) if svg else ()))
    return sections


def _collectives_section(record: dict[str, Any]) -> Section:
    return Section(
        f"Collectives: {record['settings']['ranks']} ranks, {record['settings']['link']}",
        "",
        collectives_table(record["rows"]),
        notes=(
            f"{record['environment']['cpu']}, commit {record['commit']}, {record['date']}: "
            f"{record['command']}",
        ),
    )


def _markdown(sections: list[Section]) -> str:
    parts = ["# gradq bench\n"]
    for section in sections:
        parts.append(f"## {section.title}\n")
        if section.verdict:
            parts.append(f"**{section.verdict}**\n")
        parts.append(f"{section.table}\n")
        parts += [f"![{section.title}]({name})\n" for _, name in section.figures]
        if section.notes:
            parts.append("\n".join(f"- {note}" for note in section.notes) + "\n")
    return "\n".join(parts)
