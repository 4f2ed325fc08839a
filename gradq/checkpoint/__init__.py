"""Checkpoints: the step and the residuals.

Residuals differ between ranks, and torch.distributed.checkpoint (DCP) keeps only rank 0's copy of a plain
tensor. So they stand in row-sharded DTensors [W, n], which DCP saves whole::

    dcp.save({"model": ..., "gradq": handle.state_dict()}, checkpoint_id=folder)     # all ranks
    gradq.load_checkpoint(handle, folder)

Scripts in which rank 0 alone saves need all ranks' rows on rank 0::

    state = handle.gathered_state_dict()                                             # all ranks
    if rank == 0:
        torch.save({"model": ..., "gradq": state}, file)
    handle.load_state_dict(torch.load(file)["gradq"])                                # all ranks

On the same number of ranks the run continues bit for bit. On another, every rank takes the mean over the old
ranks' local residuals (so the correction still owed to the mean gradient is preserved), the shard residuals
are reset, and a log line says so. The bases of `collectives.low_rank` are equal on all ranks.

Everything that is saved has a digest (CRC-32), which is checked when it is loaded: damage is found and named,
forgery is not. DCP's `.metadata` is a pickle: load checkpoints of people you trust only. All ranks load, or
none changes.

In reading order: `packing` (few tensors), `state` (saving), `rows` and `parse` (checking), `files` (DCP's
folders), `restore` (making it current), `load`, and `newest` (whole checkpoints, written aside).
"""

from __future__ import annotations

from gradq.checkpoint.files import Folder
from gradq.checkpoint.load import load_state_dict, load_sync, read_sync
from gradq.checkpoint.newest import load_newest, save_checkpoint
from gradq.checkpoint.parse import parse
from gradq.checkpoint.restore import restore, together
from gradq.checkpoint.rows import own_row
from gradq.checkpoint.state import gather_rows, state_dict, to_row

__all__ = [
    "Folder",
    "gather_rows",
    "load_newest",
    "load_state_dict",
    "load_sync",
    "own_row",
    "parse",
    "read_sync",
    "restore",
    "save_checkpoint",
    "state_dict",
    "to_row",
    "together",
]
