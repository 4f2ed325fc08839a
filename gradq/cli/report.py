"""`gradq report`: records as a page."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from gradq.bench.report import write_report

__all__ = ["report"]


def report(
    folder: Annotated[Path, typer.Argument(help="Folder with records of gradq bench.")],
    out: Annotated[Path | None, typer.Option(help="Where the report goes; the folder by default.")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Write report.html, report.md and plots from the records in a folder."""
    page = write_report(folder, out)
    typer.echo(f"{page}, {page.with_suffix('.md').name} and plots")
    if open_page:
        webbrowser.open(page.resolve().as_uri())
