"""Parsing: from a state of any origin to checked values that fit this run. Nothing is changed here.

Whatever is wrong ends in a `CheckpointError` that names the entry, and the parameter and rank if it has any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradq.checkpoint.packing import Piece, digest, pack
from gradq.checkpoint.rows import Rows, check_tensor, integer, mapping
from gradq.checkpoint.state import FORMAT, bases_shapes, head_digest, residual_shapes
from gradq.errors import CheckpointError
from gradq.policy import canonical_name
from gradq.sync.base import Sync
from gradq.sync.finite import WINDOW

__all__ = ["Saved", "parse"]

_ENTRIES = ("format", "step", "world_size", "rank", "local", "shard")
_OPTIONAL = ("bases", "policy", "index", "digests", "norms")
_MAX_STEP, _MAX_RANKS, _MAX_NUMEL = 1 << 48, 1 << 20, 1 << 26


@dataclass
class Saved:
    """A state that fits this run.

    Attributes:
        step: the number of optimizer steps done.
        world_size: the number of ranks that saved.
        spec: the spec that they ran; None if the state does not say.
        local: flat local residuals by this run's names: this rank's, or the mean over the old ranks.
        shard: padded flat shard residuals of this rank; empty if there were other ranks.
        bases: flat bases of low rank.
        policy: state of an adaptive policy and what this rank had measured; None if this run has none.
        has_plan: whether an adaptive policy saved the state.
        norms: the norms by which outliers are told, fp64; None if there were other ranks, or none were saved.
        gone: saved names that this run has no parameter for.
        kept: names that have a saved local residual, whether this run uses it or not.
    """

    step: int
    world_size: int
    spec: str | None = None
    local: dict[str, Tensor] = field(default_factory=dict)
    shard: dict[str, Tensor] = field(default_factory=dict)
    bases: dict[str, Tensor] = field(default_factory=dict)
    policy: tuple[dict[str, Tensor], list[float]] | None = None
    has_plan: bool = False
    norms: Tensor | None = None
    gone: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def notes(self) -> dict[str, object]:
        """What must be the same on all ranks."""
        common = {"step": self.step, "world_size": self.world_size, "spec": self.spec}
        plan = {} if self.policy is None else {n: value.tolist() for n, value in self.policy[0].items()}
        return common | {
            "parameters": sorted(self.kept),
            "bases": {name: digest(basis) for name, basis in sorted(self.bases.items())},
            "plan": plan,
        }


def parse(sync: Sync, saved_state: object) -> Saved:
    """Check a state and take out what this rank needs; nothing is exchanged.

    Args:
        sync: the sync that it is to be loaded into.
        saved_state: the state from `state_dict` or `gather_rows`, of this format or of format 1.

    Raises:
        CheckpointError: the state cannot be loaded.
    """
    state = mapping(saved_state, "the gradq state")
    if not state:
        raise CheckpointError(
            "the saved state is empty: handle.gathered_state_dict() gives all ranks' state to rank 0; every "
            "rank loads what rank 0 was given"
        )
    version = integer(state, "format", 0, 1 << 31)
    if version not in (1, FORMAT):
        raise CheckpointError(
            f"the saved state has format {version}, this gradq reads 1 to {FORMAT}; use "
            "the gradq that saved it"
        )
    needed = (*_ENTRIES, *(("index", "digests") if version > 1 else ()))
    if missing := [name for name in needed if name not in state]:
        raise CheckpointError(f"the saved state has no {missing[0]!r}; it is incomplete")
    if unknown := [name for name in state if name not in _ENTRIES + _OPTIONAL]:
        raise CheckpointError(
            f"the saved state has an entry {unknown[0]!r} that gradq did not save; it is of something else"
        )
    world_size = integer(state, "world_size", 1, _MAX_RANKS)
    saved = Saved(integer(state, "step", 0, _MAX_STEP), world_size)
    rows = Rows(sync, world_size, state["rank"])
    contents = _Contents.of(state, rows, version)
    saved.spec = contents.spec
    names = _Names(sync)
    for kind in ("local", "shard", "bases"):
        names.check(contents.numels[kind], kind)
    _check_fit({names.ours(n): size for n, size in contents.numels["local"].items()}, sync)
    saved.has_plan = "policy" in state
    saved.policy = _policy(sync, state, rows)
    saved.gone = [name for name in contents.numels["local"] if names.ours(name) is None]
    if saved.gone and len(saved.gone) == len(contents.numels["local"]):
        raise CheckpointError(
            f"none of the {len(saved.gone)} parameters with a saved residual ({saved.gone[0]!r}, ...) is in "
            "this model; this checkpoint is of another model"
        )
    saved.kept = [name for saved_name in contents.numels["local"] if (name := names.ours(saved_name))]
    if contents.digests is not None:
        _check_head(state, rows, contents.digests)
        saved.norms = _norms(state, rows, contents.digests)
    wanted_local, wanted_shard = residual_shapes(sync)
    if saved.policy is not None:  # its plan may want other residuals than the current one
        wanted_local = wanted_shard = dict.fromkeys(sync.parameters, 0)
    saved.local = contents.unpack("local", names.wanted(contents.numels["local"], wanted_local), rows)
    if rows.same:
        saved.shard = contents.unpack("shard", names.wanted(contents.numels["shard"], wanted_shard), rows)
    wanted_bases = sync.parameters if saved.policy is not None else bases_shapes(sync)
    saved.bases = contents.unpack("bases", names.wanted(contents.numels["bases"], wanted_bases), rows)
    return saved


class _Names:
    """This run's name of a saved parameter; wrappers' names do not count."""

    def __init__(self, sync: Sync) -> None:
        self._own = {canonical_name(name): name for name in sync.parameters}

    def ours(self, saved: str) -> str | None:
        return self._own.get(canonical_name(saved))

    def wanted(self, saved: Mapping[str, int], wanted: Mapping[str, object]) -> dict[str, str]:
        """This run's names by saved names, of those that this run uses."""
        found = {name: self.ours(name) for name in saved}
        return {name: ours for name, ours in found.items() if ours is not None and ours in wanted}

    def check(self, saved: Mapping[str, int], kind: str) -> None:
        seen: dict[str, str] = {}
        for name in saved:
            if (before := seen.setdefault(canonical_name(name), name)) != name:
                raise CheckpointError(f"{kind!r} has two entries of one parameter: {before!r} and {name!r}")


@dataclass
class _Contents:
    """The contents of a state by its index, and the way to them."""

    state: Mapping[str, Any]
    spec: str | None
    numels: dict[str, dict[str, int]]
    most: int
    digests: Tensor | None  # [rows that are used, n]; format 1 has none

    @classmethod
    def of(cls, state: Mapping[str, Any], rows: Rows, version: int) -> _Contents:
        """Read the index; format 1 has entries by parameter in its place."""
        kinds = {kind: mapping(state.get(kind, {}), repr(kind)) for kind in ("local", "shard", "bases")}
        if version == 1:
            numels = {
                kind: {name: _row_numel(entries, name, f"{kind}.{name}") for name in entries}
                for kind, entries in kinds.items()
            }
            return cls(state, None, numels, 0, None)
        index = check_tensor(state["index"], "index", (None,), torch.uint8)
        try:
            contents = json.loads(index.numpy().tobytes())
            spec, most = contents["spec"], contents["most"]
            numels = {kind: dict(contents[kind]) for kind in kinds}
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"the saved index is damaged: {type(error).__name__}: {error}") from error
        sizes = [most, *(size for kind in numels.values() for size in kind.values())]
        if not isinstance(spec, str) or any(type(size) is not int or size < 0 for size in sizes):
            raise CheckpointError("the saved index is damaged: it has something else than sizes")
        if not 0 < most <= _MAX_NUMEL:
            raise CheckpointError(
                f"the saved index has flats of {most} elements; at most {_MAX_NUMEL} are read"
            )
        found = cls(state, spec, numels, most, None)
        for kind, entries in kinds.items():
            count = len(pack(numels[kind], most))
            if sorted(map(str, entries)) != sorted(map(str, range(count))):
                raise CheckpointError(
                    f"the saved state has the flats {sorted(map(str, entries))} of {kind!r}, its index "
                    f"speaks of {count}; it is incomplete or mixed from several"
                )
        found.digests = rows.take(
            state["digests"], "digests", 2 + found._count("local", "shard"), torch.int64
        )
        return found

    def _count(self, *kinds: str) -> int:
        return sum(len(pieces) for kind in kinds for pieces in pack(self.numels[kind], self.most))

    def unpack(self, kind: str, names: Mapping[str, str], rows: Rows) -> dict[str, Tensor]:
        """Residuals or bases, by this run's names: of one row, or the mean over all."""
        numels = self.numels[kind]
        if self.digests is None:
            return {
                ours: _one(self._rows(kind, name, numels[name], None, rows), kind, name, rows)
                for name, ours in names.items()
            }
        first = 2 + (self._count("local") if kind == "shard" else 0)
        found = {ours: torch.empty(numels[name]) for name, ours in names.items()}
        for number, pieces in enumerate(pack(numels, self.most)):
            used = [piece for piece in pieces if piece.name in names]
            if not used:
                continue
            length = pieces[-1].start + pieces[-1].length
            flat = self._rows(kind, str(number), length, torch.float32, rows)
            for piece in used:
                part = flat[:, piece.start : piece.start + piece.length]
                if kind != "bases":  # `_check_head` has compared their digests
                    self._check_digests(part, piece, first, kind, f"{kind}.{number}", rows)
                target = found[names[piece.name]]
                target[piece.begin : piece.begin + piece.length] = _one(part, kind, piece.name, rows)
        return found

    def _rows(self, kind: str, entry: str, numel: int, dtype: torch.dtype | None, rows: Rows) -> Tensor:
        """The rows of an entry that this rank uses; of bases, which are equal on all ranks, there is one."""
        value, what = self.state[kind][entry], f"{kind}.{entry}"
        if kind == "bases":
            return check_tensor(value, what, (numel,), dtype)[None]
        return rows.take(value, what, numel, dtype)

    def _check_digests(
        self, part: Tensor, piece: Piece, first: int, kind: str, entry: str, rows: Rows
    ) -> None:
        assert self.digests is not None
        for place, rank in enumerate(rows.ranks):
            if digest(part[place]) != int(self.digests[place, first + piece.number]):
                raise CheckpointError(
                    f"the saved {kind} residual of {piece.name!r} of rank {rank} is damaged: it has another "
                    f"digest than when it was saved ({_place(self.state[kind], entry, rank)}). "
                    "Use an earlier checkpoint"
                )


def _one(part: Tensor, kind: str, name: str, rows: Rows) -> Tensor:
    """The row if there is one, else the mean over all; [n], fp32.

    Raises:
        CheckpointError: a value is not finite: feedback would add it to every later gradient.
    """
    for row, rank in zip(part, rows.ranks, strict=False):
        if not torch.isfinite(row).all():
            what = "basis" if kind == "bases" else f"{kind} residual"
            raise CheckpointError(
                f"the saved {what} of {name!r} of rank {rank} has NaN or Inf in it, which would never leave "
                "the gradients; load an earlier checkpoint, or drop the residuals by not loading the gradq "
                "state"
            )
    return part[0].float() if len(part) == 1 else part.float().mean(0)


def _check_head(state: Mapping[str, Any], rows: Rows, digests: Tensor) -> None:
    """Raise CheckpointError unless step, index, bases and plan are as they were saved."""
    for name, value in [*state.get("bases", {}).items(), *state.get("policy", {}).items()]:
        if name != "measured":
            check_tensor(value, str(name))
    for place, rank in enumerate(rows.ranks):
        if head_digest(rank, state) != int(digests[place, 0]):
            raise CheckpointError(
                f"step, index, bases or plan of the saved state have another digest than rank {rank} saved; "
                "the state is damaged, or mixed from several. Use an earlier checkpoint"
            )


def _norms(state: Mapping[str, Any], rows: Rows, digests: Tensor) -> Tensor | None:
    """The norms by which this rank tells outliers; None if other ranks saved them, or nobody did."""
    if "norms" not in state:
        return None
    rows_of = [rows.take(state["norms"], "norms", WINDOW + 1, torch.float64)]
    if "policy" in state:
        rows_of.append(rows.take(state["policy"]["measured"], "policy.measured", None, torch.float64))
    for place, rank in enumerate(rows.ranks):
        if digest(*(values[place] for values in rows_of)) != int(digests[place, 1]):
            raise CheckpointError(
                f"the saved norms or measurements of rank {rank} have another digest than when they were "
                "saved; the state is damaged. Use an earlier checkpoint"
            )
    return rows_of[0][0] if rows.same else None


def _policy(sync: Sync, state: Mapping[str, Any], rows: Rows) -> tuple[dict[str, Tensor], list[float]] | None:
    """The saved state of an adaptive policy, if this run has one; tried on it, and taken back."""
    if "policy" not in state:
        return None
    saved = mapping(state["policy"], "'policy'")
    policy = sync.learner.adaptive
    if policy is None:
        return None
    wanted, before = policy.state_dict(), policy.measured()
    if sorted(map(str, saved)) != sorted([*wanted, "measured"]):
        raise CheckpointError(
            f"the saved plan is not one of {sync.learner.label}: it has {sorted(map(str, saved))}"
        )
    found = {
        name: check_tensor(saved[name], f"policy.{name}", tuple(value.shape), value.dtype)
        for name, value in wanted.items()
    }
    measured = rows.take(saved["measured"], "policy.measured", len(before), torch.float64)
    if not torch.isfinite(measured).all():
        raise CheckpointError("what was measured for the saved plan has NaN or Inf in it")
    own = (measured[0] if len(rows.ranks) == 1 else measured.mean(0)).tolist()
    try:
        policy.load_state_dict(found, own)
    except CheckpointError:
        raise
    except Exception as error:  # a policy may be anyone's
        raise CheckpointError(
            f"{sync.learner.label} cannot take the saved plan: {type(error).__name__}: {error}"
        ) from error
    finally:
        policy.load_state_dict(wanted, before)
    return found, own


def _check_fit(saved_numel: Mapping[str | None, int], sync: Sync) -> None:
    """Raise CheckpointError for the first saved residual that has another size than its parameter here."""
    for name, numel in saved_numel.items():
        info = None if name is None else sync.parameters.get(name)
        if info is not None and info.numel != numel:
            raise CheckpointError(
                f"the saved residual of {name!r} has {numel} elements, the parameter of this model has "
                f"{info.numel}; this checkpoint is of another model"
            )


def _row_numel(entries: Mapping[str, Any], name: str, what: str) -> int:
    """Elements of one row, or of a basis, without reading files."""
    shape_of = getattr(entries, "shape_of", None)
    shape = shape_of(name) if callable(shape_of) else getattr(entries[name], "shape", None)
    if not isinstance(shape, torch.Size) or len(shape) not in (1, 2):
        raise CheckpointError(f"{what} must be a tensor [W, n], got {shape or type(entries[name]).__name__}")
    return shape[-1]


def _place(entries: object, entry: str, rank: int) -> str:
    """The file of an entry, if it was read from files."""
    file = getattr(entries, "file", None)
    return f"in the file {file(entry, rank)}" if callable(file) else f"entry {entry}"
