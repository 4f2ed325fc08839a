"""`gradq report`: records as a page."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from gradq.bench.report import write_report
from gradq.cli.bench_run import DEFAULT_OUT

__all__ = ["report"]


def report(
    folder: Annotated[
        Path, typer.Argument(help="Folder with records of gradq bench, or one record.")
    ] = DEFAULT_OUT,
    out: Annotated[Path | None, typer.Option(help="Where the report goes; the folder by default.")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Write report.html, report.md and plots from the records in a folder.

    What is damaged, unfinished or of another version is listed and left out; the rest is shown.
    """
    page = write_report(folder, out, warn=lambda text: typer.echo(f"left out: {text}", err=True))
    typer.echo(f"{page}, {page.with_suffix('.md').name} and plots")
    if open_page:
        webbrowser.open(page.resolve().as_uri())
