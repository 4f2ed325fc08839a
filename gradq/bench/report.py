"""`gradq report`: every record of a folder as one HTML page, a Markdown file and PNG plots."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradq.bench import plots, sweep
from gradq.bench.html import Section, page
from gradq.bench.reading import check_collectives, parse_json, read_text
from gradq.bench.summary import Summary, summarise
from gradq.bench.tables import collectives_table, escape, scenario_table
from gradq.errors import BenchError, ConfigError

__all__ = ["write_report"]


@dataclass
class _Found:
    """What a folder holds, and what of it cannot be shown, with the reason."""

    summaries: list[Summary] = field(default_factory=list)
    collectives: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def write_report(
    folder: Path, out: Path | None = None, *, warn: Callable[[str], None] = lambda text: None
) -> Path:
    """Read all records in a folder and write `report.html`, `report.md` and the plots.

    Records, and lines of records, that are damaged, unfinished or of another version are left out and listed
    in the report; the others are shown.

    Args:
        folder: a folder with `*.jsonl` of `gradq bench` and `*.json` of `gradq bench collectives`, or one of
            these files.
        out: folder for the report; the folder of the records by default.
        warn: a function that is called with a sentence for each thing that is left out.

    Returns:
        The HTML page.

    Raises:
        ConfigError: there are no records that can be shown; the message lists what is there.
        BenchError: the report cannot be written.
    """
    if not folder.exists():
        raise ConfigError(f"there is no folder {folder}; gradq bench writes records to --out")
    found = _find(folder)
    if not found.summaries and not found.collectives:
        listed = "".join(f"\n- {text}" for text in found.left_out)
        raise ConfigError(
            f"{folder} has no records with samples{':' if listed else ''}{listed}\n"
            f"make some: gradq bench --out {folder if folder.is_dir() else folder.parent}"
        )
    for text in found.left_out:
        warn(text)
    out = out or (folder if folder.is_dir() else folder.parent)
    try:
        out.mkdir(parents=True, exist_ok=True)
        sections = [*_sweeps(found.summaries, out), *_scenarios(found.summaries, out)]
        sections += [_collectives_section(record) for record in found.collectives]
        if found.left_out:
            sections.append(Section("Left out", "", None, notes=tuple(found.left_out)))
        (out / "report.md").write_text(_markdown(sections), encoding="utf-8")
        path = out / "report.html"
        path.write_text(page(sections, found.summaries), encoding="utf-8")
    except OSError as error:
        raise BenchError(f"cannot write the report to {out}: {error.strerror}") from error
    return path


def _find(place: Path) -> _Found:
    """All records in a folder, or the one in a file."""
    found = _Found()
    for path in sorted(place.rglob("*.json*")) if place.is_dir() else [place]:
        try:
            if path.suffix == ".jsonl":
                _take_bench(path, found)
            elif path.suffix == ".json" or path == place:
                _take_collectives(path, found)
        except ConfigError as error:
            found.left_out.append(str(error))
    found.summaries.sort(key=_order)
    return found


def _take_bench(path: Path, found: _Found) -> None:
    """Add a file of JSON lines, unless it is something else's log.

    Raises:
        ConfigError: it is a record of gradq bench that cannot be shown, or no JSON lines at all.
    """
    first = read_text(path).partition("\n")[0]
    try:
        header = parse_json(first)
    except ValueError:
        header = {"benchmark": "bench"}  # empty or damaged: `summarise` says how
    if not isinstance(header, dict) or header.get("benchmark") != "bench":
        return
    summary = summarise(path)
    found.left_out += [f"{path}, {text}" for text in summary.left_out]
    if summary.rows:
        found.summaries.append(summary)
        return
    why = "; ".join(str(event.get("reason", event["event"])) for event in summary.events[-1:])
    found.left_out.append(
        f"{path}: unfinished: it ended before the first measured block{f' ({why})' if why else ''}; the same "
        f"command continues: {summary.header['command']}"
    )


def _take_collectives(path: Path, found: _Found) -> None:
    """Add a file of `gradq bench collectives`; other JSON is left alone.

    Raises:
        ConfigError: it is not JSON, or damaged.
    """
    try:
        record = parse_json(read_text(path))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON, or cut off: {error}") from None
    if isinstance(record, dict) and str(record.get("benchmark")).startswith("collectives"):
        check_collectives(record, path)
        found.collectives.append(record)


def _order(summary: Summary) -> tuple[str, int, int, float, str]:
    """By model and ranks, the slowest link first."""
    scenario = summary.scenario
    rate = scenario.link.rate_bps
    return scenario.model, scenario.nodes, scenario.ranks_per_node, rate or float("inf"), scenario.name


def _scenarios(summaries: list[Summary], out: Path) -> list[Section]:
    """A section a record; two of the same name have plots of different names."""
    taken: set[str] = set()
    sections = []
    for summary in summaries:
        name = summary.scenario.name
        stem = next(s for i in itertools.count(1) if (s := name if i == 1 else f"{name}-{i}") not in taken)
        taken.add(stem)
        sections.append(_scenario(summary, out, stem))
    return sections


def _scenario(summary: Summary, out: Path, stem: str) -> Section:
    figures = []
    for kind, draw in (("step", plots.draw_steps), ("loss", plots.draw_losses)):
        name = f"{stem}_{kind}.png"
        if svg := plots.save(lambda draw=draw: draw(summary), out / name):  # type: ignore[misc]
            figures.append((svg, name))
    return Section(
        f"{stem}: {summary.title}",
        summary.verdict(),
        scenario_table(summary),
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
    if summary.left_out:
        notes.append(f"{len(summary.left_out)} damaged line(s) of {summary.path.name} are left out")
    environment = summary.header["environment"]
    cpu, cores, torch = (environment.get(key, "unknown") for key in ("cpu", "cores", "torch"))
    notes.append(
        f"{cpu}, {cores} cores, torch {torch}, commit "
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
    environment = record.get("environment")
    cpu = environment.get("cpu", "unknown") if isinstance(environment, dict) else "unknown"
    commit, date, command = (record.get(key, "unknown") for key in ("commit", "date", "command"))
    return Section(
        f"Collectives: {record['settings']['ranks']} ranks, {record['settings']['link']}",
        "",
        collectives_table(record["rows"]),
        notes=(f"{cpu}, commit {commit}, {date}: {command}",),
    )


def _markdown(sections: list[Section]) -> str:
    parts = ["# gradq bench\n"]
    for section in sections:
        parts.append(f"## {escape(section.title)}\n")
        if section.verdict:
            parts.append(f"**{escape(section.verdict)}**\n")
        if section.table is not None:
            parts.append(f"{section.table.markdown()}\n")
        parts += [f"![{escape(section.title)}]({name})\n" for _, name in section.figures]
        if section.notes:
            parts.append("\n".join(f"- {escape(note)}" for note in section.notes) + "\n")
    return "\n".join(parts)
