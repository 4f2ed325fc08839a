"""Checkpoints: the step and the residuals, through torch.distributed.checkpoint (DCP).

Residuals differ between ranks, and DCP keeps only rank 0's copy of a plain tensor. So each becomes one row
of a row-sharded DTensor [W, n], which DCP saves whole::

    dcp.save({"model": ..., "gradq": handle.state_dict()}, checkpoint_id=path)
    gradq.load_checkpoint(handle, path)

On the same number of ranks the run continues bit for bit. On another, every rank takes the mean over the old
ranks' local residuals (so the correction still owed to the mean gradient is preserved), the shard residuals
are reset, and a log line says so.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gradq.errors import CheckpointError
from gradq.feedback import Residuals
from gradq.sync import GradientSync

__all__ = [
    "HasSync",
    "load_checkpoint",
    "load_state_dict",
    "load_sync",
    "own_row",
    "read",
    "state_dict",
    "to_row",
]

_log = logging.getLogger("gradq")
_FORMAT = 1


def state_dict(sync: GradientSync) -> dict[str, Any]:
    """What a run needs to continue. All ranks call it together, between steps.

    Returns:
        "format", "step" and "world_size" as integer tensors; "rank" [W, 1]; "local" and "shard": residuals by
        parameter name, row-sharded DTensors [W, n] (shard residuals padded to the longest piece). At world
        size 1 the rows are plain tensors [1, n].
    """
    local, shard = {}, {}
    for name, length in _shapes(sync)[0].items():
        local[name] = to_row(_residual(sync.feedback.local, name, length), sync.group)
    for name, length in _shapes(sync)[1].items():
        shard[name] = to_row(_residual(sync.feedback.shard, name, length), sync.group)
    return {
        "format": torch.tensor(_FORMAT),
        "step": torch.tensor(sync.step),
        "world_size": torch.tensor(sync.world_size),
        "rank": to_row(torch.tensor([sync.rank]), sync.group),
        "local": local,
        "shard": shard,
    }


def load_state_dict(sync: GradientSync, state: dict[str, Any]) -> None:
    """Continue from a state. All ranks call it together, before a step.

    Args:
        sync: what to load into; its plan decides which residuals are wanted.
        state: from `state_dict`, after dcp.load; or with full tensors [W, n] in the place of DTensors.

    Raises:
        CheckpointError: the state is of another format or model, or holds another rank's rows (saved with
            torch.save on one rank; use DCP, or full tensors).
    """
    if int(state["format"]) != _FORMAT:
        raise CheckpointError(
            f"the saved state has format {int(state['format'])}, this gradq reads {_FORMAT}"
        )
    saved_world_size = int(state["world_size"])
    saved_rank = _shard_of(state["rank"])
    if saved_rank is not None and int(saved_rank) != sync.rank:
        raise CheckpointError(
            f"rank {sync.rank} was given the residuals of rank {int(saved_rank)}: torch.save "
            "keeps one rank's rows only. Save with torch.distributed.checkpoint, or call full_tensor() on "
            "every entry"
        )
    _restore(sync, saved_world_size, int(state["step"]), state["local"], state["shard"])


def load_checkpoint(handle: HasSync, checkpoint_id: str | Path, key: str = "gradq") -> None:
    """Load what `dcp.save({key: handle.state_dict(), ...})` wrote, on any number of ranks. Collective.

    Args:
        handle: from `gradq.compress`, or a `gradq.LocalSGD` or `gradq.DiLoCo`.
        checkpoint_id: the checkpoint's folder.
        key: where the state stands in the saved dictionary.

    Raises:
        CheckpointError: there is no such checkpoint or key, or the model differs.
    """
    if hasattr(handle, "load_checkpoint"):  # it has more to load than its sync
        handle.load_checkpoint(checkpoint_id, key)
        return
    load_sync(handle.sync, checkpoint_id, key)


def load_sync(sync: GradientSync, checkpoint_id: str | Path, key: str) -> None:
    """Load the sync's part; see `load_checkpoint`."""
    saved = _saved_shapes(Path(checkpoint_id), key)
    _check_fit({name: shape[1] for name, shape in saved["local"].items()}, sync)
    scalars = {name: torch.zeros((), dtype=torch.int64) for name in ("format", "step", "world_size")}
    read({key: scalars}, checkpoint_id, sync)
    if int(scalars["world_size"]) == sync.world_size:
        state = state_dict(sync)
        for kind in ("local", "shard"):
            state[kind] = {n: row for n, row in state[kind].items() if saved[kind].get(n) == row.shape}
        read({key: state}, checkpoint_id, sync)
        load_state_dict(sync, state)
        _log_difference(
            "no longer use feedback; their residuals were dropped", saved["local"], state["local"]
        )
        return
    local: dict[str, Tensor] = {}
    for name, shape in saved["local"].items():  # one at a time: all ranks' rows of one parameter in memory
        rows = {key: {"local": {name: torch.empty(shape)}}}
        read(rows, checkpoint_id, sync)
        local[name] = rows[key]["local"][name].mean(0, keepdim=True)
    _restore(sync, int(scalars["world_size"]), int(scalars["step"]), local, {})


class HasSync(Protocol):
    """What `load_checkpoint` needs of a handle."""

    sync: GradientSync


def _restore(
    sync: GradientSync, saved_world_size: int, step: int, local: dict[str, Tensor], shard: dict[str, Tensor]
) -> None:
    """Set step and residuals; nothing is changed if something does not fit."""
    wanted_local, wanted_shard = _shapes(sync)
    same = saved_world_size == sync.world_size
    rows = {name: own_row(rows, sync, same) for name, rows in local.items() if name in wanted_local}
    shard_rows = {
        name: own_row(rows, sync, same) for name, rows in shard.items() if same and name in wanted_shard
    }
    _check_fit({name: row.numel() for name, row in rows.items()}, sync)
    shard_rows = {name: row for name, row in shard_rows.items() if row.numel() == wanted_shard[name]}
    sync.feedback.local.clear()
    sync.feedback.shard.clear()
    for name, row in rows.items():
        sync.feedback.local.replace(name, row)
    for name, row in shard_rows.items():
        sync.feedback.shard.replace(name, row[: sync.piece_numel(name, sync.rank)])
    sync.step = step
    if not same:
        _log.warning(
            "resumed on %d ranks from %d at step %d: every rank took the mean of the old local residuals; "
            "shard residuals start at zero",
            sync.world_size,
            saved_world_size,
            step,
        )
    _log_difference("no longer use feedback; their residuals were dropped", local, wanted_local)
    _log_difference("have no saved local residual and start at zero", wanted_local, rows)
    if same:
        _log_difference("have no saved shard residual that fits and start at zero", wanted_shard, shard_rows)


def _check_fit(saved_numel: Mapping[str, int], sync: GradientSync) -> None:
    for name, numel in saved_numel.items():
        info = sync.parameters.get(name)
        if info is None or info.numel != numel:
            ours = "does not exist" if info is None else f"has {info.numel}"
            raise CheckpointError(
                f"the saved residual of {name!r} has {numel} elements, the parameter of this model {ours}; "
                "this checkpoint is of another model"
            )


def _log_difference(what: str, these: Mapping[str, object], those: Mapping[str, object]) -> None:
    names = sorted(these.keys() - those.keys())
    if names:
        _log.warning("resumed: %d parameters (%s, ...) %s", len(names), names[0], what)


def _shapes(sync: GradientSync) -> tuple[dict[str, int], dict[str, int]]:
    """Elements of the local residuals, and of the padded shard residuals, by name."""
    segments = [sync.segment(name) for name in sync.plan]
    local = {segment.name: segment.numel for segment in segments if segment.feedback1}
    shard = {
        segment.name: max(sync.piece_numel(segment.name, rank) for rank in range(sync.world_size))
        for segment in segments
        if segment.feedback2
    }
    return local, shard


def _residual(residuals: Residuals, name: str, numel: int) -> Tensor:
    """The current residual as fp32 [numel], padded with zeros."""
    row = torch.zeros(numel)
    if name in residuals:
        current = residuals.current(name)
        row[: current.numel()] = current
    return row


def to_row(row: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's row of a row-sharded [W, ...]."""
    if group.size() == 1:
        return row[None]
    from torch.distributed.device_mesh import DeviceMesh  # DTensor takes 0.6 s to import
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(row[None], DeviceMesh.from_group(group, "cpu"), [Shard(0)])


def _shard_of(rows: Tensor) -> Tensor | None:
    """The local rows of a DTensor, None for a plain tensor."""
    from torch.distributed.tensor import DTensor

    return rows.to_local() if isinstance(rows, DTensor) else None


def own_row(rows: Tensor, sync: GradientSync, same: bool) -> Tensor:
    """This rank's part of rows [W, ...]; without a row of its own the mean, or of integers the first."""
    own = _shard_of(rows)
    if own is not None:
        return own[0]
    if same:
        return rows[sync.rank]
    return rows.mean(0) if rows.is_floating_point() else rows[0]


def _saved_shapes(path: Path, key: str) -> dict[str, dict[str, torch.Size]]:
    """Shapes of the saved residuals, by kind and parameter name."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        metadata = FileSystemReader(path).read_metadata()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of torch.distributed.checkpoint: {error}"
        ) from error
    entries = metadata.state_dict_metadata
    if f"{key}.world_size" not in entries:
        keys = sorted({name.split(".")[0] for name in entries})
        raise CheckpointError(f"{path} has no gradq state under {key!r}; it holds: {', '.join(keys)}")
    shapes: dict[str, dict[str, torch.Size]] = {"local": {}, "shard": {}}
    for name, entry in entries.items():
        for kind, found in shapes.items():
            if name.startswith(f"{key}.{kind}.") and isinstance(entry, TensorStorageMetadata):
                found[name.removeprefix(f"{key}.{kind}.")] = entry.size
    return shapes


def read(state: dict[str, Any], checkpoint_id: str | Path, sync: GradientSync) -> None:
    """Fill the tensors of state from a checkpoint. Collective."""
    from torch.distributed.checkpoint.state_dict_loader import load

    load(state, checkpoint_id=str(checkpoint_id), process_group=sync.group)
