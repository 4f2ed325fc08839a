"""Handshake: before the first step all ranks compare what they were told to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch.distributed as dist

from gradq.errors import MismatchError

__all__ = ["agree", "gather"]

_T = TypeVar("_T")


def agree(fields: Mapping[str, object], group: dist.ProcessGroup) -> None:
    """Compare fields over all ranks of a group; a collective call.

    Args:
        fields: what must be equal, by name; values are compared with ==. A mapping as a value is compared key
            by key, so that the message names the entry. "error" says that this rank cannot start, and why.
        group: the ranks.

    Raises:
        MismatchError: on every rank, naming the first rank that cannot start, or that differs from rank 0,
            and the field.
    """
    everyone = gather(dict(fields), group)
    for rank, theirs in enumerate(everyone):
        if "error" in theirs:
            raise MismatchError(f"rank {rank} cannot start: {theirs['error']}")
    for rank, theirs in enumerate(everyone):
        for field in dict.fromkeys([*everyone[0], *theirs]):
            difference = _difference(field, everyone[0].get(field), theirs.get(field))
            if difference is not None:
                name, ours, other = difference
                raise MismatchError(
                    f"ranks disagree: {name} is {ours!r} on rank 0 and {other!r} on rank {rank}. "
                    "Start all ranks with the same model and the same gradq arguments"
                )


def gather(value: _T, group: dist.ProcessGroup) -> list[_T]:
    """Every rank's value, by rank; a collective call."""
    everyone = [value] * group.size()
    dist.all_gather_object(everyone, value, group=group)
    return everyone


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
