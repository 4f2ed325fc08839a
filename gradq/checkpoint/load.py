"""Loading: from a state in memory, or from a folder of torch.distributed.checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch.distributed as dist

from gradq.checkpoint.files import Folder, open_state
from gradq.checkpoint.parse import Saved, parse
from gradq.checkpoint.restore import restore, together
from gradq.checkpoint.rows import mapping
from gradq.errors import CheckpointError
from gradq.sync.base import Sync

__all__ = ["load_state_dict", "load_sync", "read_sync"]


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


def load_sync(
    sync: Sync,
    checkpoint_id: str | os.PathLike[str],
    key: str,
    groups: Sequence[dist.ProcessGroup] | None = None,
) -> None:
    """Load a state from a folder; see `gradq.load_checkpoint`, and `load_state_dict` for the groups."""
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
