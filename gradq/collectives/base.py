"""What a collective is: a generator that averages one chunk over ranks and yields where it waits.

Shapes: W ranks; a chunk is a flat tensor of segments (each a parameter, or some of one); a shard is what one
rank owns of a segment. A collective never blocks: it posts an exchange and yields its `Pending`. Whoever
drives the generator (`executor.Executor`, `gradq.testing.Network`) waits for it and resumes. What runs
between two yields is a *stage*; stage k posts on channel k only, so every channel sees the same order on all
ranks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from gradq import rng, wire
from gradq.codecs import Codec
from gradq.metrics import Event, Metrics
from gradq.transport.contract import Channel, Pending

__all__ = ["Collective", "Feedback", "Residuals", "Segment", "Setting", "Slot", "Step", "Transfer"]


class Residuals(Protocol):
    """What a collective needs of `gradq.sync.feedback.Residuals`."""

    def update(
        self, name: str, numel: int, start: int, stop: int
    ) -> AbstractContextManager[tuple[Tensor, Tensor]]:
        """Old and new residual of elements [start, stop)."""


class Feedback(Protocol):
    """What a collective needs of `gradq.sync.feedback.Feedback`."""

    @property
    def local(self) -> Residuals:
        """What phase 1 failed to send of this rank's gradients."""

    @property
    def shard(self) -> Residuals:
        """What phase 2 failed to send of the means that this rank owns."""

    @property
    def bases(self) -> Residuals:
        """What `low_rank` remembers from step to step."""


@dataclass(frozen=True)
class Segment:
    """One parameter of a chunk, or some of one, and how it travels.

    Attributes:
        name: the parameter's name.
        start: index of its first element in the chunk.
        numel: number of its elements.
        rotation: number that shifts which rank owns which shard; see `wire.shard`.
        phase1: codec of the gradients.
        phase2: codec of the means.
        feedback1: whether phase 1 uses the local residual.
        feedback2: whether phase 2 uses the shard residual.
        offset: if the segment is some of its parameter, where in the parameter it starts.
        whole: elements of the parameter then; 0 if the segment is all of it.
    """

    name: str
    start: int
    numel: int
    rotation: int
    phase1: Codec
    phase2: Codec
    feedback1: bool
    feedback2: bool
    offset: int = 0
    whole: int = 0

    @property
    def grain(self) -> int:
        """The parameter is cut at multiples of this many elements."""
        return math.lcm(self.phase1.block_size, self.phase2.block_size)

    def shard(self, world_size: int, owner: int) -> tuple[int, int]:
        """The elements [start, stop) of this segment that a rank owns."""
        return wire.shard(self.numel, self.grain, world_size, owner, self.rotation)

    def position(self, element: int) -> int:
        """Where an element of this segment stands in the chunk."""
        return self.start + element

    def first_block(self, element: int) -> int:
        """The block of phase 1 that starts at an element, counted within the parameter: for its dither."""
        return (self.offset + element) // self.phase1.block_size


@dataclass(frozen=True)
class Slot:
    """Where some elements of a segment stand.

    Attributes:
        segment: the segment.
        start: the first of the elements, counted within the segment.
        stop: one past the last.
        flat: where they stand in the chunk.
        payload1: where their payload stands in a message of phase 1, in bytes.
        payload2: the same in a message of phase 2.
        first_block: the block of phase 1's dither that they start with.
    """

    segment: Segment
    start: int
    stop: int
    flat: slice
    payload1: slice
    payload2: slice
    first_block: int

    @property
    def numel(self) -> int:
        """Number of the elements."""
        return self.stop - self.start


Transfer = tuple[type["Collective"], Segment]  # a segment, and the collective that it travels by


@dataclass(frozen=True)
class Step:
    """What changes from step to step.

    Attributes:
        index: optimizer step, from 0.
        bucket: index of the bucket.
        loss_scale: factor that the gradients are too large by; see `rng.EncodeContext`.
        sample: whether to measure the error of phase 1.
    """

    index: int
    bucket: int
    loss_scale: float = 1.0
    sample: bool = False


@dataclass(frozen=True)
class Setting:
    """Everything around a collective that outlives a chunk.

    Attributes:
        rank: rank of this process among those that take part.
        world_size: number of ranks that take part.
        seed: seed of all random bits.
        channels: one for each stage that posts; phase p of a collective goes over channel p - 1.
        feedback: residuals.
        metrics: receiver of everything that is measured.
        device: device of the chunks.
        local_world_size: ranks a node where the collective of the run knows nodes, else 1.
        byte_kinds: kinds of `metrics.Event` that the bytes sent count as.
    """

    rank: int
    world_size: int
    seed: int
    channels: Sequence[Channel]
    feedback: Feedback
    metrics: Metrics
    device: torch.device
    local_world_size: int = 1
    byte_kinds: tuple[str, ...] = ("wire_bytes",)


class Collective(ABC):
    """Averages the chunks of one layout; made once per layout, owns its buffers.

    Args:
        segments: what the chunk holds, in order.
        dtype: dtype of the flat tensors handed to `average`: fp32, or fp64.
        setting: ranks, channels, residuals.

    Attributes:
        segments: the argument.
        dtype: the argument.
        setting: the argument.
        ids: number of each parameter, by name, for its random bits.
    """

    num_channels: ClassVar[int]  # the largest number of exchanges that it waits for
    cuts_segments: ClassVar[bool] = False  # whether a parameter may be cut without a change of its mean

    def __init__(self, segments: Sequence[Segment], dtype: torch.dtype, setting: Setting) -> None:
        self.segments = tuple(segments)
        self.dtype = dtype
        self.setting = setting
        self.ids = {segment.name: rng.name_id(segment.name) for segment in segments}
        described = [
            (s.name, s.start, s.numel, s.rotation, str(s.phase1), str(s.phase2), s.feedback1, s.feedback2)
            + ((s.offset, s.whole) if s.whole else ())
            for s in self.segments
        ]
        self._digest = wire.layout_digest(f"{type(self).__name__} {described}")

    def buffer(self, *shape: int) -> Tensor:
        """Bytes for messages, zeros."""
        return torch.zeros(*shape, dtype=torch.uint8, device=self.setting.device)

    @classmethod
    def warm_up(cls, device: torch.device) -> None:
        """Compile what this collective uses besides codecs, before the first step. Here: nothing.

        Raises:
            KernelError: there are no kernels for the device.
        """
        return

    @classmethod
    def has_phase2(cls, world_size: int, local_world_size: int) -> bool:
        """Whether means are encoded again on their way back."""
        return cls.num_channels > 1

    @classmethod
    def shard_of(
        cls, segment: Segment, world_size: int, local_world_size: int, owner: int
    ) -> tuple[int, int]:
        """The elements [start, stop) of a segment whose mean a rank encodes in phase 2."""
        return segment.shard(world_size, owner)

    @abstractmethod
    def average(self, flat: Tensor, step: Step) -> Iterator[Pending]:
        """Replace flat by its mean over ranks; the same bits on every rank."""

    def post(self, phase: int, send: Sequence[Tensor], receive: Sequence[Tensor], step: Step) -> Pending:
        """Post an exchange on the channel of a phase and count its bytes."""
        return self.exchange(self.setting, phase, send, receive, step)

    def exchange(
        self, setting: Setting, phase: int, send: Sequence[Tensor], receive: Sequence[Tensor], step: Step
    ) -> Pending:
        """As `post`, among the ranks of a setting of its own: `hierarchical` has one for each node."""
        header = wire.Header(phase, setting.rank, step.bucket, step.index, self._digest)
        sent = sum(message.numel() for peer, message in enumerate(send) if peer != setting.rank)
        for kind in setting.byte_kinds:
            setting.metrics.record(Event(kind, sent, step.index, step.bucket, phase))
        return setting.channels[phase - 1].post(send, receive, header)

    def timed(self, kind: str, step: Step, phase: int) -> AbstractContextManager[None]:
        """Record the duration of a block of code as an event."""
        return self.setting.metrics.timed(kind, step=step.index, bucket=step.bucket, phase=phase)

    def encode1(self, slot: Slot, x: Tensor, payload: Tensor, step: Step) -> None:
        """Phase 1: encode the gradient of a slot's elements, x, into payload."""
        segment, codec = slot.segment, slot.segment.phase1
        context = rng.EncodeContext(
            key=rng.dither_key(self.setting.seed, step.index, self.ids[segment.name], rng.GRADIENT),
            shift=rng.dither_shift(self.setting.rank, self.setting.world_size),
            first_block=slot.first_block,
            loss_scale=step.loss_scale,
        )
        if not segment.feedback1:
            codec.encode(x, payload, context=context)
            if step.sample:
                self._sample(segment, x, payload, step)
            return
        start, stop = segment.offset + slot.start, segment.offset + slot.stop
        numel = segment.whole or segment.numel
        with self.setting.feedback.local.update(segment.name, numel, start, stop) as (old, new):
            codec.encode(x, payload, context=context, residual=old, new_residual=new)
            if step.sample:
                self._sample(segment, x + step.loss_scale * old, payload, step)

    def encode2(self, slot: Slot, x: Tensor, payload: Tensor, step: Step) -> None:
        """Phase 2: encode the mean of a slot's elements, x, which this rank owns, into payload."""
        segment, codec = slot.segment, slot.segment.phase2
        context = rng.EncodeContext(
            key=rng.dither_key(self.setting.seed, step.index, self.ids[segment.name], rng.MEAN),
            first_block=(segment.offset + slot.start) // codec.block_size,
            loss_scale=step.loss_scale,
        )
        if not segment.feedback2:
            codec.encode(x, payload, context=context)
            return
        with self.setting.feedback.shard.update(segment.name, slot.numel, 0, slot.numel) as (old, new):
            codec.encode(x, payload, context=context, residual=old, new_residual=new)

    def _sample(self, segment: Segment, value: Tensor, payload: Tensor, step: Step) -> None:
        decoded = torch.empty_like(value)
        segment.phase1.decode(payload, decoded)
        energies = {
            "error_energy": float((value - decoded).double().square().sum()),
            "signal_energy": float(value.double().square().sum()),
        }
        for kind, energy in energies.items():
            self.setting.metrics.record(Event(kind, energy, step.index, step.bucket, 1, segment.name))
