"""MessageLayout: where the payload of each segment stands in a chunk and in the messages of both phases.

Many small exact parameters of a message are moved as one. Each of thousands of tiny parameters would cost
some fifty microseconds of Python at every stage. An exact codec works element by element, so it may as well
work on all of them at once: they are gathered from where they stand in the chunk, encoded as one, and put to
where the format wants them. Every byte stays the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gradq import rng, wire
from gradq.collectives.base import Segment, Slot

__all__ = ["Coalesced", "MessageLayout"]

_SMALL_NUMEL = 4096  # above this, an index costs more than a call
_CONTEXT = rng.EncodeContext(key=0)  # an exact codec needs no random bits
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class MessageLayout:
    """The slots of one message: of what a rank owns of every segment, or of whole segments.

    Args:
        segments: the segments of the chunk, in order.
        world_size: number of ranks that own a shard of every segment; 1 takes whole segments.
        owner: the rank whose shards these are.

    Attributes:
        slots: one for each segment of which there is something.
        numel: elements of all slots.
        nbytes1: bytes of a message of phase 1.
        nbytes2: bytes of a message of phase 2.
    """

    def __init__(self, segments: Iterable[Segment], world_size: int = 1, owner: int = 0) -> None:
        ranges = [(segment, *segment.shard(world_size, owner)) for segment in segments]
        ranges = [(segment, start, stop) for segment, start, stop in ranges if start < stop]
        sizes1 = [segment.phase1.nbytes(stop - start) for segment, start, stop in ranges]
        sizes2 = [segment.phase2.nbytes(stop - start) for segment, start, stop in ranges]
        offsets1, self.nbytes1 = wire.message_offsets(sizes1)
        offsets2, self.nbytes2 = wire.message_offsets(sizes2)
        self.slots: list[Slot] = []
        for (segment, start, stop), at1, size1, at2, size2 in zip(
            ranges, offsets1, sizes1, offsets2, sizes2, strict=True
        ):
            position = segment.position(start)
            self.slots.append(
                Slot(
                    segment,
                    start,
                    stop,
                    flat=slice(position, position + stop - start),
                    payload1=slice(at1, at1 + size1),
                    payload2=slice(at2, at2 + size2),
                    first_block=segment.first_block(start),
                )
            )
        self.numel = sum(slot.numel for slot in self.slots)
        self._singles, self._coalesced = self.slots, list[Coalesced]()

    def coalesce(self, dtype: torch.dtype, device: torch.device, world_size: int) -> None:
        """Let small exact slots travel as one.

        Args:
            dtype: dtype of the chunk.
            device: device of the chunk.
            world_size: number of messages of which a mean will be taken.
        """
        groups: dict[tuple[object, object], list[Slot]] = {}
        singles: list[Slot] = []
        for slot in self.slots:
            codecs = (slot.segment.phase1, slot.segment.phase2)
            by_element = all(codec.element_bytes for codec in codecs)
            if by_element and slot.numel <= _SMALL_NUMEL:
                groups.setdefault(codecs, []).append(slot)
            else:
                singles.append(slot)
        singles += [slot for group in groups.values() if len(group) == 1 for slot in group]
        self._singles = singles
        self._coalesced = [
            Coalesced(group, dtype, device, world_size) for group in groups.values() if len(group) > 1
        ]

    def split(self, sample: bool) -> tuple[Sequence[Slot], Sequence[Coalesced]]:
        """The slots that travel by themselves, and the others; all by themselves to sample their errors."""
        return (self.slots, ()) if sample else (self._singles, self._coalesced)


class Coalesced:
    """Small slots with the same exact codecs.

    Args:
        slots: at least one.
        dtype: dtype of the chunk.
        device: device of the chunk.
        world_size: messages that `decode_mean` will take.
    """

    def __init__(
        self, slots: Sequence[Slot], dtype: torch.dtype, device: torch.device, world_size: int
    ) -> None:
        self._codecs = (slots[0].segment.phase1, slots[0].segment.phase2)
        numels = [slot.numel for slot in slots]
        self._flat = _positions([slot.flat.start for slot in slots], numels, device)
        starts = ([slot.payload1.start for slot in slots], [slot.payload2.start for slot in slots])
        self._payload_words = [
            _positions([start // codec.element_bytes for start in own], numels, device)
            for codec, own in zip(self._codecs, starts, strict=True)
        ]
        self._x = torch.zeros(sum(numels), dtype=dtype, device=device)
        widest = max(codec.element_bytes for codec in self._codecs)
        self._payloads = torch.zeros(world_size * sum(numels) * widest, dtype=torch.uint8, device=device)

    def encode(self, flat: Tensor, message: Tensor) -> None:
        """Phase 1: from the chunk to a message."""
        torch.index_select(flat, 0, self._flat, out=self._x)
        self._encode(0, message)

    def average(self, messages: Tensor, message: Tensor) -> None:
        """The mean over the rows of messages [W, nbytes] of phase 1, into a message of phase 2."""
        self._mean(messages)
        self._encode(1, message)

    def decode_mean(self, messages: Tensor, flat: Tensor) -> None:
        """The mean over the rows of messages [W, nbytes] of phase 1, into the chunk."""
        self._mean(messages)
        flat.index_copy_(0, self._flat, self._x)

    def decode(self, message: Tensor, flat: Tensor) -> None:
        """From a message of phase 2 to the chunk."""
        payload = self._gather(1, message[None])[0]
        self._codecs[1].decode(payload, self._x)
        flat.index_copy_(0, self._flat, self._x)

    def _encode(self, number: int, message: Tensor) -> None:
        codec = self._codecs[number]
        payload = self._payloads[: codec.nbytes(self._x.numel())]
        codec.encode(self._x, payload, context=_CONTEXT)
        word = _WORDS[codec.element_bytes]
        message.view(word).index_copy_(0, self._payload_words[number], payload.view(word))

    def _mean(self, messages: Tensor) -> None:
        self._codecs[0].decode_mean(self._gather(0, messages), self._x)

    def _gather(self, number: int, messages: Tensor) -> Tensor:
        """The payloads of messages [W, nbytes], a row each."""
        codec, rows = self._codecs[number], len(messages)
        word = _WORDS[codec.element_bytes]
        payloads = self._payloads[: rows * codec.nbytes(self._x.numel())].view(word).view(rows, -1)
        torch.index_select(messages.view(word), 1, self._payload_words[number], out=payloads)
        return payloads.view(torch.uint8)


def _positions(starts: Sequence[int], numels: Sequence[int], device: torch.device) -> Tensor:
    """The numbers start, start + 1, ... of all slots, one after another, int64."""
    ranges = [torch.arange(start, start + numel) for start, numel in zip(starts, numels, strict=True)]
    return torch.cat(ranges).to(device)
