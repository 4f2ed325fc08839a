"""What a collective is: a generator that averages one bucket over ranks and yields where it waits.

Shapes: W ranks; a bucket is a flat tensor of segments (one a parameter); a piece is the part of a segment
that one rank owns. A collective never blocks: it posts an exchange and yields its `Pending`. Whoever drives
the generator (`executor.Executor`, a simulator, a test) waits for it and resumes. What runs between two
yields is a *stage*; stage k posts on channel k only, so every channel sees the same order on all ranks.
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
from gradq.metrics import Event, Metrics
from gradq.transport.contract import Channel, Pending

__all__ = [
    "Collective",
    "Residuals",
    "Scratch",
    "Segment",
    "SegmentCodec",
    "Setting",
    "Step",
    "Way",
]


class SegmentCodec(Protocol):
    """The part of a codec that a collective needs; every `gradq.codecs.Codec` has it."""

    @property
    def block_size(self) -> int:
        """A segment may be cut at multiples of it."""

    @property
    def element_bytes(self) -> int:
        """Bytes of an element if a payload is just the elements, each by itself, in order; else 0."""

    def nbytes(self, numel: int) -> int:
        """Payload bytes of numel elements."""

    def encode(
        self,
        x: Tensor,
        payload: Tensor,
        *,
        context: rng.EncodeContext,
        residual: Tensor | None = None,
        new_residual: Tensor | None = None,
    ) -> None:
        """Encode x into payload."""

    def decode(self, payload: Tensor, out: Tensor) -> None:
        """Decode payload into out."""

    def decode_mean(self, payloads: Tensor, out: Tensor) -> None:
        """Mean over the rows of payloads into out."""


class Residuals(Protocol):
    """The part of `gradq.sync.feedback.Residuals` that a collective needs."""

    def piece(
        self, name: str, numel: int, start: int, stop: int
    ) -> AbstractContextManager[tuple[Tensor, Tensor]]:
        """Old and new residual of elements [start, stop)."""


@dataclass(frozen=True)
class Segment:
    """One parameter of a bucket and how it travels.

    Attributes:
        name: the parameter's name.
        start: index of its first element in the bucket.
        numel: number of its elements.
        rotation: number that shifts which rank owns which piece; see `wire.shard`.
        phase1: codec of the gradients.
        phase2: codec of the means.
        feedback1: whether phase 1 uses the local residual.
        feedback2: whether phase 2 uses the shard residual.
        matrix: rows and columns of the parameter, for `low_rank`.
        low_rank: the rank it is approximated with there; 0 elsewhere.
        local_world_size: ranks a node, if they share the parameter out among themselves first (hierarchical).
        offset: if the segment is a part of its parameter, where in the parameter it starts.
        whole: elements of the parameter then; 0 if the segment is all of it.
    """

    name: str
    start: int
    numel: int
    rotation: int
    phase1: SegmentCodec
    phase2: SegmentCodec
    feedback1: bool
    feedback2: bool
    matrix: tuple[int, int] = (0, 0)
    low_rank: int = 0
    local_world_size: int = 1
    offset: int = 0
    whole: int = 0

    @property
    def grain(self) -> int:
        """The parameter is cut at multiples of this many elements."""
        return math.lcm(self.phase1.block_size, self.phase2.block_size)

    def piece(self, world_size: int, owner: int) -> tuple[int, int]:
        """The elements [start, stop) of this segment that a rank owns."""
        if self.local_world_size == 1:
            return wire.shard(self.numel, self.grain, world_size, owner, self.rotation)
        node, local_rank = divmod(owner, self.local_world_size)
        first, last = self.local_piece(local_rank)
        num_nodes = world_size // self.local_world_size
        start, stop = wire.shard(last - first, self.grain, num_nodes, node, self.rotation)
        return first + start, first + stop

    def local_piece(self, local_rank: int) -> tuple[int, int]:
        """The elements [start, stop) that one rank of every node sums for its node."""
        return wire.shard(self.numel, self.grain, self.local_world_size, local_rank, self.rotation)


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


class Scratch:
    """Buffers of bytes by name, each as large as the largest request so far."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, nbytes: int) -> Tensor:
        """The first nbytes of a buffer, uint8; whatever the last user left is in it."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._buffers[name] = torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
        return buffer[:nbytes]

    def nbytes(self) -> int:
        """Memory held."""
        return sum(buffer.numel() for buffer in self._buffers.values())


@dataclass(frozen=True)
class Setting:
    """Everything around a collective that outlives a bucket.

    Attributes:
        rank: rank of this process in the group.
        world_size: number of ranks.
        seed: seed of all random bits.
        channels: one channel for each stage.
        local: local residuals.
        shard: shard residuals.
        metrics: receiver of everything that is measured.
        device: device of the buckets.
        bases: what `low_rank` remembers from step to step.
        plain: the collective of the whole model, for a part of another collective's work that needs one.
    """

    rank: int
    world_size: int
    seed: int
    channels: Sequence[Channel]
    local: Residuals
    shard: Residuals
    metrics: Metrics
    device: torch.device
    bases: Residuals | None = None
    plain: type[Collective] | None = None
    local_world_size: int = 1
    byte_kinds: tuple[str, ...] = ("wire_bytes",)  # what the bytes sent count as
    scratch: Scratch | None = None  # shared by collectives that never run at the same time


class Collective(ABC):
    """Averages the buckets of one layout; made once per layout, owns its buffers.

    Args:
        segments: what the bucket holds, in order.
        dtype: dtype of the flat tensors handed to `average`: fp32, or fp64.
        setting: ranks, channels, residuals.

    Attributes:
        segments: the argument.
        dtype: the argument.
        setting: the argument.
        ids: number of each parameter, by name, for its random bits.
    """

    num_channels: ClassVar[int]
    cuts_segments: ClassVar[bool] = False  # whether a part of a parameter is averaged as it is in the whole

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
        self._layout = wire.layout_digest(f"{type(self).__name__} {described}")

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
        header = wire.Header(phase, setting.rank, step.bucket, step.index, self._layout)
        sent = sum(message.numel() for peer, message in enumerate(send) if peer != setting.rank)
        for kind in setting.byte_kinds:
            setting.metrics.record(Event(kind, sent, step.index, step.bucket, phase))
        return setting.channels[phase - 1].post(send, receive, header)

    def timed(self, kind: str, step: Step, phase: int) -> AbstractContextManager[None]:
        """Record the duration of a block as an event."""
        return self.setting.metrics.timed(kind, step=step.index, bucket=step.bucket, phase=phase)

    def encode1(
        self,
        segment: Segment,
        start: int,
        stop: int,
        x: Tensor,
        payload: Tensor,
        step: Step,
        first_block: int | None = None,
    ) -> None:
        """Phase 1: encode elements [start, stop) of a segment, x being just those.

        Pieces that do not start at a multiple of the block size must say which blocks of the dither they use.
        """
        codec = segment.phase1
        start, stop = segment.offset + start, segment.offset + stop
        context = rng.EncodeContext(
            key=rng.dither_key(self.setting.seed, step.index, self.ids[segment.name], 1),
            shift=rng.dither_shift(self.setting.rank, self.setting.world_size),
            first_block=start // codec.block_size if first_block is None else first_block,
            loss_scale=step.loss_scale,
        )
        if not segment.feedback1:
            codec.encode(x, payload, context=context)
            if step.sample:
                self._sample(segment, x, payload, step)
            return
        numel = segment.whole or segment.numel
        with self.setting.local.piece(segment.name, numel, start, stop) as (old, new):
            codec.encode(x, payload, context=context, residual=old, new_residual=new)
            if step.sample:
                self._sample(segment, x + step.loss_scale * old, payload, step)

    def encode2(
        self, segment: Segment, start: int, stop: int, x: Tensor, payload: Tensor, step: Step
    ) -> None:
        """Phase 2: encode the mean of elements [start, stop) of a segment, which this rank owns."""
        codec = segment.phase2
        context = rng.EncodeContext(
            key=rng.dither_key(self.setting.seed, step.index, self.ids[segment.name], 2),
            first_block=(segment.offset + start) // codec.block_size,
            loss_scale=step.loss_scale,
        )
        if not segment.feedback2:
            codec.encode(x, payload, context=context)
            return
        with self.setting.shard.piece(segment.name, stop - start, 0, stop - start) as (old, new):
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


Way = tuple[type[Collective], Segment]  # how one parameter, or a part of it, travels
