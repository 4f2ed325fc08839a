"""Checkpoints of local steps, through torch.distributed.checkpoint (DCP).

Between two averages every rank has parameters and an inner optimizer of its own, and DCP keeps only rank 0's
copy of a plain tensor. So the state holds everything, the model and the inner optimizer too, and whatever
differs between ranks is one row of a row-sharded DTensor [W, ...]. Frozen parameters are equal on all ranks
and saved once::

    dcp.save({"gradq": diloco.state_dict()}, checkpoint_id=path)
    gradq.load_checkpoint(diloco, path)

On the same number of ranks the run continues bit for bit, also between outer steps. On another, every rank
takes the mean of the old ranks' rows (of integers, rank 0's): the progress that the next average would have
found is preserved, and so is the correction that error feedback owes.

Parameters that were frozen or unfrozen between saving and loading are no obstacle: one that is frozen now
takes the mean over the saved ranks, one that is trained now starts from what was saved, on all ranks. The
inner optimizer's state finds its parameters by name.
"""

from __future__ import annotations

import json
import logging
import os
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradq import checkpoint
from gradq.errors import CheckpointError
from gradq.local_steps import membership
from gradq.local_steps.inner_optimizer import stateful
from gradq.local_steps.steps import LocalSteps

__all__ = ["load_checkpoint", "load_state_dict", "state_dict"]

_log = logging.getLogger("gradq")


def state_dict(local: LocalSteps) -> dict[str, Any]:
    """All that training needs to continue. All ranks call it after the same inner step.

    Returns:
        "sync": see `gradq.checkpoint.state_dict`; "inner_step", "fragment" (under way, -1 if none), "due";
        "shared": the same on all ranks: "anchor.<name>", "momentum.<name>", "frozen.<name>", and of the
        fragment under way "mean.<name>"; "rows": row-sharded: "parameter.<name>", "buffer.<name>",
        "sent.<name>" and "optimizer.<index>.<key>"; "optimizer": the inner optimizer's settings as JSON.
    """
    pending = local.wait() if local.pending is not None else None
    group = local.sync.group
    scalars, tensors = _optimizer_state(local)
    return {
        "sync": checkpoint.state_dict(local.sync),
        "inner_step": torch.tensor(local.inner_step),
        "fragment": torch.tensor(-1 if pending is None else pending.fragment),
        "due": torch.tensor(0 if pending is None else pending.due),
        "shared": {
            name: tensor.detach().cpu().clone() for name, tensor in (_shared(local) | _frozen(local)).items()
        },
        "rows": {
            name: checkpoint.to_row(tensor.detach().cpu().clone(), group)
            for name, tensor in (_own(local) | tensors).items()
        },
        "optimizer": scalars,
    }


def load_state_dict(local: LocalSteps, state: dict[str, Any]) -> None:
    """Continue from a state. All ranks call it together.

    Args:
        local: the local steps, made with the same model, optimizer and schedule.
        state: the state from `state_dict`, after dcp.load; or with full tensors [W, ...] in the place of
            DTensors.

    Raises:
        CheckpointError: the state does not fit, or holds another rank's rows.
    """
    with checkpoint.together([local.sync.group]) as notes:
        _check(local, state)
        saved = checkpoint.parse(local.sync, state["sync"])
        notes |= saved.notes()
    checkpoint.restore(local.sync, saved)
    _restore(local, state)


def load_checkpoint(local: LocalSteps, checkpoint_id: str | os.PathLike[str], key: str) -> None:
    """Load what `dcp.save({key: local.state_dict()})` wrote, on any number of ranks. Collective.

    Raises:
        CheckpointError: there is no such checkpoint or key, or it does not fit.
    """
    with checkpoint.together([local.sync.group]) as notes:
        saved = checkpoint.read_sync(local.sync, checkpoint_id, f"{key}.sync")
        folder = checkpoint.Folder(checkpoint_id)
        folder.check_complete(key)
        folder.check_bytes(key, local.sync.rank, local.sync.world_size)
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
    local: LocalSteps, folder: checkpoint.Folder, key: str
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


def _shared(local: LocalSteps) -> dict[str, Tensor]:
    """What is the same on all ranks, by name; views."""
    return local.anchors() | _under_way(local, "mean")


def _frozen(local: LocalSteps) -> dict[str, Tensor]:
    """Parameters that are neither averaged nor about to be, by name: equal on all ranks."""
    members = local.parameters()
    parameters = {n: p for n, p in membership.named(local.model).items() if n not in members and p.numel()}
    return {f"frozen.{name}": p for name, p in parameters.items() if not p.requires_grad}


def _own(local: LocalSteps) -> dict[str, Tensor]:
    """What differs between ranks, by name; the optimizer's state aside."""
    unfrozen = {n: p for n, p in membership.named(local.model).items() if p.requires_grad and p.numel()}
    own = {f"parameter.{name}": p for name, p in (unfrozen | local.parameters()).items()}
    own |= {f"buffer.{name}": buffer for name, buffer in membership.buffers(local.model).items()}
    return own | _under_way(local, "sent")


def _under_way(local: LocalSteps, kind: str) -> dict[str, Tensor]:
    pending = local.pending
    if pending is None:
        return {}
    flats = pending.means if kind == "mean" else pending.sent
    buckets = local.fragments[pending.fragment].buckets[: len(flats)]
    views: dict[str, Tensor] = {}
    for bucket, flat in zip(buckets, flats, strict=True):
        views |= {f"{kind}.{name}": view for name, view in bucket.views(flat).items()}
    return views


def _optimizer_state(local: LocalSteps) -> tuple[str, dict[str, Tensor]]:
    """The inner optimizer's settings and plain numbers as JSON, and its tensors by name."""
    if local.inner_optimizer is None:
        return "", {}
    optimizer = stateful(local.inner_optimizer)
    whole = optimizer.state_dict()
    tensors, numbers = {}, []
    for index, values in whole["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                numbers.append((index, key, value))
    names = {id(parameter): name for name, parameter in membership.named(local.model).items()}
    groups = []
    for group, real in zip(whole["param_groups"], optimizer.param_groups, strict=True):
        plain = {k: float(v) if isinstance(v, Tensor) else v for k, v in group.items()}
        groups.append(plain | {"names": [names.get(id(parameter)) for parameter in real["params"]]})
    try:
        return json.dumps({"groups": groups, "numbers": numbers}), tensors
    except TypeError as error:
        raise CheckpointError(f"the inner optimizer's settings cannot be saved: {error}") from error


def _check(local: LocalSteps, state: dict[str, Any]) -> None:
    """Raise CheckpointError, naming what differs, unless the state has just what this model needs."""
    kinds = ("parameter.", "frozen.", "buffer.")
    wanted = {_plain(n): t.shape for n, t in (_own(local) | _frozen(local)).items() if n.startswith(kinds)}
    saved = {_plain(n): t.shape for n, t in state["shared"].items() if n.startswith(kinds)}
    saved |= {_plain(n): t.shape[1:] for n, t in state["rows"].items() if n.startswith(kinds)}
    for name in [*wanted, *saved]:
        if wanted.get(name) != saved.get(name):
            raise CheckpointError(
                f"{name} has the shape {_shape(saved.get(name))} in the saved state and "
                f"{_shape(wanted.get(name))} here; this checkpoint is of another model"
            )
    if local.has_momentum != any(name.startswith("momentum.") for name in state["shared"]):
        raise CheckpointError(
            "this checkpoint is of another outer step: one has a momentum, the other has none"
        )
    fragment = int(state["fragment"])
    names = {n.removeprefix("mean.") for n in state["shared"] if n.startswith("mean.")}
    here = [{n for bucket in each.buckets for n in bucket.parameters} for each in local.fragments]
    if fragment >= 0 and (fragment >= len(here) or names != here[fragment]):
        why = "the model is cut into fragments otherwise here"
        if differ := sorted(names.difference(*here)):
            why = f"{differ[0]!r} is not trained here"
        raise CheckpointError(
            f"the saved state was averaging fragment {fragment}, and {why}; resume with the same trained "
            "parameters and number of fragments, or save when no average is under way"
        )


def _plain(name: str) -> str:
    """The name of a parameter without its kind, which may have changed since it was saved."""
    return name.removeprefix("parameter.").removeprefix("frozen.")


def _shape(shape: torch.Size | None) -> object:
    return "nothing" if shape is None else tuple(shape)


def _restore(local: LocalSteps, state: dict[str, Any]) -> None:
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
        for name, tensor in (_own(local) | _frozen(local)).items():
            _restore_tensor(local, name, tensor, state["shared"], rows)
        _restore_shared(local, state["shared"], rows)
    if local.inner_optimizer is not None:
        _restore_optimizer(local, state["optimizer"], rows)


def _restore_tensor(
    local: LocalSteps, name: str, tensor: Tensor, shared: dict[str, Tensor], rows: dict[str, Tensor]
) -> None:
    """Fill what this rank has for itself, or what is frozen; collective."""
    plain = _plain(name)
    if name in rows:
        tensor.copy_(rows[name])
    elif f"frozen.{plain}" in shared:
        tensor.copy_(shared[f"frozen.{plain}"])
    else:  # it has been frozen since
        tensor.copy_(rows[f"parameter.{plain}"])
        membership.mean_over_ranks(tensor, local.sync.group)


def _restore_shared(local: LocalSteps, shared: dict[str, Tensor], rows: dict[str, Tensor]) -> None:
    """Fill anchors, momentum and what is under way; collective."""
    for name, tensor in _shared(local).items():
        kind, plain = name.split(".", 1)
        if name in shared:
            tensor.copy_(shared[name])
        elif kind == "momentum":
            tensor.zero_()
        elif f"frozen.{plain}" in shared:  # trained since
            tensor.copy_(shared[f"frozen.{plain}"])
        else:  # it had been unfrozen when it was saved, but not yet averaged
            tensor.copy_(rows[f"parameter.{plain}"])
            membership.mean_over_ranks(tensor, local.sync.group)


def _restore_optimizer(local: LocalSteps, text: str, rows: dict[str, Tensor]) -> None:
    if not text:
        raise CheckpointError(
            "the saved state has no inner optimizer: it was saved by a run that calls step() itself"
        )
    assert local.inner_optimizer is not None
    saved, optimizer = json.loads(text), stateful(local.inner_optimizer)
    groups = optimizer.state_dict()["param_groups"]
    if len(saved["groups"]) != len(groups):
        raise CheckpointError(
            f"the inner optimizer has {len(groups)} parameter groups, the saved one {len(saved['groups'])}"
        )
    for group, theirs in zip(groups, saved["groups"], strict=True):
        for key, value in theirs.items():
            if key not in ("params", "names"):
                group[key] = tuple(value) if isinstance(value, list) else value
    places = _places(local, optimizer, saved["groups"])
    state: dict[int, dict[str, Any]] = {}
    for index, key, value in saved["numbers"]:
        if index in places:
            state.setdefault(places[index], {})[key] = value
    for name, row in rows.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            if int(index) in places:
                state.setdefault(places[int(index)], {})[key] = row.clone()
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _places(local: LocalSteps, optimizer: Optimizer, saved: list[dict[str, Any]]) -> dict[int, int]:
    """The present index of each saved parameter of the optimizer: by name, or by place without names.

    Raises:
        CheckpointError: there are no names, and the groups differ.
    """
    groups = optimizer.state_dict()["param_groups"]
    names = {id(parameter): name for name, parameter in membership.named(local.model).items()}
    ours = {
        names.get(id(parameter)): index
        for real, group in zip(optimizer.param_groups, groups, strict=True)
        for parameter, index in zip(real["params"], group["params"], strict=True)
    }
    theirs = {n: i for group in saved for n, i in zip(group.get("names", []), group["params"], strict=False)}
    if None in ours or None in theirs or not theirs:
        sizes = [[len(group["params"]) for group in side] for side in (saved, groups)]
        if sizes[0] != sizes[1]:
            raise CheckpointError(
                "the inner optimizer has other parameters than the saved one, and not all are the model's"
            )
        return {
            t: o
            for a, b in zip(saved, groups, strict=True)
            for t, o in zip(a["params"], b["params"], strict=True)
        }
    fresh = sorted(str(name) for name in ours.keys() - theirs.keys())
    if fresh:
        _log.warning(
            "resumed: %d parameters (%s, ...) start with a new inner optimizer", len(fresh), fresh[0]
        )
    return {index: ours[name] for name, index in theirs.items() if name in ours}
