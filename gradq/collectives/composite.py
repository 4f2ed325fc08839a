"""Composite: several collectives over the segments of one chunk, advanced in lockstep.

A chunk may hold parameters that travel in different ways: matrices by `low_rank`, biases by `direct`. Stage
k of all of them runs together and waits for all, so the rule that stage k posts on channel k only still
holds, and every channel sees the same order on all ranks.

Every chunk of a plan takes the same number of stages, if need be by waiting for nothing. Otherwise the last
chunk of a step, if it had fewer, would end the step while an earlier one is still under way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from gradq.collectives.base import Collective, Segment, Setting, Step, Transfer
from gradq.transport.contract import Pending

__all__ = ["Composite", "compose"]


class _All:
    """Exchanges under way, as one; maybe none."""

    def __init__(self, pendings: Sequence[Pending]) -> None:
        self._pendings = pendings

    def wait(self) -> None:
        for pending in self._pendings:
            pending.wait()


class Composite(Collective):
    """Runs its members as one collective.

    Args:
        members: collectives of one chunk, over segments of their own, made with the same dtype and setting;
            at least one.
        num_stages: exchanges to wait for, at least as many as any member has channels.
    """

    num_channels = 2

    def __init__(self, members: Sequence[Collective], num_stages: int) -> None:
        segments = [segment for member in members for segment in member.segments]
        super().__init__(segments, members[0].dtype, members[0].setting)
        assert num_stages >= max(member.num_channels for member in members)
        # the member with the most exchanges posts first, and does not wait for the others to decode
        self.members = sorted(members, key=lambda member: -member.num_channels)
        self._num_stages = num_stages

    def average(self, flat: Tensor, step: Step) -> Iterator[Pending]:
        """See `Collective.average`.

        1. Run the next stage of every member that has one.
        2. Wait for what they have posted; once more, until `num_stages` have been waited for.
        3. Run what is left of every member.
        """
        running = [member.average(flat, step) for member in self.members]
        for _ in range(self._num_stages):
            posted = [(member, pending) for member in running if (pending := next(member, None)) is not None]
            running = [member for member, _ in posted]
            yield _All([pending for _, pending in posted])
        for member in running:
            assert next(member, None) is None, "a member has more stages than it has channels"


def compose(
    transfers: Sequence[Transfer], used: Collection[type[Collective]], dtype: torch.dtype, setting: Setting
) -> Collective:
    """One collective for a chunk.

    Args:
        transfers: what it holds and how that travels.
        used: the collectives of the whole plan; if there is one, it is taken as it is.
        dtype: dtype of the chunk; see `Collective`.
        setting: what outlives a chunk; see `Setting`.
    """
    segments: dict[type[Collective], list[Segment]] = {}
    for collective, segment in transfers:
        segments.setdefault(collective, []).append(segment)
    members = [collective(own, dtype, setting) for collective, own in segments.items()]
    return members[0] if len(used) == 1 else Composite(members, max(c.num_channels for c in used))
