"""`gradq bench`: what codecs save and cost."""

from __future__ import annotations

import typer

from gradq.cli import bench_codecs

__all__ = ["app"]

app = typer.Typer(help="Measure codecs.", no_args_is_help=True, rich_markup_mode=None)
app.command("codecs")(bench_codecs.codecs)


@app.callback()
def _bench() -> None:
    """One command would otherwise not be a sub-command."""
