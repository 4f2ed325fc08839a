"""Checkpoints of local steps, through torch.distributed.checkpoint (DCP).

Between two averages every rank has parameters and an inner optimizer of its own, and DCP keeps only rank 0's
copy of a plain tensor. So the state holds everything, the model and the inner optimizer too, and whatever
differs between ranks is one row of a row-sharded DTensor [W, ...]::

    dcp.save({"gradq": diloco.state_dict()}, checkpoint_id=path)
    gradq.load_checkpoint(diloco, path)

On the same number of ranks the run continues bit for bit, also between outer steps. On another, every rank
takes the mean of the old ranks' rows (of integers, rank 0's): the progress that the next average would have
found is preserved, and so is the correction that error feedback owes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradq import checkpoint
from gradq.errors import CheckpointError

if TYPE_CHECKING:
    from gradq.hooks.local_sgd import LocalSGD

__all__ = ["load_checkpoint", "load_state_dict", "state_dict"]


def state_dict(local: LocalSGD) -> dict[str, Any]:
    """All that training needs to continue. All ranks call it after the same inner step.

    Returns:
        "sync": see `gradq.checkpoint.state_dict`; "inner_step", "fragment" (under way, -1 if none), "due";
        "shared": the same on all ranks: "anchor.<name>", "momentum.<name>", and "mean.<name>" of the fragment
        under way; "rows": row-sharded: "parameter.<name>", "buffer.<name>", "sent.<name>" and
        "optimizer.<index>.<key>"; "optimizer": the inner optimizer's settings as JSON.
    """
    pending = local.wait() if local.pending is not None else None
    group = local.sync.group
    scalars, tensors = _optimizer_state(local)
    return {
        "sync": checkpoint.state_dict(local.sync),
        "inner_step": torch.tensor(local.inner_step),
        "fragment": torch.tensor(-1 if pending is None else pending.fragment),
        "due": torch.tensor(0 if pending is None else pending.due),
        "shared": {name: tensor.clone() for name, tensor in _shared(local).items()},
        "rows": {
            name: checkpoint.to_row(tensor.detach().cpu().clone(), group)
            for name, tensor in (_own(local) | tensors).items()
        },
        "optimizer": scalars,
    }


def load_state_dict(local: LocalSGD, state: dict[str, Any]) -> None:
    """Continue from a state. All ranks call it together.

    Args:
        local: made with the same model, optimizer and schedule.
        state: from `state_dict`, after dcp.load; or with full tensors [W, ...] in the place of DTensors.

    Raises:
        CheckpointError: the state does not fit, or holds another rank's rows.
    """
    with checkpoint.together([local.sync.group]) as notes:
        _check(local, state)
        saved = checkpoint.parse(local.sync, state["sync"])
        notes |= saved.notes()
    checkpoint.restore(local.sync, saved)
    _restore(local, state)


def load_checkpoint(local: LocalSGD, checkpoint_id: str | Path, key: str) -> None:
    """Load what `dcp.save({key: local.state_dict()})` wrote, on any number of ranks. Collective.

    Raises:
        CheckpointError: there is no such checkpoint or key, or it does not fit.
    """
    with checkpoint.together([local.sync.group]) as notes:
        saved = checkpoint.read_sync(local.sync, checkpoint_id, f"{key}.sync")
        folder = checkpoint.Folder(checkpoint_id)
        folder.check_complete(key)
        state, shapes = _template(local, folder, key)
        folder.read({key: state})
        for name, (shape, dtype) in shapes.items():  # of another world size: all ranks' rows of one tensor
            rows = {name: torch.empty(shape, dtype=dtype)}
            folder.read({key: {"rows": rows}})
            state["rows"][name] = checkpoint.own_row(rows[name], local.sync, same=False)[None]
        _check(local, state)
        notes |= saved.notes()
    checkpoint.restore(local.sync, saved)
    _restore(local, state)


def _template(
    local: LocalSGD, folder: checkpoint.Folder, key: str
) -> tuple[dict[str, Any], dict[str, tuple[torch.Size, torch.dtype]]]:
    """Empty tensors like those of a checkpoint, and the rows of another world size, which are left out."""
    sync = local.sync
    state: dict[str, Any] = {"optimizer": "", "shared": {}, "rows": {}}
    others = {}
    for name, (shape, dtype) in folder.shapes(f"{key}.").items():
        if name.startswith("sync."):
            continue
        if name.startswith("shared."):
            state["shared"][name.removeprefix("shared.")] = torch.empty(shape, dtype=dtype)
        elif not name.startswith("rows."):
            state[name] = torch.empty(shape, dtype=dtype)
        elif shape[0] == sync.world_size:
            row = torch.empty(shape[1:], dtype=dtype)
            state["rows"][name.removeprefix("rows.")] = checkpoint.to_row(row, sync.group)
        else:
            others[name.removeprefix("rows.")] = (shape, dtype)
    if "inner_step" not in state:
        raise CheckpointError(f"{folder.path} has no state of LocalSGD or DiLoCo under {key!r}")
    return state, others


def _shared(local: LocalSGD) -> dict[str, Tensor]:
    """What is the same on all ranks, by name; views."""
    shared: dict[str, Tensor] = {}
    for bucket in local.buckets():
        shared |= {f"anchor.{name}": view for name, view in bucket.views(bucket.anchor).items()}
        if bucket.momentum is not None:
            shared |= {f"momentum.{name}": view for name, view in bucket.views(bucket.momentum).items()}
    return shared | _under_way(local, "mean")


def _own(local: LocalSGD) -> dict[str, Tensor]:
    """What differs between ranks, by name; the optimizer's state aside."""
    own = {f"parameter.{n}": p for bucket in local.buckets() for n, p in bucket.parameters.items()}
    own |= {f"buffer.{name}": buffer for name, buffer in local.model.named_buffers()}
    return own | _under_way(local, "sent")


def _under_way(local: LocalSGD, kind: str) -> dict[str, Tensor]:
    pending = local.pending
    if pending is None:
        return {}
    flats = pending.means if kind == "mean" else pending.sent
    buckets = local.fragments[pending.fragment].buckets[: len(flats)]
    views: dict[str, Tensor] = {}
    for bucket, flat in zip(buckets, flats, strict=True):
        views |= {f"{kind}.{name}": view for name, view in bucket.views(flat).items()}
    return views


def _optimizer_state(local: LocalSGD) -> tuple[str, dict[str, Tensor]]:
    """The inner optimizer's settings and plain numbers as JSON, and its tensors by name."""
    if local.inner_optimizer is None:
        return "", {}
    whole = local.inner_optimizer.state_dict()
    tensors, numbers = {}, []
    for index, values in whole["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                numbers.append((index, key, value))
    groups = [
        {key: float(value) if isinstance(value, Tensor) else value for key, value in group.items()}
        for group in whole["param_groups"]
    ]
    try:
        return json.dumps({"groups": groups, "numbers": numbers}), tensors
    except TypeError as error:
        raise CheckpointError(f"the inner optimizer's settings cannot be saved: {error}") from error


def _check(local: LocalSGD, state: dict[str, Any]) -> None:
    """Whether the state has just what this model needs.

    Raises:
        CheckpointError: naming what differs.
    """
    wanted = {n: t.shape for n, t in _shared(local).items() if not n.startswith("mean.")}
    wanted |= {n: t.shape for n, t in _own(local).items() if not n.startswith("sent.")}
    saved = {n: t.shape for n, t in state["shared"].items() if not n.startswith("mean.")}
    saved |= {n: t.shape[1:] for n, t in state["rows"].items() if not n.startswith(("sent.", "optimizer."))}
    for name in [*wanted, *saved]:
        if wanted.get(name) != saved.get(name):
            raise CheckpointError(
                f"{name} has the shape {_shape(saved.get(name))} in the saved state and "
                f"{_shape(wanted.get(name))} here; this checkpoint is of another model or outer step"
            )
    fragment = int(state["fragment"])
    names = {n.removeprefix("mean.") for n in state["shared"] if n.startswith("mean.")}
    if fragment >= 0 and (
        fragment >= len(local.fragments)
        or names != {n for bucket in local.fragments[fragment].buckets for n in bucket.parameters}
    ):
        raise CheckpointError(
            f"the saved state was averaging fragment {fragment}, cut otherwise here; resume with the same "
            "number of fragments, or save when nothing is under way"
        )


def _shape(shape: torch.Size | None) -> object:
    return "nothing" if shape is None else tuple(shape)


def _restore(local: LocalSGD, state: dict[str, Any]) -> None:
    sync = local.sync
    rows = {
        name: checkpoint.own_row(rows, sync, same=rows.shape[0] == sync.world_size)
        for name, rows in state["rows"].items()
    }
    local.inner_step = int(state["inner_step"])
    local.pending = None
    if int(state["fragment"]) >= 0:
        has_sent = any(name.startswith("sent.") for name in rows)
        local.resume_pending(int(state["fragment"]), int(state["due"]), has_sent)
    with torch.no_grad():
        for name, tensor in _shared(local).items():
            tensor.copy_(state["shared"][name])
        for name, tensor in _own(local).items():
            tensor.copy_(rows[name])
    if local.inner_optimizer is not None:
        _restore_optimizer(local.inner_optimizer, state["optimizer"], rows)


def _restore_optimizer(optimizer: torch.optim.Optimizer, text: str, rows: dict[str, Tensor]) -> None:
    if not text:
        raise CheckpointError(
            "the saved state has no inner optimizer: it was saved by a run that calls step() itself"
        )
    saved = json.loads(text)
    groups = optimizer.state_dict()["param_groups"]
    if [len(group["params"]) for group in saved["groups"]] != [len(group["params"]) for group in groups]:
        raise CheckpointError("the inner optimizer has other parameter groups than the saved one")
    for group, theirs in zip(groups, saved["groups"], strict=True):
        for key, value in theirs.items():
            if key != "params":
                group[key] = tuple(value) if isinstance(value, list) else value
    state: dict[int, dict[str, Any]] = {}
    for index, key, value in saved["numbers"]:
        state.setdefault(index, {})[key] = value
    for name, row in rows.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = row.clone()
    optimizer.load_state_dict({"state": state, "param_groups": groups})
