"""`gradq bench`: step time, bytes and loss of codecs on this machine or a cluster. Options: `bench_run`."""

from __future__ import annotations

import typer

from gradq.cli import bench_codecs, bench_collectives, bench_run

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=False,
    rich_markup_mode=None,
)
app.callback(invoke_without_command=True)(bench_run.bench)
app.command("codecs")(bench_codecs.codecs)
app.command("collectives")(bench_collectives.collectives)
