"""A benchmark on the terminal: progress on stderr, the table or JSON on stdout, and words at Ctrl-C."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import rich.console
import rich.progress
import typer
from rich.markup import escape

from gradq.bench.reading import read_record
from gradq.bench.runners.base import Runner, execute
from gradq.bench.summary import summarise
from gradq.bench.tables import scenario_table
from gradq.errors import ConfigError

__all__ = ["measure_scenario", "orderly_end", "to_json"]


def measure_scenario(runner: Runner, path: Path, *, as_json: bool = False) -> None:
    """Run a scenario with progress on stderr; print the table, or JSON.

    Raises:
        GradqError: it failed; what was measured is in the record.
    """
    console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
    scenario = runner.scenario
    turns = -(-scenario.steps // scenario.block)
    columns = (
        "{task.description}",
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        "{task.fields[news]}",
    )
    with (
        _stopped_in_words(path, console),
        orderly_end(),
        rich.progress.Progress(*columns, console=console) as progress,
    ):
        total = len(scenario.seeds) * turns * len(scenario.contenders)
        task = progress.add_task(escape(scenario.name), total=total, news="starting")

        def show(line: dict[str, Any]) -> None:
            kind = line["record"]
            if kind == "block":
                news = f"seed {line['seed']} {line['codec']} {max(line['step_ms']):.0f} ms/step"
                progress.update(task, advance=1, news=escape(news))
            elif kind == "preflight":
                _show_preflight(line, console)
            elif kind == "refused":
                progress.update(task, advance=turns, news="")
                console.print(f"{line['codec']}: not here: {line['reason']}", style="yellow", markup=False)
            elif kind == "event":
                console.print(f"{line['event']}: {line.get('reason', '')}", style="yellow", markup=False)

        execute(runner, path, show)
    summary = summarise(path)
    if as_json:
        typer.echo(to_json(summary.to_dict()))
        return
    typer.echo(
        f"{summary.title}\n\n{scenario_table(summary).markdown()}\n\n{summary.verdict()}\n\nrecord: {path}"
    )


def _show_preflight(line: dict[str, Any], console: rich.console.Console) -> None:
    places = [f"{r['rank']} on {r['host']} {r['interface'] or 'unknown interface'}" for r in line["ranks"]]
    console.print(f"preflight: ranks {', '.join(places)}", markup=False)
    for size in line["sizes"]:
        share = f", {size['interface_share']:.2f} of a ring's bytes" if "interface_share" in size else ""
        text = f"  {size['bytes'] >> 10} KB: {size['time_ms']:.2f} ms, bus {size['busbw_gbps']:.3f} GB/s"
        console.print(f"{text}{share}", markup=False)
    for warning in line["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False)


def to_json(value: Any) -> str:
    """JSON that every reader takes: NaN and Inf, a diverged codec's loss, become null."""

    def plain(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {str(key): plain(item) for key, item in part.items()}
        if isinstance(part, list | tuple):
            return [plain(item) for item in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(plain(value), allow_nan=False)


@contextmanager
def _stopped_in_words(path: Path, console: rich.console.Console) -> Iterator[None]:
    """After Ctrl-C or SIGTERM, say what the record keeps and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        words = f"stopped: {_kept(path)}"
        if isinstance(stop, KeyboardInterrupt):
            raise KeyboardInterrupt(words) from None
        console.print(words, markup=False)
        raise


def _kept(path: Path) -> str:
    try:
        lines = read_record(path).lines
    except ConfigError:
        return "nothing was measured yet; the same command starts again"
    blocks = sum(line["record"] == "block" and not line["warmup"] for line in lines)
    seeds = sum(line["record"] == "end" for line in lines)
    if not blocks:
        return "nothing but the warm-up was measured yet; the same command starts again"
    return (
        f"{path} keeps {blocks} measured blocks and {seeds} finished seeds. The same command continues with "
        f"the first unfinished seed; gradq report {path.parent} shows what is there"
    )


@contextmanager
def orderly_end() -> Iterator[None]:
    """SIGTERM and SIGHUP clean up as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
