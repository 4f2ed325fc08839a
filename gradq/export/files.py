"""Files that are whole or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gradq.errors import ExportError

__all__ = ["atomic", "require"]


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `path` to write into; what stands in it moves into place at the end.

    Args:
        path: the file to make; an old one is replaced. Files written beside it move with it.

    Yields:
        The path to write: the same name, in a temporary folder on the same file system.

    Raises:
        ExportError: the folder does not exist or cannot be written; named.
    """
    target = Path(path)
    if target.is_dir():
        raise ExportError(f"{target} is a folder; name a file in it")
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error.strerror} ({target.parent})") from error
    with folder as name:
        yield Path(name) / target.name
        try:
            # the model last: once it stands there, everything it refers to does too
            for file in sorted(Path(name).iterdir(), key=lambda f: f.name == target.name):
                file.replace(target.parent / file.name)
        except OSError as error:
            raise ExportError(f"cannot write {target}: {error.strerror}") from error


def require(package: str) -> None:
    """Check that an extra is installed.

    Raises:
        ExportError: it is not; the message names the install command.
    """
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise ExportError(f"export needs {package}; install it with: pip install 'gradq[export]'")
