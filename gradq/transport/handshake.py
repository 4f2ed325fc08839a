"""Handshake: before all ranks go on together they compare what they were told to do, and whether they can.

Whatever can fail on one rank alone (an import, a compilation, a full disk, a user's predicate) belongs into a
`meeting`, so that the other ranks hear of it at once and do not wait for the process group's timeout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch.distributed as dist

from gradq.errors import GradqError, MismatchError, PeerError

__all__ = ["agree", "by_all_ranks", "gather", "meeting", "reason", "tell", "telling"]

_T = TypeVar("_T")
_REMEDY = "Start all ranks with the same model and the same gradq arguments"


@contextlib.contextmanager
def meeting(
    groups: dist.ProcessGroup | Sequence[dist.ProcessGroup], verb: str = "start", remedy: str = _REMEDY
) -> Iterator[dict[str, object]]:
    """Local work of every rank, and then a comparison: all ranks go on, or all raise.

    All ranks enter it at the same place. Only what fails on all ranks alike may be collective in the block.

    Args:
        groups: the ranks. Of several groups all ranks of the first hear of each other; then those of the
            second, also of what the first has heard; and so on.
        verb: what a rank that fails cannot do, for the others' message.
        remedy: what to do where ranks differ.

    Yields:
        An empty dictionary, for what must be equal on all ranks of the first group; see `agree`.

    Raises:
        MismatchError: another rank failed, or differs. A rank that failed itself raises what it raised.
    """
    notes: dict[str, object] = {}
    untold = [groups] if isinstance(groups, dist.ProcessGroup) else list(groups)
    try:
        yield notes
        while untold:
            agree(notes, untold.pop(0), remedy)
            notes = {}
    except BaseException as error:  # also KeyboardInterrupt: the others must not wait
        for group in untold:
            tell(error, group, verb)
        raise


@contextlib.contextmanager
def telling(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Around local work before a `meeting` whose group is not known yet: what is raised is told to a group.

    Args:
        group: the ranks that are probably waiting; None if there are none to be known.
    """
    try:
        yield
    except BaseException as error:
        if group is not None:
            tell(error, group)
        raise


def tell(error: BaseException, group: dist.ProcessGroup, verb: str = "start") -> None:
    """Take part in the others' next `agree` with the news that this rank cannot go on.

    Does nothing if this error came from there or was told before.
    """
    told: set[int] = error.__dict__.setdefault("_gradq_told", set())
    if id(group) not in told:
        told.add(id(group))
        with contextlib.suppress(Exception):
            agree({"error": reason(error), "verb": verb}, group)


def agree(fields: Mapping[str, object], group: dist.ProcessGroup, remedy: str = _REMEDY) -> None:
    """Compare fields over all ranks of a group; a collective call.

    Args:
        fields: what must be equal, by name; values are compared with ==. A mapping as a value is compared key
            by key, so that the message names the entry. "error" says that this rank cannot go on, and why;
            "verb" what it cannot do.
        group: the ranks.
        remedy: what to do where ranks differ.

    Raises:
        MismatchError: on every rank, naming the first rank that cannot go on, or that differs from rank 0,
            and the field.
    """
    difference = _verdict(gather(dict(fields), group), remedy)
    if difference is not None:
        error = MismatchError(difference)
        error.__dict__["_gradq_told"] = {id(group)}
        raise error


def _verdict(everyone: Sequence[Mapping[str, object]], remedy: str) -> str | None:
    for rank, theirs in enumerate(everyone):
        if "error" in theirs:
            return f"rank {rank} cannot {theirs.get('verb', 'start')}: {theirs['error']}"
    for rank, theirs in enumerate(everyone):
        for field in dict.fromkeys([*everyone[0], *theirs]):
            difference = _difference(field, everyone[0].get(field), theirs.get(field))
            if difference is not None:
                name, ours, other = difference
                return f"ranks disagree: {name} is {ours!r} on rank 0 and {other!r} on rank {rank}. {remedy}"
    return None


def gather(value: _T, group: dist.ProcessGroup) -> list[_T]:
    """Every rank's value, by rank; a collective call.

    Raises:
        PeerError: a rank is gone, or did not come within the group's timeout.
    """
    everyone = [value] * group.size()
    with by_all_ranks(group):
        dist.all_gather_object(everyone, value, group=group)
    return everyone


@contextlib.contextmanager
def by_all_ranks(group: dist.ProcessGroup) -> Iterator[None]:
    """Around a collective of a call that the user may have made on some ranks only: says so if it fails.

    Raises:
        PeerError: instead of the backend's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        raise PeerError(
            f"rank {group.rank()}: another rank is gone, or did not make this call within the timeout of the "
            "process group. All ranks must make it, between the same two steps, without an `if rank == 0:` "
            f"around it: {error}"
        ) from error


def reason(error: BaseException) -> str:
    """An exception in one line, for the other ranks."""
    text = str(error)
    if isinstance(error, GradqError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _difference(field: str, first: object, other: object) -> tuple[str, object, object] | None:
    if isinstance(first, Mapping) and isinstance(other, Mapping):
        if list(first) != list(other):
            for a, b in zip([*first, "(nothing)"], [*other, "(nothing)"], strict=False):
                if a != b:
                    return f"{field} (the names)", a, b
        for key in first:
            if first[key] != other[key]:
                return f"{field}[{key!r}]", first[key], other[key]
        return None
    return None if first == other else (field, first, other)
