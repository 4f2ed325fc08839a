"""The options of `gradq bench`, its progress on the terminal, and the table at the end."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import rich.console
import rich.progress
import typer

from gradq.bench.link import Link, parse_delay, parse_rate
from gradq.bench.models import check_model
from gradq.bench.runners.base import Runner, execute
from gradq.bench.scenario import Scenario, load_scenario
from gradq.bench.summary import summarise
from gradq.bench.tables import markdown_table
from gradq.errors import ConfigError

__all__ = ["bench", "choose_runner", "measure_scenario", "orderly_end", "override_link"]

_DEFAULT_OUT = Path("out/bench")


def bench(
    context: typer.Context,
    scenario: Annotated[
        Path | None, typer.Option(help="A scenario file (TOML); other options override what it says.")
    ] = None,
    codecs: Annotated[
        str | None,
        typer.Option(help="Comma-separated: gradq specs, torch-powersgd:4, free:int4, path.py:function."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="gpt-1m, mlp-25m, ... or path.py:function.")] = None,
    data: Annotated[
        str | None, typer.Option(help="text:PATH, digits, cifar10:FOLDER, images:FOLDER.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(help="Ranks on this machine.")] = None,
    hosts: Annotated[
        int | None, typer.Option(help="Hosts to make as network namespaces, a rank each (root).")
    ] = None,
    link: Annotated[str | None, typer.Option(help="Rate of each host's link, such as 1gbit.")] = None,
    delay: Annotated[str | None, typer.Option(help="One-way delay between hosts, such as 0.2ms.")] = None,
    loss: Annotated[float | None, typer.Option(help="Fraction of packets to drop.")] = None,
    cluster: Annotated[
        str | None, typer.Option(help="A Ray cluster: ray://head:10001, head:6379 or auto.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes of the cluster to use.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs of each node; a rank each.")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(help="Ranks on each node without GPUs.")] = None,
    link_record: Annotated[
        Path | None,
        typer.Option(help="JSON with what was measured of the cluster's links; kept in the record."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="How many seeds; 3 for a statement about the loss.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each codec.")] = None,
    block: Annotated[int | None, typer.Option(help="Steps a codec makes in its turn.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a rank and batch.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Bytes a sequence, for text.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches a step.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, or bf16 for autocast.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the record.")] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of records; the same command continues there.")
    ] = _DEFAULT_OUT,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure what compression saves here, and whether the model still learns."""
    if context.invoked_subcommand is not None:
        return
    asked: dict[str, Any] = {
        "codecs": tuple(part.strip() for part in codecs.split(",")) if codecs else None,
        "model": model,
        "data": data,
        "seeds": tuple(range(seeds)) if seeds else None,
        "steps": steps,
        "block": block,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "accumulate": accumulate,
        "precision": precision,
        "name": name,
    }
    if hosts is not None and cluster:
        raise ConfigError("--hosts makes hosts here, --cluster uses others': give one of them")
    if ranks is not None and cluster:
        raise ConfigError(
            "--ranks is for this machine; with --cluster it is --ranks-per-node or --gpus-per-node"
        )
    if hosts is not None:
        asked |= {"nodes": hosts, "ranks_per_node": ranks or 1}
    elif cluster is not None:
        own = gpus_per_node or ranks_per_node or (None if scenario else 1)
        asked |= {"nodes": nodes, "ranks_per_node": own}
        asked["gpus_per_rank"] = 1 if gpus_per_node else None
    else:
        for option, value in (("--nodes", nodes), ("--gpus-per-node", gpus_per_node)):
            if value is not None:
                raise ConfigError(f"{option} goes with --cluster")
        asked["ranks_per_node"] = ranks
    base = load_scenario(scenario) if scenario else Scenario()
    shaped = override_link(base.link, link, delay, loss)
    given = {key: value for key, value in asked.items() if value is not None}
    chosen = dataclasses.replace(base, link=shaped, **given)
    check_model(chosen.model)
    runner = choose_runner(chosen, cluster, link_record)
    measure_scenario(runner, out / f"{chosen.name}.jsonl", as_json=as_json)


def override_link(link: Link, rate: str | None, delay: str | None, loss: float | None) -> Link:
    """A link with what the options say in the place of what it says.

    Raises:
        ConfigError: an option makes no sense.
    """
    if rate is not None:
        link = dataclasses.replace(link, rate_bps=None if rate == "unshaped" else parse_rate(rate))
    if delay is not None:
        link = dataclasses.replace(link, delay_ms=parse_delay(delay))
    return link if loss is None else dataclasses.replace(link, loss=loss)


def choose_runner(scenario: Scenario, cluster: str | None, link_record: Path | None = None) -> Runner:
    """Ray for a cluster, namespaces for several hosts, else this machine.

    Raises:
        ConfigError: Ray is not installed, or the record of the link cannot be read.
    """
    if cluster is not None:
        from gradq.bench.runners.ray import RayRunner

        try:
            measured = json.loads(link_record.read_text()) if link_record else None
        except (OSError, json.JSONDecodeError) as error:
            raise ConfigError(f"cannot read {link_record}: {error}") from None
        return RayRunner(scenario, cluster, link=measured)
    if scenario.nodes > 1:
        from gradq.bench.runners.namespaces import NamespacesRunner

        return NamespacesRunner(scenario)
    from gradq.bench.runners.local import LocalRunner

    return LocalRunner(scenario)


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
    with orderly_end(), rich.progress.Progress(*columns, console=console) as progress:
        task = progress.add_task(
            scenario.name, total=len(scenario.seeds) * turns * len(scenario.contenders), news="starting"
        )

        def show(line: dict[str, Any]) -> None:
            kind = line["record"]
            if kind == "block":
                news = f"seed {line['seed']} {line['codec']} {max(line['step_ms']):.0f} ms/step"
                progress.update(task, advance=1, news=news)
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
        typer.echo(json.dumps(summary.to_dict()))
        return
    typer.echo(f"{summary.title}\n\n{markdown_table(summary)}\n\n{summary.verdict()}\n\nrecord: {path}")


def _show_preflight(line: dict[str, Any], console: rich.console.Console) -> None:
    places = [f"{r['rank']} on {r['host']} {r['interface'] or 'unknown interface'}" for r in line["ranks"]]
    console.print(f"preflight: ranks {', '.join(places)}", markup=False)
    for size in line["sizes"]:
        share = f", {size['interface_share']:.2f} of a ring's bytes" if "interface_share" in size else ""
        text = f"  {size['bytes'] >> 10} KB: {size['time_ms']:.2f} ms, bus {size['busbw_gbps']:.3f} GB/s"
        console.print(f"{text}{share}", markup=False)
    for warning in line["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False)


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
