"""Joined: several collectives over the segments of one bucket, advanced in lockstep.

A bucket may hold parameters that travel in different ways: matrices by `low_rank`, biases by `direct`. Stage
k of all of them runs together and waits for all, so the rule that stage k posts on channel k only still
holds, and every channel sees the same order on all ranks.

Every bucket of a plan takes the same number of stages, if need be by waiting for nothing. Otherwise the last
bucket of a step, if it had fewer, would end the step while an earlier one is still under way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from gradq.collectives.base import Collective, Segment, Setting, Step, Way
from gradq.transport.contract import Pending

__all__ = ["Joined", "join"]


class _All:
    """Exchanges under way, as one; maybe none."""

    def __init__(self, pendings: Sequence[Pending]) -> None:
        self._pendings = pendings

    def wait(self) -> None:
        for pending in self._pendings:
            pending.wait()


class Joined(Collective):
    """Runs its parts as one collective.

    Args:
        parts: collectives of one bucket, over segments of their own, made with the same dtype and setting; at
            least one.
        num_stages: exchanges to take, at least as many as any part has channels.
    """

    num_channels = 2

    def __init__(self, parts: Sequence[Collective], num_stages: int) -> None:
        segments = [segment for part in parts for segment in part.segments]
        super().__init__(segments, parts[0].dtype, parts[0].setting)
        assert num_stages >= max(part.num_channels for part in parts)
        # who has most to send posts first, and does not wait for the others to decode
        self.parts = sorted(parts, key=lambda part: -part.num_channels)
        self._num_stages = num_stages

    def average(self, flat: Tensor, step: Step) -> Iterator[Pending]:
        """See `Collective.average`.

        1. Run the next stage of every part that has one.
        2. Wait for what they have posted; once more, until `num_stages` have been waited for.
        3. Run what is left of every part.
        """
        running = [part.average(flat, step) for part in self.parts]
        for _ in range(self._num_stages):
            posted = [(part, pending) for part in running if (pending := next(part, None)) is not None]
            running = [part for part, _ in posted]
            yield _All([pending for _, pending in posted])
        for part in running:
            assert next(part, None) is None, "a part has more stages than it has channels"


def join(
    ways: Sequence[Way], used: Collection[type[Collective]], dtype: torch.dtype, setting: Setting
) -> Collective:
    """One collective for a bucket, or for a part of it.

    Args:
        ways: what it holds and how that travels.
        used: the collectives of the whole plan; if it is one, no joining is needed.
        dtype: dtype of the bucket; see `Collective`.
        setting: what outlives a bucket; see `Setting`.
    """
    segments: dict[type[Collective], list[Segment]] = {}
    for collective, segment in ways:
        segments.setdefault(collective, []).append(segment)
    parts = [collective(own, dtype, setting) for collective, own in segments.items()]
    return parts[0] if len(used) == 1 else Joined(parts, max(c.num_channels for c in used))
