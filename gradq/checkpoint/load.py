"""Loading: from a state in memory, or from a folder of torch.distributed.checkpoint."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch.distributed as dist

from gradq.checkpoint.files import Folder, open_state
from gradq.checkpoint.parse import Saved, parse
from gradq.checkpoint.restore import restore, together
from gradq.checkpoint.rows import mapping
from gradq.errors import CheckpointError, UnsupportedError
from gradq.sync.base import Sync

__all__ = ["Resumable", "load_checkpoint", "load_state_dict", "load_sync", "read_sync"]


class Resumable(ABC):
    """What `gradq.load_checkpoint` takes: a handle."""

    @abstractmethod
    def load_checkpoint(self, checkpoint_id: str | os.PathLike[str], key: str = "gradq") -> None:
        """Continue from a checkpoint saved by any number of ranks. Collective."""


def load_state_dict(
    sync: Sync,
    state: object,
    path: Sequence[str] = (),
    groups: Sequence[dist.ProcessGroup] | None = None,
) -> None:
    """Continue from a state. All ranks call it together, before a step.

    Args:
        sync: the sync to load into; its plan decides which residuals are wanted.
        state: the state from `gradq.checkpoint.state_dict`, after dcp.load; or from `gather_rows`, with full
            tensors [W, n] in the place of DTensors, of any number of ranks.
        path: the keys under which this rank's part of the state stands.
        groups: the ranks that must all be able to load, see `together`; the sync's own by default.

    Raises:
        CheckpointError: the state is damaged, of another format or model, or holds another rank's rows; on
            this rank or on another. Nothing is changed on any rank.
    """
    with together(groups or [sync.group]) as notes:
        for name in path:
            if name not in mapping(state, "the gradq state"):
                raise CheckpointError(f"the saved state has no {name!r}, this rank's part of it")
            state = mapping(state, "the gradq state")[name]
        saved = parse(sync, state)
        notes |= saved.notes()
    restore(sync, saved)


def load_checkpoint(handle: Resumable, checkpoint_id: str | os.PathLike[str], key: str = "gradq") -> None:
    """Load what `dcp.save({key: handle.state_dict(), ...})` wrote, on any number of ranks. Collective.

    Args:
        handle: the handle from `gradq.compress`, or a `gradq.LocalSGD` or `gradq.DiLoCo`.
        checkpoint_id: the checkpoint's folder.
        key: the key under which the state stands in the saved dictionary.

    Raises:
        UnsupportedError: the first argument is no handle.
        CheckpointError: there is no such checkpoint or key, it is torn or damaged, or the model differs.
            Nothing is changed on any rank.
    """
    if not isinstance(handle, Resumable):
        raise UnsupportedError(
            "gradq.load_checkpoint(handle, folder) takes the handle that gradq.compress returned (or a "
            f"gradq.LocalSGD or gradq.DiLoCo) first, got {type(handle).__name__}"
        )
    if not isinstance(key, str):
        raise CheckpointError(f"key must be the name of the state in the checkpoint, got {key!r}")
    handle.load_checkpoint(checkpoint_id, key)


def load_sync(
    sync: Sync,
    checkpoint_id: str | os.PathLike[str],
    key: str,
    groups: Sequence[dist.ProcessGroup] | None = None,
) -> None:
    """Load the sync's part; see `load_checkpoint`, and `load_state_dict` for the groups."""
    with together(groups or [sync.group]) as notes:
        saved = read_sync(sync, checkpoint_id, key)
        notes |= saved.notes()
    restore(sync, saved)


def read_sync(sync: Sync, checkpoint_id: str | os.PathLike[str], key: str) -> Saved:
    """Read and check the sync's part; nothing is changed, and nothing exchanged.

    Raises:
        CheckpointError: it cannot be loaded, on this rank.
    """
    folder = Folder(checkpoint_id)
    try:
        return parse(sync, open_state(sync, folder, key))
    except CheckpointError as error:
        raise CheckpointError(f"{folder.path}: {error}") from error
