"""`gradq bench collectives`: all-reduces of many sizes, in the manner of nccl-tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from gradq.bench.link import Link
from gradq.bench.records import write_record
from gradq.bench.runners.processes import ProcessRunner
from gradq.bench.scenario import Scenario
from gradq.bench.tables import collectives_table
from gradq.cli.bench_run import choose_runner, override_link, split_codecs
from gradq.cli.bench_terminal import orderly_end, to_json
from gradq.errors import ConfigError

__all__ = ["collectives", "parse_bytes"]


def parse_bytes(text: str) -> int:
    """Bytes of "1KB", "64MB"; a KB is 1024 bytes, as in nccl-tests.

    Raises:
        ConfigError: the text is not a size.
    """
    match = re.fullmatch(r"\s*([0-9]{1,15})\s*(B|KB|MB|GB|K|M|G)?\s*", text.upper())
    if match is None:
        raise ConfigError(f"{text!r} is not a size: write for instance 1KB or 64MB")
    return int(match[1]) << {"B": 0, "K": 10, "M": 20, "G": 30}[(match[2] or "B")[0]]


def collectives(
    codecs: Annotated[
        str, typer.Option(help="Comma-separated gradq specs.")
    ] = "none,bf16,int8,int4,int4+int4",
    ranks: Annotated[int, typer.Option(min=2, help="Ranks on this machine.")] = 2,
    hosts: Annotated[
        int | None, typer.Option(min=2, help="Hosts to make as namespaces instead, a rank each.")
    ] = None,
    link: Annotated[str | None, typer.Option(help="Rate of each host's link, such as 1gbit.")] = None,
    delay: Annotated[str | None, typer.Option(help="One-way delay, such as 0.2ms.")] = None,
    smallest: Annotated[str, typer.Option("--from", help="Smallest size.")] = "1KB",
    largest: Annotated[str, typer.Option("--to", help="Largest size.")] = "256MB",
    factor: Annotated[int, typer.Option(min=2, help="From one size to the next.")] = 4,
    out: Annotated[Path | None, typer.Option(help="Folder for a record.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Time all-reduces of many sizes with every codec; show bandwidth, bytes and errors."""
    least, most = parse_bytes(smallest), parse_bytes(largest)
    if not 4 <= least <= most <= 1 << 40:
        raise ConfigError(f"sizes from {smallest} to {largest}: from 4 bytes to 1024GB, upwards")
    sizes = [least]
    while sizes[-1] * factor <= most:
        sizes.append(sizes[-1] * factor)
    scenario = Scenario(
        name="collectives",
        codecs=split_codecs(codecs),
        nodes=hosts or 1,
        ranks_per_node=1 if hosts else ranks,
        link=override_link(Link(), link, delay, None),
    )
    for codec in scenario.codecs:
        if codec.startswith(("torch-", "free:", "hivemind:")) or ".py:" in codec:
            raise ConfigError(
                f"{codec}: gradq bench collectives takes gradq's specs; peers run in gradq bench"
            )
    runner = choose_runner(scenario, None)
    assert isinstance(runner, ProcessRunner), "without a cluster ranks are processes"
    runner.collective_bytes = tuple(sizes)
    rows: list[dict[str, Any]] = []
    with orderly_end(), runner:
        facts = runner.open()
        for rank, record in runner.run(0):
            if rank == 0 and record["record"] == "collective":
                rows.append({key: value for key, value in record.items() if key != "record"})
                done = f"{len(rows)} of {len(sizes) * len(scenario.codecs)}"
                row = f"{record['size_bytes']} bytes, {record['codec']}: {record['time_ms']:.3f} ms"
                typer.echo(f"[{done}] {row}", err=True)
    if as_json:
        typer.echo(to_json(rows))
    else:
        typer.echo(collectives_table(rows).markdown())
    if out is not None:
        shown = str(facts["link"]["asked"])
        settings = {"ranks": scenario.world_size, "hosts": hosts or 1, "link": shown}
        slug = re.sub(r"[^a-z0-9]+", "-", shown.lower())
        name = f"collectives_{scenario.world_size}ranks_{slug}"
        path = write_record(out, name, settings=settings, link=facts["link"], rows=rows)
        typer.echo(f"\nrecord: {path}", err=True)
