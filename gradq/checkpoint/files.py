"""Files: a state in a folder that torch.distributed.checkpoint (DCP) wrote, read entry by entry.

Every rank reads for itself what it needs; nothing is exchanged, so a file that one rank cannot read leaves no
other rank waiting. What a folder trusts: DCP's `.metadata` is a pickle, so whoever can write it can run code
in the process that loads it. Load checkpoints of people you trust only. The tensors themselves are read with
`weights_only=True`, and gradq's index is JSON.
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradq.checkpoint.state import to_row
from gradq.errors import CheckpointError
from gradq.saved import damaged_part
from gradq.sync.base import Sync

__all__ = ["LIST", "Folder", "check_file", "listed", "open_state", "size_and_crc"]

LIST = "gradq-files.json"  # sizes and CRC-32 of the files, in folders that `gradq.save_checkpoint` wrote

_EARLIER = "use an earlier checkpoint"


class Folder:
    """A checkpoint of DCP.

    Args:
        checkpoint_id: the folder. Where `gradq.save_checkpoint` wrote it, its `.metadata` is compared with
            the list of files first; elsewhere damage of it may go unnoticed.

    Raises:
        CheckpointError: it is not a checkpoint, its `.metadata` is missing or damaged, or a file that it
            names is missing or too short.
    """

    def __init__(self, checkpoint_id: str | os.PathLike[str]) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        if not isinstance(checkpoint_id, str | os.PathLike):
            raise CheckpointError(
                f"checkpoint_id must be the folder of a checkpoint, got {type(checkpoint_id).__name__}"
            )
        self.path = Path(checkpoint_id)
        if not self.path.is_dir():
            what = "it is a file: torch.load it on every rank and give the state to handle.load_state_dict"
            if not self.path.exists():
                what = "there is no such folder"
            raise CheckpointError(f"{self.path} is not a checkpoint of torch.distributed.checkpoint: {what}")
        if not (self.path / ".metadata").is_file():
            raise CheckpointError(
                f"{self.path} is not a checkpoint of torch.distributed.checkpoint: it has no .metadata, "
                "which is written last: the save did not finish, or the folder is of something else; "
                f"{_EARLIER}"
            )
        if (known := listed(self.path).get(".metadata")) is not None:
            check_file(self.path / ".metadata", known)
        self._reader = FileSystemReader(self.path)
        try:
            self._metadata = self._reader.read_metadata()
            self.entries: dict[str, Any] = dict(self._metadata.state_dict_metadata)
            stored = dict(self._metadata.storage_data or {})
            # by entry and first row: file, and where in it the row begins and ends
            self._files: dict[str, dict[int, tuple[str, int, int]]] = {}
            for key, at in stored.items():
                rows = self._files.setdefault(key.fqn, {})
                rows[int((key.offset or (0,))[0])] = (
                    str(at.relative_path),
                    int(at.offset),
                    int(at.offset + at.length),
                )
        except Exception as error:  # unpickling can raise anything
            raise CheckpointError(
                f"{self.path / '.metadata'} is damaged ({type(error).__name__}: {error}); {_EARLIER}"
            ) from error

    def check_complete(self, key: str | None = None) -> None:
        """Check that all entries, or those under a key, were saved by all ranks, in files that are whole.

        Raises:
            CheckpointError: naming the first entry or file that is not.
        """
        for name, entry in self.entries.items():
            if (key is None or name.startswith(f"{key}.")) and _missing_rows(entry):
                raise CheckpointError(
                    f"{name!r} has the rows of some ranks only: not all ranks took part in dcp.save. Save "
                    "with torch.distributed.checkpoint on all ranks, or let rank 0 save what "
                    f"handle.gathered_state_dict() gives; {_EARLIER}"
                )
        sizes: dict[str, int] = {}
        for name, rows in self._files.items():
            for file, _, end in rows.values() if key is None or name.startswith(f"{key}.") else ():
                sizes[file] = max(sizes.get(file, 0), end)
        for file, size in sizes.items():
            path = self.path / file
            if not path.is_file():
                raise CheckpointError(
                    f"{path} is missing: the checkpoint was not copied whole, or a rank did not finish to "
                    f"save; {_EARLIER}"
                )
            if path.stat().st_size < size:
                raise CheckpointError(
                    f"{path} has {path.stat().st_size} bytes and must have {size}: it is torn; {_EARLIER}"
                )

    def check_bytes(self, key: str, rank: int, world_size: int) -> None:
        """Check that a rank's share of the tensors under a key is as it was saved.

        Raises:
            CheckpointError: a tensor has another CRC-32 than torch.save wrote beside it; names its file.
        """
        pieces = [
            (name, *place)
            for name, rows in sorted(self._files.items())
            for _, place in sorted(rows.items())
            if name.startswith(f"{key}.")
        ]
        for name, file, begin, end in pieces[rank::world_size]:
            with (self.path / file).open("rb") as stored:
                stored.seek(begin)
                piece = io.BytesIO(stored.read(end - begin))
            try:
                is_damaged = damaged_part(piece) is not None
            except zipfile.BadZipFile:
                is_damaged = True
            if is_damaged:
                raise CheckpointError(
                    f"{name!r} is damaged: it has another CRC-32 than when it was saved (in the file "
                    f"{self.path / file}); {_EARLIER}"
                )

    def shapes(self, prefix: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of the tensors whose names start so, by the rest of the name."""
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        return {
            name.removeprefix(prefix): (entry.size, entry.properties.dtype)
            for name, entry in self.entries.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }

    def file(self, name: str, rank: int) -> str:
        """The file that holds a rank's row of an entry, or the entry."""
        rows = self._files.get(name, {})
        found = rows.get(rank) or rows.get(0)
        return str(self.path / found[0]) if found else str(self.path)

    def read(self, state: dict[str, Any]) -> None:
        """Fill the tensors of a nested dictionary; nothing is exchanged with other ranks.

        Raises:
            CheckpointError: a file cannot be read.
        """
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

        planner = DefaultLoadPlanner()
        try:
            planner.set_up_planner(state, self._metadata, True)
            self._reader.set_up_storage_reader(self._metadata, True)
            plan = self._reader.prepare_local_plan(planner.create_local_plan())
            plan = self._reader.prepare_global_plan(planner.create_global_plan([plan]))[0]
            self._reader.read_data(planner.finish_plan(plan), planner).wait()
        except Exception as error:  # torch.load, zip and pickle raise anything on damaged bytes
            names = ", ".join(sorted({self.file(name, 0) for name in _names(state)})[:3])
            raise CheckpointError(
                f"{names} cannot be read ({type(error).__name__}: {error}); {_EARLIER}"
            ) from error


def listed(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of every file, by name, as `gradq.save_checkpoint` noted them; empty if it did not.

    Raises:
        CheckpointError: the list is damaged.
    """
    path = folder / LIST
    if not path.is_file():
        return {}
    try:
        return {
            str(name): (int(size), int(crc)) for name, (size, crc) in json.loads(path.read_text()).items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; {_EARLIER}") from error


def check_file(path: Path, known: tuple[int, int]) -> None:
    """Check that a file is there, with the size and CRC-32 that it was saved with.

    Raises:
        CheckpointError: it is missing, or has another.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {_EARLIER}")
    if size_and_crc(path) != known:
        raise CheckpointError(f"{path} is not as it was saved: it has another size or digest; {_EARLIER}")


def size_and_crc(path: Path) -> tuple[int, int]:
    """The size of a file in bytes, and the CRC-32 of what it holds."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return path.stat().st_size, crc


def _missing_rows(entry: Any) -> bool:
    """Whether there are elements of a tensor that nobody saved."""
    chunks = getattr(entry, "chunks", None)
    return chunks is not None and sum(math.prod(chunk.sizes) for chunk in chunks) < math.prod(entry.size)


def _names(state: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def open_state(sync: Sync, folder: Folder, key: str) -> dict[str, Any]:
    """The state under a key; residuals are read when they are asked for, one entry at a time.

    Raises:
        CheckpointError: there is no state under this key, or it is incomplete or damaged.
    """
    if f"{key}.world_size" not in folder.entries:
        keys = sorted({name.split(".")[0] for name in folder.entries})
        raise CheckpointError(f"it has no gradq state under {key!r}; it holds: {', '.join(keys)}")
    folder.check_complete(key)
    shapes = folder.shapes(f"{key}.")
    head: dict[str, Any] = {}
    for name in ("format", "step", "world_size", "index"):
        if name in shapes:
            head[name] = torch.empty(shapes[name][0], dtype=shapes[name][1])
    folder.read({key: head})
    for name in ("rank", "digests", "norms"):
        if name in shapes:
            head[name] = _Entries(sync, folder, key, {name: shapes[name]})[name]
    for kind in ("local", "shard", "bases"):
        mine = {n.removeprefix(f"{kind}."): s for n, s in shapes.items() if n.startswith(f"{kind}.")}
        head[kind] = _Entries(sync, folder, f"{key}.{kind}", mine, kind != "bases")
    plan = {n.removeprefix("policy."): s for n, s in shapes.items() if n.startswith("policy.")}
    if plan:
        common = _Entries(sync, folder, f"{key}.policy", plan, False)
        rows = _Entries(sync, folder, f"{key}.policy", plan)
        head["policy"] = {name: (rows if name == "measured" else common)[name] for name in plan}
    return head


@dataclass(eq=False)
class _Entries(Mapping[str, Tensor]):
    """The entries under a prefix, read when they are asked for."""

    _sync: Sync
    _folder: Folder
    _prefix: str
    _shapes: Mapping[str, tuple[torch.Size, torch.dtype]]
    _in_rows: bool = True

    def __len__(self) -> int:
        return len(self._shapes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self._shapes[name]
        entry: Tensor
        if self._in_rows and len(shape) > 1 and shape[0] == self._sync.world_size:
            entry = to_row(torch.empty(shape[1:], dtype=dtype), self._sync.group)
        else:
            entry = torch.empty(shape, dtype=dtype)
        state: dict[str, Any] = {name: entry}
        for part in reversed(self._prefix.split(".")):
            state = {part: state}
        self._folder.read(state)
        return entry

    def shape_of(self, name: str) -> torch.Size:
        """The saved shape of an entry, which is not read."""
        return self._shapes[name][0]

    def file(self, name: str, rank: int) -> str:
        """The file of a rank's row of an entry."""
        return self._folder.file(f"{self._prefix}.{name}", rank)
