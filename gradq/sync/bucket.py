"""Bucket: one layout of a bucket, as collectives over its parts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from gradq.collectives.base import Collective, Setting, Step, Way
from gradq.collectives.joined import join
from gradq.sync.parts import parts_of
from gradq.transport.contract import Pending

__all__ = ["Bucket"]


class Bucket:
    """Averages buckets of one layout, part by part.

    Args:
        flat: one of these buckets.
        names: names of its parameters, in order.
        ways: how these travel.
        used: the collectives of the whole plan.
        setting: what outlives a bucket; see `Setting`.
        most: elements of a part.

    Attributes:
        names: the argument.
        parts: the place of each part in the bucket, and its collective.
    """

    def __init__(
        self,
        flat: Tensor,
        names: tuple[str, ...],
        ways: Sequence[Way],
        used: Collection[type[Collective]],
        setting: Setting,
        most: int,
    ) -> None:
        self.names, self._dtype = names, flat.dtype
        dtype = flat.dtype if flat.dtype == torch.float64 else torch.float32
        self._work = None if flat.dtype == dtype else torch.empty_like(flat, dtype=dtype)
        self.parts: list[tuple[slice, Collective]] = []
        start = 0
        for part in parts_of(ways, most):
            stop = start + sum(segment.numel for _, segment in part)
            self.parts.append((slice(start, stop), join(part, used, dtype, setting)))
            start = stop
        assert start == flat.numel(), f"a bucket has {flat.numel()} elements, its parameters {start}"

    def fits(self, flat: Tensor, names: tuple[str, ...]) -> bool:
        """Whether a bucket has this layout."""
        return self.names == names and self._dtype == flat.dtype

    def open(self, flat: Tensor) -> Tensor:
        """The bucket in the dtype that codecs work in; parts are averaged there once this was called."""
        return flat if self._work is None else self._work.copy_(flat)

    def average(self, number: int, flat: Tensor, step: Step) -> Iterator[Pending]:
        """Replace a part of flat by its mean; the stages are those of its collective."""
        where, collective = self.parts[number]
        work = flat if self._work is None else self._work
        yield from collective.average(work[where], step)
        if work is not flat:
            flat[where].copy_(work[where])

    def mean(self, number: int, flat: Tensor) -> Tensor:
        """A part's mean after `average`, in the dtype that codecs work in."""
        where, _ = self.parts[number]
        return (flat if self._work is None else self._work)[where]
