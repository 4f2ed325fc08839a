"""The application: what `gradq --help` lists, and how errors and Ctrl-C end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import rich.console
import typer

import gradq
from gradq.cli import bench, doctor
from gradq.errors import GradqError

__all__ = ["app", "run"]

app = typer.Typer(
    name="gradq",
    help="Gradient compression for data-parallel PyTorch training, and INT8 for the trained model.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("doctor")(doctor.doctor)
app.add_typer(bench.app, name="bench")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"gradq {gradq.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str]) -> int:
    """Run the command line with these arguments; returns the exit status."""
    stderr = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        app(args=list(arguments), prog_name="gradq", standalone_mode=True)
    except GradqError as error:
        stderr.print(f"error: {error}", style="red", markup=False)
        return 2
    except KeyboardInterrupt:
        stderr.print("stopped")
        return 130
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    return 0
