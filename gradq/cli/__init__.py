"""The command line. `app` puts the commands together; each command has a file of its own."""

from __future__ import annotations

import sys

import gradq

__all__ = ["main"]


def main() -> None:
    """Run `gradq`. Exit status: 0, 1 after a failure, 2 after wrong usage, 130 after Ctrl-C.

    `--version` and `doctor` need no more than gradq's core dependencies: they say what else is missing.
    """
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        sys.stdout.write(f"gradq {gradq.__version__}\n")
        sys.exit(0)
    try:
        from gradq.cli.app import run
    except ModuleNotFoundError as error:
        package = str(error.name).split(".")[0]
        if package not in ("typer", "rich"):
            raise
        if arguments == ["doctor"]:
            from gradq.cli.doctor import doctor

            doctor()
            sys.exit(0)
        sys.exit(f"the command line needs {package}: pip install 'gradq[cli]'")
    sys.exit(run(arguments))
