"""Runs: many small exact parameters of a message, moved as one.

Each of thousands of tiny parameters would cost some fifty microseconds of Python at every stage. An exact
codec works element by element, so it may as well work on all of them at once: they are gathered from where
they stand in the bucket, encoded as one, and put to where the format wants them. Every byte stays the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradq import rng
from gradq.collectives.base import Segment

__all__ = ["Place", "Run", "runs_of"]

_SMALL_NUMEL = 4096  # above this, an index costs more than a call
_CONTEXT = rng.EncodeContext(key=0)  # an exact codec needs no random bits
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Place:
    """Where a piece of a parameter stands.

    Attributes:
        segment: the parameter.
        start: the first element of the piece in the bucket.
        numel: number of its elements.
        at: positions of its first byte in the messages of phase 1 and of phase 2.
    """

    segment: Segment
    start: int
    numel: int
    at: tuple[int, int]


class Run:
    """Small pieces with the same exact codecs.

    Args:
        places: where the pieces stand; at least one.
        dtype: dtype of the bucket.
        device: device of the bucket.
        rows: messages that `decode_mean` will take.
    """

    def __init__(self, places: Sequence[Place], dtype: torch.dtype, device: torch.device, rows: int) -> None:
        segment = places[0].segment
        self._codecs = (segment.phase1, segment.phase2)
        numel = sum(place.numel for place in places)
        self._where = _positions([place.start for place in places], places, device)
        self._there = tuple(
            _positions([place.at[phase] // codec.element_bytes for place in places], places, device)
            for phase, codec in enumerate(self._codecs)
        )
        self._x = torch.zeros(numel, dtype=dtype, device=device)
        widest = max(codec.element_bytes for codec in self._codecs)
        self._payloads = torch.zeros(rows * numel * widest, dtype=torch.uint8, device=device)

    def encode(self, flat: Tensor, message: Tensor) -> None:
        """Phase 1: from the bucket to a message."""
        torch.index_select(flat, 0, self._where, out=self._x)
        self._encode(0, message)

    def average(self, messages: Tensor, message: Tensor) -> None:
        """The mean over the rows of messages [W, nbytes] of phase 1, into a message of phase 2."""
        self._mean(messages)
        self._encode(1, message)

    def decode_mean(self, messages: Tensor, flat: Tensor) -> None:
        """The mean over the rows of messages [W, nbytes] of phase 1, into the bucket."""
        self._mean(messages)
        flat.index_copy_(0, self._where, self._x)

    def decode(self, message: Tensor, flat: Tensor) -> None:
        """From a message of phase 2 to the bucket."""
        payload = self._gather(1, message[None])[0]
        self._codecs[1].decode(payload, self._x)
        flat.index_copy_(0, self._where, self._x)

    def _encode(self, phase: int, message: Tensor) -> None:
        codec = self._codecs[phase]
        payload = self._payloads[: codec.nbytes(self._x.numel())]
        codec.encode(self._x, payload, context=_CONTEXT)
        word = _WORDS[codec.element_bytes]
        message.view(word).index_copy_(0, self._there[phase], payload.view(word))

    def _mean(self, messages: Tensor) -> None:
        self._codecs[0].decode_mean(self._gather(0, messages), self._x)

    def _gather(self, phase: int, messages: Tensor) -> Tensor:
        """The payloads of messages [W, nbytes], a row each."""
        codec, rows = self._codecs[phase], len(messages)
        word = _WORDS[codec.element_bytes]
        payloads = self._payloads[: rows * codec.nbytes(self._x.numel())].view(word).view(rows, -1)
        torch.index_select(messages.view(word), 1, self._there[phase], out=payloads)
        return payloads.view(torch.uint8)


def runs_of(
    places: Iterable[Place], dtype: torch.dtype, device: torch.device, rows: int
) -> tuple[list[Run], list[Place]]:
    """The runs among some pieces of one message, and the pieces that travel by themselves."""
    groups: dict[tuple[object, object], list[Place]] = {}
    alone: list[Place] = []
    for place in places:
        segment = place.segment
        by_element = segment.phase1.element_bytes and segment.phase2.element_bytes
        if by_element and 0 < place.numel <= _SMALL_NUMEL:
            groups.setdefault((segment.phase1, segment.phase2), []).append(place)
        else:
            alone.append(place)
    runs = []
    for group in groups.values():
        if len(group) == 1:
            alone += group
        else:
            runs.append(Run(group, dtype, device, rows))
    return runs, alone


def _positions(starts: Sequence[int], places: Sequence[Place], device: torch.device) -> Tensor:
    """The numbers start, start + 1, ... of all pieces, one after another, int64."""

    def ranges() -> Iterator[Tensor]:
        for start, place in zip(starts, places, strict=True):
            yield torch.arange(start, start + place.numel)

    return torch.cat(list(ranges())).to(device)
