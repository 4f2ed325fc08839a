"""The options of `gradq bench`, and the scenario and runner they make."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from gradq.bench.link import Link, parse_delay, parse_rate
from gradq.bench.models import check_model
from gradq.bench.reading import parse_json, read_text
from gradq.bench.runners.base import Runner
from gradq.bench.scenario import Scenario
from gradq.bench.scenario_file import load_scenario
from gradq.cli.bench_terminal import measure_scenario
from gradq.errors import ConfigError

__all__ = ["DEFAULT_OUT", "bench", "choose_runner", "override_link", "split_codecs"]

DEFAULT_OUT = Path("out/bench")


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
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks on this machine; 2 by default.")] = None,
    hosts: Annotated[
        int | None, typer.Option(min=1, help="Hosts to make as network namespaces, a rank each (root).")
    ] = None,
    link: Annotated[str | None, typer.Option(help="Rate of each host's link, such as 1gbit.")] = None,
    delay: Annotated[str | None, typer.Option(help="One-way delay between hosts, such as 0.2ms.")] = None,
    packet_loss: Annotated[
        float | None,
        typer.Option(
            "--packet-loss",
            "--loss",
            help="Fraction of packets to drop, such as 0.01; --loss is the older name, and no training loss.",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="A Ray cluster: ray://head:10001, head:6379, auto (the one of this machine), or local (one "
            "node, made for this run)."
        ),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of the cluster to use.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs of each node; a rank each.")] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks on each node of the cluster, without GPUs.")
    ] = None,
    link_record: Annotated[
        Path | None,
        typer.Option(help="JSON with what was measured of the cluster's links; kept in the record."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=1000, help="How many seeds; 3 for a statement about the loss.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of each codec.")] = None,
    block: Annotated[int | None, typer.Option(min=1, help="Steps a codec makes in its turn.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples a rank and batch.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Bytes a sequence, for text.")] = None,
    accumulate: Annotated[int | None, typer.Option(min=1, help="Batches a step.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, or bf16 for autocast.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the record.")] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of records; the same command continues there.")
    ] = DEFAULT_OUT,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure what compression saves here, and whether the model still learns.

    Plain DDP, bf16, torch's PowerSGD, a free codec (the bytes without the work) and computing alone take
    turns with the codecs you name. Ctrl-C keeps what is measured; the same command continues.

    Example: gradq bench --codecs int8,int4,powersgd:4 --model examples/train_gpt.py:build
    """
    if context.invoked_subcommand is not None:
        return
    asked: dict[str, Any] = {
        "codecs": split_codecs(codecs) if codecs is not None else None,
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
    if hosts is not None and cluster is not None:
        raise ConfigError("--hosts makes hosts here, --cluster uses others': give one of them")
    if ranks is not None and cluster is not None:
        raise ConfigError(
            "--ranks is for this machine; with --cluster it is --ranks-per-node or --gpus-per-node"
        )
    if hosts is not None:
        asked |= {"nodes": hosts, "ranks_per_node": ranks or 1}
    elif cluster is not None:
        if gpus_per_node is not None and ranks_per_node is not None:
            raise ConfigError("--gpus-per-node or --ranks-per-node (without GPUs): give one of them")
        own = gpus_per_node or ranks_per_node or (None if scenario else 1)
        asked |= {"nodes": nodes, "ranks_per_node": own}
        asked["gpus_per_rank"] = 1 if gpus_per_node else None
    else:
        for option, value in (
            ("--nodes", nodes),
            ("--gpus-per-node", gpus_per_node),
            ("--ranks-per-node", ranks_per_node),
            ("--link-record", link_record),
        ):
            if value is not None:
                raise ConfigError(f"{option} goes with --cluster; without one say --ranks or --hosts")
        asked["ranks_per_node"] = ranks
    base = load_scenario(scenario) if scenario else Scenario()
    shaped = override_link(base.link, link, delay, packet_loss)
    given = {key: value for key, value in asked.items() if value is not None}
    chosen = dataclasses.replace(base, link=shaped, **given)
    chosen.check_files()
    check_model(chosen.model)
    runner = choose_runner(chosen, cluster, link_record)
    measure_scenario(runner, out / f"{chosen.name}.jsonl", as_json=as_json)


def split_codecs(text: str) -> tuple[str, ...]:
    """The specs of a comma-separated list; a comma inside of brackets belongs to its spec.

    Raises:
        ConfigError: one of them is empty.
    """
    parts = tuple(part.strip() for part in re.split(r",(?![^()]*\))", text))
    if not all(parts):
        raise ConfigError(f"--codecs {text!r}: a spec is empty; write for instance int8,int4(block_size=64)")
    return parts


def override_link(link: Link, rate: str | None, delay: str | None, packet_loss: float | None) -> Link:
    """A link with what the options say in the place of what it says.

    Raises:
        ConfigError: an option makes no sense.
    """
    if rate is not None:
        link = dataclasses.replace(link, rate_bps=None if rate == "unshaped" else parse_rate(rate))
    if delay is not None:
        link = dataclasses.replace(link, delay_ms=parse_delay(delay))
    return link if packet_loss is None else dataclasses.replace(link, loss=packet_loss)


def choose_runner(scenario: Scenario, cluster: str | None, link_record: Path | None = None) -> Runner:
    """Ray for a cluster, namespaces for several hosts, else this machine.

    Raises:
        ConfigError: Ray is not installed, or the record of the link cannot be read.
    """
    if cluster is not None:
        from gradq.bench.runners.ray import RayRunner

        try:
            measured = parse_json(read_text(link_record)) if link_record else {}
        except ValueError as error:
            raise ConfigError(f"--link-record {link_record} is not JSON: {error}") from None
        if not isinstance(measured, dict):
            raise ConfigError(
                f"--link-record {link_record} holds a {type(measured).__name__}, no JSON object"
            )
        return RayRunner(scenario, cluster, link=measured)
    if scenario.nodes > 1:
        from gradq.bench.runners.namespaces import NamespacesRunner

        return NamespacesRunner(scenario)
    from gradq.bench.runners.local import LocalRunner

    return LocalRunner(scenario)
