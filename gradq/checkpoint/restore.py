"""Restoring: all ranks have a state that fits, or none is changed; it becomes current, and a log says how."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from gradq.checkpoint.parse import Saved
from gradq.checkpoint.state import bases_shapes, residual_shapes
from gradq.errors import CheckpointError, GradqError
from gradq.sync.base import Sync
from gradq.transport.handshake import gather

__all__ = ["restore", "together"]

_log = logging.getLogger("gradq")


@contextmanager
def together(
    groups: Sequence[dist.ProcessGroup], failed: str = "the state cannot be loaded, and nothing was changed"
) -> Iterator[dict[str, object]]:
    """What is done inside succeeds on all ranks, or raises on all. Collective at its end only.

    Args:
        groups: all ranks of the first hear of each other; then those of the second, and so on.
        failed: the message for ranks that could do it when another could not.

    Yields:
        A dictionary for what must be equal on all ranks of the first group.

    Raises:
        CheckpointError: it failed on this rank (its own error if that is one of gradq's), on another, or the
            ranks have different notes.
    """
    notes: dict[str, object] = {}
    own: Exception | None = None
    try:
        yield notes
    except Exception as error:
        own = error
    failures = [] if own is None else [f"rank {dist.get_rank()}: {_words(own)}"]
    for number, group in enumerate(groups):
        everyone = gather((failures, notes), group)
        failures = list(dict.fromkeys(text for theirs, _ in everyone for text in theirs))
        if number == 0 and not failures:
            failures = _differences([theirs for _, theirs in everyone])
    if own is not None:
        raise own if isinstance(own, GradqError) else CheckpointError(_words(own)) from own
    if failures:
        raise CheckpointError(f"{failed}: {failures[0]}")


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, GradqError) else f"{type(error).__name__}: {error}"


def _differences(everyone: Sequence[Mapping[str, object]]) -> list[str]:
    """The first rank that loads something else than rank 0, if there is one."""
    for rank, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs.get(name) != value:
                return [
                    f"ranks load different states: {name} is {str(value)[:200]} on rank 0 and "
                    f"{str(theirs.get(name))[:200]} on rank {rank}; load the same checkpoint on all ranks"
                ]
    return []


def restore(sync: Sync, saved: Saved) -> None:
    """Make a saved state current. All ranks call it together, after they have agreed that it fits."""
    same = saved.world_size == sync.world_size
    _restore_policy(sync, saved)
    wanted_local, wanted_shard = residual_shapes(sync)
    wanted_bases = bases_shapes(sync)
    local = {name: row for name, row in saved.local.items() if name in wanted_local}
    shard = {name: row for name, row in saved.shard.items() if wanted_shard.get(name) == row.numel()}
    bases = {name: basis for name, basis in saved.bases.items() if wanted_bases.get(name) == basis.numel()}
    feedback = sync.feedback
    for residuals in (feedback.local, feedback.shard, feedback.bases):
        residuals.clear()
    for name, basis in bases.items():
        feedback.bases.replace(name, basis)
    for name, row in local.items():
        feedback.local.replace(name, row)
    for name, row in shard.items():
        start, stop = sync.shard(name, sync.rank)
        feedback.shard.replace(name, row[: stop - start])
    sync.step = saved.step
    sync.check.start(saved.norms)
    if not same:
        _log.warning(
            "resumed on %d ranks from %d at step %d: every rank took the mean of the old local residuals; "
            "shard residuals start at zero",
            sync.world_size,
            saved.world_size,
            saved.step,
        )
    if saved.spec is not None and saved.spec != sync.learner.label:
        _log.warning(
            "resumed with the spec %r from a state of %r: of %d parameters with a saved local residual, %d "
            "keep it",
            sync.learner.label,
            saved.spec,
            len(saved.kept) + len(saved.gone),
            len(local),
        )
    _say("are not in this model (frozen, renamed or removed since); their residuals were dropped", saved.gone)
    _say("no longer use feedback; their residuals were dropped", saved.kept, wanted_local)
    _say("have no saved local residual and start at zero", wanted_local, local)
    _say("have no saved basis that fits and start at random", wanted_bases, bases)
    if same:
        _say("have no saved shard residual that fits and start at zero", wanted_shard, shard)


def _restore_policy(sync: Sync, saved: Saved) -> None:
    """Make the saved plan current, or log that there is none."""
    policy = sync.learner.adaptive
    if policy is None:
        if saved.has_plan:
            _log.warning("resumed: the saved plan of an adaptive policy is not used; this run has none")
    elif saved.policy is None:
        _log.warning("resumed: no plan was saved; %s starts from its first", sync.learner.label)
    else:
        policy.load_state_dict(*saved.policy)
        sync.set_policy(policy, sync.learner.label)


def _say(what: str, these: Iterable[str], but: Iterable[str] = ()) -> None:
    names = sorted(set(these) - set(but))
    if names:
        _log.warning("resumed: %d parameters (%s, ...) %s", len(names), names[0], what)
