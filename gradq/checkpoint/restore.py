"""Restoring: all ranks have a state that fits, or none is changed; it becomes current, and a log says how."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from gradq.checkpoint.parse import Saved
from gradq.checkpoint.state import bases_shapes, residual_shapes
from gradq.errors import CheckpointError, GradqError, MismatchError
from gradq.sync.base import Sync
from gradq.transport.handshake import meeting, reason

__all__ = ["restore", "together"]

_log = logging.getLogger("gradq")


@contextmanager
def together(
    groups: Sequence[dist.ProcessGroup], verb: str = "load the state, and no rank has changed anything"
) -> Iterator[dict[str, object]]:
    """As `handshake.meeting`, for checkpoints: what is done inside succeeds on all ranks, or raises on all.

    Args:
        groups: the ranks.
        verb: what a rank that fails cannot do, for the others' message.

    Yields:
        A dictionary for what must be equal on all ranks of the first group.

    Raises:
        CheckpointError: it failed on this rank (its own error if that is one of gradq's), on another, or the
            ranks have different notes.
    """
    try:
        with meeting(groups, verb, "Load the same checkpoint on all ranks") as notes:
            try:
                yield notes
            except GradqError:
                raise
            except Exception as error:
                raise CheckpointError(reason(error)) from error
    except MismatchError as error:
        raise CheckpointError(str(error)) from error


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
