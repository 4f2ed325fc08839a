"""The command line. `app` puts the commands together; each command has a file of its own."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run `gradq`: exit status 0, or 2 after an error of gradq's, whose message goes to stderr."""
    try:
        from gradq.cli.app import run
    except ModuleNotFoundError as error:
        package = str(error.name).split(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.exit(f"the command line needs {package}: pip install 'gradq[cli]'")
    sys.exit(run(sys.argv[1:]))
