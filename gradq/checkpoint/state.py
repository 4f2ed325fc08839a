"""The state: what a run needs to continue, as a mapping of tensors that DCP saves whole."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any, NoReturn, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor

from gradq.checkpoint.packing import FLAT_NUMEL, digest, flats, pack
from gradq.collectives import LowRankSegment
from gradq.errors import CheckpointError
from gradq.sync.base import Sync
from gradq.sync.feedback import Residuals
from gradq.transport.handshake import by_all_ranks

__all__ = [
    "FORMAT",
    "RowsState",
    "bases_shapes",
    "gather_rows",
    "head_digest",
    "residual_shapes",
    "state_dict",
    "to_row",
]

FORMAT = 2


class RowsState(dict[str, Any]):
    """A state of which this rank holds its own rows only; it cannot be pickled, so `torch.save` refuses it.

    torch.distributed.checkpoint takes it like any mapping. `dict(state)` is a plain copy for a file of each
    rank's own, which that rank alone can load.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise CheckpointError(
            "this state has the residuals of one rank only, so torch.save or pickle would lose those of all "
            "other ranks. Either save with torch.distributed.checkpoint: all ranks call "
            'dcp.save({"gradq": handle.state_dict(), ...}, checkpoint_id=folder). Or let all ranks call '
            "state = handle.gathered_state_dict() before rank 0 calls torch.save with it"
        )

    def __copy__(self) -> RowsState:
        return RowsState(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> RowsState:
        return RowsState({key: copy.deepcopy(value, memo) for key, value in self.items()})


def state_dict(sync: Sync) -> dict[str, Any]:
    """What a run needs to continue. All ranks call it between the same two steps; nothing is exchanged.

    Returns:
        "format", "step" and "world_size": integer tensors. "index": the spec, and the names and sizes of what
        is packed, JSON as a uint8 tensor. "local" and "shard": residuals, packed into flats (see
        `gradq.checkpoint.packing`), each a row-sharded DTensor [W, n], fp32; shard residuals are padded to
        the longest piece of any rank. "bases": flats [n], equal on all ranks. With an adaptive policy
        "policy": its plan, and what each rank measured since, row-sharded fp64 [W, n]. "norms": by which
        outliers are told, row-sharded fp64 [W, n] (see
        `gradq.sync.finite`). "rank" [W, 1] and "digests" [W, n],
        int64: whose rows, and CRC-32 of everything.

        At world size 1 the rows are plain tensors [1, n], in a plain dictionary. Otherwise the state refuses
        to be pickled: see `RowsState`.
    """
    local, shard = residual_shapes(sync)
    bases = bases_shapes(sync)
    label = sync.learner.label
    contents = {"spec": label, "most": FLAT_NUMEL, "local": local, "shard": shard, "bases": bases}
    index = torch.frombuffer(bytearray(json.dumps(contents).encode()), dtype=torch.uint8)
    scalars = {"format": FORMAT, "step": sync.step, "world_size": sync.world_size}
    state: dict[str, Any] = {name: torch.tensor(value) for name, value in scalars.items()}
    state |= {"index": index, "rank": to_row(torch.tensor([sync.rank]), sync.group)}
    digests = [0, 0]
    for kind, numels, residuals in (
        ("local", local, sync.feedback.local),
        ("shard", shard, sync.feedback.shard),
    ):
        packed, state[kind] = pack(numels, FLAT_NUMEL), {}
        for number, flat in enumerate(flats(packed, _current(residuals))):
            parts = (flat[piece.start : piece.start + piece.length] for piece in packed[number])
            digests += [digest(part) for part in parts]
            state[kind][str(number)] = to_row(flat, sync.group)
    packed_bases = flats(pack(bases, FLAT_NUMEL), _current(sync.feedback.bases))
    state["bases"] = {str(number): flat for number, flat in enumerate(packed_bases)}
    norms = sync.check.state.cpu()
    state["norms"] = to_row(norms, sync.group)
    policy = sync.learner.adaptive
    if policy is None:
        digests[1] = digest(norms)
    else:
        measured = torch.tensor(policy.measured(), dtype=torch.float64)
        state["policy"] = {**policy.state_dict(), "measured": to_row(measured, sync.group)}
        digests[1] = digest(norms, measured)
    digests[0] = head_digest(sync.rank, state)
    state["digests"] = to_row(torch.tensor(digests), sync.group)
    return state if sync.world_size == 1 else RowsState(state)


def head_digest(rank: int, state: Mapping[str, Any]) -> int:
    """The digest of all that is not in rows, and of the rank's number."""
    policy = {name: value for name, value in state.get("policy", {}).items() if name != "measured"}
    scalars = torch.tensor([rank, *(int(state[name]) for name in ("format", "step", "world_size"))])
    bases = state.get("bases", {})
    return digest(
        scalars,
        state["index"],
        *(bases[name] for name in sorted(bases, key=int)),
        *(policy[name] for name in sorted(policy)),
    )


def gather_rows(state: Mapping[str, Any], sync: Sync) -> dict[str, Any]:
    """The whole state on rank 0 of the sync's group: every row-sharded DTensor as a plain tensor [W, ...].

    Collective: all ranks of the group call it.

    Args:
        state: the state from `state_dict`, or a mapping that has such states in it.
        sync: the sync whose ranks the rows are of.

    Returns:
        On rank 0 a plain dictionary of CPU tensors, which torch.save and torch.load(weights_only=True) take;
        on all other ranks an empty one.
    """
    gathered = {key: _gathered(value, sync) for key, value in state.items()}
    return gathered if sync.rank == 0 else {}


def _gathered(value: Any, sync: Sync) -> Any:
    from torch.distributed.tensor import DTensor  # DTensor takes 0.6 s to import

    if isinstance(value, Mapping):
        return {key: _gathered(entry, sync) for key, entry in value.items()}
    if not isinstance(value, DTensor):
        return value.detach().cpu().clone() if isinstance(value, Tensor) else value
    own = value.to_local().contiguous()
    row = own.view(-1).view(torch.uint8).to(sync.device)  # as bytes: Gloo does not move every dtype
    rows = [torch.empty_like(row) for _ in range(sync.world_size)] if sync.rank == 0 else None
    with by_all_ranks(sync.group):
        dist.gather(row, rows, dst=dist.get_global_rank(sync.group, 0), group=sync.group)
    return torch.cat(rows).cpu().view(own.dtype).view(-1, *own.shape[1:]) if rows else None


def to_row(row: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's row of a row-sharded [W, ...]; nothing is exchanged."""
    if group.size() == 1:
        return row[None]
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(row[None], DeviceMesh.from_group(group, "cpu"), [Shard(0)])


def residual_shapes(sync: Sync) -> tuple[dict[str, int], dict[str, int]]:
    """Elements of the local residuals, and of the padded shard residuals, by name."""
    segments = [sync.segment(name) for name in sync.plan]
    local = {segment.name: segment.numel for segment in segments if segment.feedback1}
    shard = {
        segment.name: max(stop - start for start, stop in _shards_of(sync, segment.name))
        for segment in segments
        if segment.feedback2
    }
    return local, shard


def _shards_of(sync: Sync, name: str) -> list[tuple[int, int]]:
    """The elements [start, stop) of a parameter that each rank owns."""
    return [sync.shard(name, owner) for owner in range(sync.world_size)]


def bases_shapes(sync: Sync) -> dict[str, int]:
    """Elements of what low rank remembers, by name."""
    segments = [sync.segment(name) for name in sync.plan]
    return {s.name: s.basis_numel for s in segments if isinstance(s, LowRankSegment)}


def _current(residuals: Residuals) -> dict[str, Tensor]:
    return {name: residuals.current(name) for name in residuals.names()}
