"""Whole checkpoints: written aside and renamed when they are done, and the newest good one is found.

`torch.distributed.checkpoint` writes into the folder it is given, so a run that dies meanwhile leaves a
folder that looks like a checkpoint, and a file that is damaged later is read as it is. Here a checkpoint has
its final name only when all of it is on the disk, and a list of all its files with sizes and CRC-32. All
ranks must see one file system.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gradq.checkpoint.files import LIST, Folder, check_file, listed, size_and_crc
from gradq.checkpoint.restore import together
from gradq.errors import CheckpointError
from gradq.transport.handshake import gather

__all__ = ["check_files", "load_newest", "save_checkpoint"]

_log = logging.getLogger("gradq")


def save_checkpoint(
    state: Mapping[str, Any],
    checkpoint_id: str | os.PathLike[str],
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Save by torch.distributed.checkpoint so that the folder is there whole, or not at all. Collective.

    Args:
        state: what dcp.save takes: {"model": ..., "gradq": handle.state_dict()}.
        checkpoint_id: the folder, which must not exist yet; `load_newest` goes by the last number in its
            name, such as step-00001000. It is written as .<name>.partial beside, synced to the disk and
            renamed.
        group: the ranks; the default group if None.

    Raises:
        CheckpointError: the folder exists, or a rank could not write; on all ranks.
    """
    group = group if group is not None else dist.group.WORLD
    assert group is not None
    path = Path(checkpoint_id)
    partial = path.with_name(f".{path.name}.partial")
    verb = f"save {path}"
    with together([group], verb):
        if group.rank() == 0:
            if path.exists():
                raise CheckpointError(f"{path} exists already; give every checkpoint a name of its own")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    from torch.distributed.checkpoint.state_dict_saver import save

    with together([group], verb), _words_of_dcp(verb):
        save(dict(state), checkpoint_id=partial, process_group=group)
    own: dict[str, tuple[int, int]] = {}
    with together([group], verb):
        names = sorted(path.name for path in partial.iterdir())
        own = {name: size_and_crc(partial / name) for name in names[group.rank() :: group.size()]}
    files = {name: found for theirs in gather(own, group) for name, found in theirs.items()}
    with together([group], verb):
        if group.rank() == 0:
            (partial / LIST).write_text(json.dumps(files, indent=1, sort_keys=True) + "\n")
            _sync(partial / LIST)
            _sync(partial)
            partial.rename(path)
            _sync(path.parent)


def load_newest(
    folder: str | os.PathLike[str],
    load: Callable[[Path], None],
    *,
    group: dist.ProcessGroup | None = None,
) -> Path | None:
    """Load the newest good checkpoint of a folder. Collective.

    Args:
        folder: the folder of the checkpoints; those with a number in their name are tried, the largest first.
        load: a function that loads everything from a folder: model, optimizer and handle. If it raises on
            a rank, the next older one is loaded, so it must not leave anything that the next call keeps.
        group: the ranks; the default group if None.

    Returns:
        The checkpoint that was loaded; None if there is none at all. Every one that was not good is named in
        a log line, with the reason.

    Raises:
        CheckpointError: there are checkpoints, but none is good; names the newest and its fault.
    """
    group = group if group is not None else dist.group.WORLD
    assert group is not None
    with together([group], "load a checkpoint"):
        if not isinstance(folder, str | os.PathLike) or not callable(load):
            raise CheckpointError(
                "gradq.load_newest(folder, load) takes the folder of the checkpoints and a function that "
                f"loads one, got {type(folder).__name__} and {type(load).__name__}"
            )
        found = _candidates(Path(folder)) if group.rank() == 0 else []
    everyone = gather(found, group)
    faults: list[str] = []
    for path in everyone[0]:
        try:
            verb = f"load {path}"
            with together([group], verb):
                check_files(path, group)
            with together([group], verb), _words_of_dcp(verb):
                load(path)
        except CheckpointError as error:
            faults.append(str(error))
            _log.warning("%s is not good, an older one is tried: %s", path, error)
            continue
        if faults:
            _log.warning("resumed from %s; %d newer ones are not good", path, len(faults))
        return path
    if faults:
        raise CheckpointError(f"none of the {len(faults)} checkpoints in {folder} is good: {faults[0]}")
    return None


def check_files(path: Path, group: dist.ProcessGroup) -> None:
    """Check that a checkpoint is whole and as it was saved; each rank reads a share of the files.

    Without `save_checkpoint`'s list of files only their presence and size are known.

    Raises:
        CheckpointError: naming the file.
    """
    Folder(path).check_complete()
    files = listed(path)
    for name in sorted(files)[group.rank() :: group.size()]:
        check_file(path / name, files[name])


def _candidates(folder: Path) -> list[Path]:
    """Folders with a number in their name, the largest first; hidden ones are not finished."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        numbers = re.findall(r"\d+", path.name)
        if numbers and path.is_dir() and not path.name.startswith("."):
            found.append((int(numbers[-1]), path))
    return [path for _, path in sorted(found, reverse=True)]


def _sync(path: Path) -> None:
    """Make the system write a file or folder to the disk now."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def _words_of_dcp(verb: str) -> Iterator[None]:
    """Turn DCP's error, a BaseException whose text is tracebacks, into a CheckpointError."""
    try:
        yield
    except BaseException as error:
        from torch.distributed.checkpoint.api import CheckpointException  # DCP takes 0.5 s to import

        if not isinstance(error, CheckpointException):
            raise
        rank, (reason, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"cannot {verb}: rank {rank}: {type(reason).__name__}: {reason}") from error
