"""The application: what `gradq --help` lists, and how errors and Ctrl-C end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import rich.console
import typer
import typer.core

import gradq
from gradq.cli import bench, doctor, export, report, warm_up
from gradq.errors import ConfigError, GradqError

__all__ = ["app", "run"]


class _Group(typer.core.TyperGroup):
    """typer ends at Ctrl-C without a word; a command that keeps something says so in the exception."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            typer.echo(str(stop) or "stopped: nothing was kept", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="gradq",
    cls=_Group,
    help="Gradient compression for data-parallel PyTorch training, and INT8 for the trained model.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("doctor")(doctor.doctor)
app.add_typer(bench.app, name="bench")
app.command("report")(report.report)
app.command("export")(export.export)
app.command("warm-up")(warm_up.warm_up)


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
    """Run the command line with these arguments.

    Returns:
        The exit status: 0; 2 if what was asked for makes no sense, 1 if it failed, 130 after Ctrl-C.
    """
    stderr = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        app(args=list(arguments), prog_name="gradq", standalone_mode=True)
    except GradqError as error:
        stderr.print(f"error: {error}", style="red", markup=False)
        return 2 if isinstance(error, ConfigError) else 1
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    return 0
