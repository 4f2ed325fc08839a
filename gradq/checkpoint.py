"""Checkpoints: the step and the residuals, through torch.distributed.checkpoint (DCP).

Residuals differ between ranks, and DCP keeps only rank 0's copy of a plain tensor. So each becomes one row
of a row-sharded DTensor [W, n], which DCP saves whole::

    dcp.save({"model": ..., "gradq": handle.state_dict()}, checkpoint_id=path)
    gradq.load_checkpoint(handle, path)

On the same number of ranks the run continues bit for bit. On another, every rank takes the mean over the old
ranks' local residuals (so the correction still owed to the mean gradient is preserved), the shard residuals
are reset, and a log line says so. The bases of `collectives.low_rank` are equal on all ranks, and are plain
tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gradq.collectives import basis_numel
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
        size 1 the rows are plain tensors [1, n]. "bases": tensors [n], by parameter name. With an adaptive
        policy also "policy": its plan, and what each rank measured since, row-sharded fp64 [W, n].
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
        "bases": {name: _residual(sync.feedback.bases, name, n) for name, n in _bases(sync).items()},
        **_policy_state(sync),
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
    _check_source(sync, state)
    saved_world_size = int(state["world_size"])
    _restore_policy(sync, saved_world_size, state.get("policy"))
    bases = state.get("bases", {})  # states saved before there was low rank have none
    _restore(sync, saved_world_size, int(state["step"]), state["local"], state["shard"], bases)


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
    # FSDP2 with replicas: the shard's own
    load_sync(handle.sync, checkpoint_id, ".".join([key, *getattr(handle, "checkpoint_path", ())]))


def load_sync(sync: GradientSync, checkpoint_id: str | Path, key: str) -> None:
    """Load the sync's part; see `load_checkpoint`."""
    saved = _saved_shapes(Path(checkpoint_id), key)
    _check_fit({name: shape[1] for name, shape in saved["local"].items()}, sync)
    scalars = {name: torch.zeros((), dtype=torch.int64) for name in ("format", "step", "world_size")}
    read({key: scalars}, checkpoint_id, sync)
    _load_policy(sync, int(scalars["world_size"]), saved["policy"], checkpoint_id, key)
    if int(scalars["world_size"]) == sync.world_size:
        state = state_dict(sync)
        for kind in ("local", "shard", "bases"):
            state[kind] = {n: row for n, row in state[kind].items() if saved[kind].get(n) == row.shape}
        state.pop("policy", None)  # it is in place
        read({key: state}, checkpoint_id, sync)
        _check_source(sync, state)
        _restore(sync, sync.world_size, int(state["step"]), state["local"], state["shard"], state["bases"])
        _log_difference(
            "no longer use feedback; their residuals were dropped", saved["local"], state["local"]
        )
        return
    local: dict[str, Tensor] = {}
    bases = {name: torch.empty(shape) for name, shape in saved["bases"].items()}
    read({key: {"bases": bases}}, checkpoint_id, sync)
    for name, shape in saved["local"].items():  # one at a time: all ranks' rows of one parameter in memory
        rows = {key: {"local": {name: torch.empty(shape)}}}
        read(rows, checkpoint_id, sync)
        local[name] = rows[key]["local"][name].mean(0, keepdim=True)
    _restore(sync, int(scalars["world_size"]), int(scalars["step"]), local, {}, bases)


def _policy_state(sync: GradientSync) -> dict[str, Any]:
    policy = sync.learner.adaptive
    if policy is None:
        return {}
    measured = torch.tensor(policy.measured(), dtype=torch.float64)
    return {"policy": {**policy.state_dict(), "measured": to_row(measured, sync.group)}}


def _load_policy(
    sync: GradientSync,
    saved_world_size: int,
    saved: Mapping[str, torch.Size],
    checkpoint_id: str | Path,
    key: str,
) -> None:
    """Bring an adaptive policy to the saved plan, before anything asks which residuals are wanted."""
    policy = sync.learner.adaptive
    if policy is None or not saved:
        _restore_policy(sync, saved_world_size, saved or None)
        return
    if saved_world_size == sync.world_size:
        state = _policy_state(sync)["policy"]
    else:
        state = policy.state_dict() | {"measured": torch.empty(saved["measured"], dtype=torch.float64)}
    for name, value in state.items():
        if saved.get(name) != value.shape:
            raise CheckpointError(
                f"the saved plan is of other parameters or candidates than {sync.learner.label}"
            )
    read({key: {"policy": state}}, checkpoint_id, sync)
    _restore_policy(sync, saved_world_size, state)


def _restore_policy(sync: GradientSync, saved_world_size: int, state: Mapping[str, Any] | None) -> None:
    """Make the saved plan current, or say that there is none to make."""
    policy = sync.learner.adaptive
    if policy is None:
        if state is not None:
            _log.warning("resumed: the saved plan of an adaptive policy is not used; this run has none")
        return
    if state is None:
        _log.warning("resumed: no plan was saved; %s starts from its first", sync.learner.label)
        return
    measured = own_row(state["measured"], sync, saved_world_size == sync.world_size)
    policy.load_state_dict({n: v for n, v in state.items() if n != "measured"}, measured.tolist())
    sync.set_policy(policy, sync.learner.label)


class HasSync(Protocol):
    """What `load_checkpoint` needs of a handle."""

    sync: GradientSync


def _restore(
    sync: GradientSync,
    saved_world_size: int,
    step: int,
    local: dict[str, Tensor],
    shard: dict[str, Tensor],
    bases: dict[str, Tensor],
) -> None:
    """Set step, residuals and bases; nothing is changed if a local residual does not fit."""
    wanted_local, wanted_shard = _shapes(sync)
    same = saved_world_size == sync.world_size
    rows = {name: own_row(rows, sync, same) for name, rows in local.items() if name in wanted_local}
    shard_rows = {
        name: own_row(rows, sync, same) for name, rows in shard.items() if same and name in wanted_shard
    }
    _check_fit({name: row.numel() for name, row in rows.items()}, sync)
    shard_rows = {name: row for name, row in shard_rows.items() if row.numel() == wanted_shard[name]}
    wanted_bases = _bases(sync)
    fitting = {name: basis for name, basis in bases.items() if wanted_bases.get(name) == basis.numel()}
    sync.feedback.local.clear()
    sync.feedback.shard.clear()
    sync.feedback.bases.clear()
    for name, basis in fitting.items():
        sync.feedback.bases.replace(name, basis)
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
    _log_difference("have no saved basis that fits and start at random", wanted_bases, fitting)
    if same:
        _log_difference("have no saved shard residual that fits and start at zero", wanted_shard, shard_rows)


def _check_source(sync: GradientSync, state: dict[str, Any]) -> None:
    if int(state["format"]) != _FORMAT:
        raise CheckpointError(
            f"the saved state has format {int(state['format'])}, this gradq reads {_FORMAT}"
        )
    saved_rank = _shard_of(state["rank"])
    if saved_rank is not None and int(saved_rank) != sync.rank:
        raise CheckpointError(
            f"rank {sync.rank} was given the residuals of rank {int(saved_rank)}: torch.save "
            "keeps one rank's rows only. Save with torch.distributed.checkpoint, or call full_tensor() on "
            "every entry"
        )


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


def _bases(sync: GradientSync) -> dict[str, int]:
    """Elements of what low rank remembers, by name."""
    segments = [sync.segment(name) for name, entry in sync.plan.items() if entry.low_rank]
    return {segment.name: basis_numel(segment.matrix, segment.low_rank) for segment in segments}


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
    shapes: dict[str, dict[str, torch.Size]] = {"local": {}, "shard": {}, "bases": {}, "policy": {}}
    for name, entry in entries.items():
        for kind, found in shapes.items():
            if name.startswith(f"{key}.{kind}.") and isinstance(entry, TensorStorageMetadata):
                found[name.removeprefix(f"{key}.{kind}.")] = entry.size
    return shapes


def read(state: dict[str, Any], checkpoint_id: str | Path, sync: GradientSync) -> None:
    """Fill the tensors of state from a checkpoint. Collective."""
    from torch.distributed.checkpoint.state_dict_loader import load

    load(state, checkpoint_id=str(checkpoint_id), process_group=sync.group)
