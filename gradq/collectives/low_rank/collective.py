"""Low rank (PowerSGD): a matrix travels as its product with r vectors; one mean a step.

With G the mean over ranks of gradient + residual, m by n, and B a basis of r orthonormal vectors that every
rank has::

    right step    P = mean(G_i B)       out = P Bᵀ        the next basis is P's, on the left
    left step     Q = mean(G_iᵀ B)      out = B Qᵀ        the next basis is Q's, on the right

Two steps are one power iteration, so the bases follow the largest singular vectors of the gradients; PowerSGD
does both in every step and averages twice. What a rank loses, G_i - (G_i B) Bᵀ, goes into its local residual:
a projection never errs by more than the whole, so feedback is safe. It is not taken against the mean's `out`,
which would save a product: the differences between ranks would then add up in the residuals for ever.

The factor P or Q is averaged by the model's plain collective with an exact codec. It is the same on all
ranks bit for bit, and so is all that is made from it (see `gradq.collectives.low_rank.format`): a basis needs
no message. Bases start at random, from the seed. A NaN or Inf makes a row or a column of the factor
non-finite, and so of `out`.

References:
    Vogels, Karimireddy, Jaggi, "PowerSGD", NeurIPS 2019; the alternation is that of the authors' later code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradq import rng
from gradq.collectives.base import Collective, Segment, Setting, Step
from gradq.collectives.low_rank.format import BACKENDS
from gradq.metrics import Event
from gradq.transport.contract import Pending

__all__ = ["LowRank", "LowRankSegment"]


@dataclass(frozen=True)
class LowRankSegment(Segment):
    """A matrix that travels as factors.

    Attributes:
        matrix: rows and columns of the parameter.
        low_rank: the rank that it is approximated with.
        inner: the collective of the whole model, which averages the factors.
    """

    matrix: tuple[int, int] = (0, 0)
    low_rank: int = 0
    inner: type[Collective] | None = None

    @property
    def basis_numel(self) -> int:
        """Elements of what is remembered: 1 if the next step is a left one, and the last factor."""
        return 1 + self.low_rank * max(self.matrix)

    def factor(self, left: bool, start: int) -> Segment:
        """Its factor of a step, exact; start is where it stands in the chunk of factors.

        The side is in the name, so that ranks notice.
        """
        return Segment(
            name=f"{self.name}/{'Q' if left else 'P'}{self.low_rank}",
            start=start,
            numel=self.low_rank * self.matrix[1 if left else 0],
            rotation=self.rotation,
            phase1=self.phase1,
            phase2=self.phase2,
            feedback1=False,
            feedback2=False,
        )


@dataclass
class _Factors:
    """The factors of one step, as a chunk of their own."""

    flat: Tensor
    views: list[Tensor]  # [r, m] or [r, n], by segment
    collective: Collective


class LowRank(Collective):
    """Averages factors of matrices instead of matrices."""

    num_channels = 2

    def __init__(self, segments: Sequence[LowRankSegment], dtype: torch.dtype, setting: Setting) -> None:
        super().__init__(segments, dtype, setting)
        self._matrices = tuple(segments)
        self._kernels = BACKENDS.on(setting.device)
        self._bases = [torch.zeros(s.low_rank * max(s.matrix), device=setting.device) for s in segments]
        self._factors: dict[tuple[bool, ...], _Factors] = {}  # two in the steady state

    @classmethod
    def warm_up(cls, device: torch.device) -> None:
        """Run every kernel once."""
        kernels = BACKENDS.on(device)
        x, vector = torch.zeros(1, device=device), torch.zeros(1, 1, device=device)
        kernels.orthonormalize(vector, vector.clone(), key=0)
        for left in (False, True):
            kernels.project(x, x, x.clone(), vector, vector.clone(), left=left, loss_scale=1.0)
        kernels.reconstruct(vector, vector, x)
        kernels.remove(vector, vector, x, loss_scale=1.0)

    def average(self, flat: Tensor, step: Step) -> Iterator[Pending]:
        """See `Collective.average`.

        1. Make last step's factors orthonormal: the bases.
        2. Project gradient + residual of every matrix on its basis; the rest is the new residual.
        3. Average the factors, in the stages of the plain collective.
        4. Multiply factors and bases; remember the factors.
        """
        with self.timed("encode_ms", step, 1):
            lefts = [self._basis(number, step) for number in range(len(self._matrices))]
            factors = self._factors_of(tuple(lefts))
            for number, left in enumerate(lefts):
                self._project(number, left, factors.views[number], flat, step)
        yield from factors.collective.average(factors.flat, replace(step, sample=False))
        with self.timed("decode_ms", step, factors.collective.num_channels):
            for number, left in enumerate(lefts):
                segment, factor = self._matrices[number], factors.views[number]
                sides = self._sides(number, left, factor)
                self._kernels.reconstruct(*sides, flat[segment.start : segment.start + segment.numel])
                total, bases = segment.basis_numel, self.setting.feedback.bases
                with bases.update(segment.name, total, 0, total) as (_, new):
                    new[0] = not left
                    new[1 : 1 + factor.numel()] = factor.view(-1)
                    new[1 + factor.numel() :] = 0

    def _basis(self, number: int, step: Step) -> bool:
        """Make the basis of a segment; whether it is a left one."""
        segment = self._matrices[number]
        total, bases = segment.basis_numel, self.setting.feedback.bases
        with bases.update(segment.name, total, 0, total) as (old, _):
            left = bool(old[0])
            basis = self._basis_of(number, left)
            factor = old[1 : 1 + basis.numel()].view_as(basis)
            key = rng.dither_key(self.setting.seed, step.index, self.ids[segment.name], rng.BASIS)
            self._kernels.orthonormalize(factor, basis, key=key)
        return left

    def _basis_of(self, number: int, left: bool) -> Tensor:
        """Where the basis of a segment stands, [r, m] or [r, n]."""
        segment = self._matrices[number]
        length = segment.matrix[0 if left else 1]
        return self._bases[number][: segment.low_rank * length].view(segment.low_rank, length)

    def _sides(self, number: int, left: bool, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Basis and factor, the left one first."""
        basis = self._basis_of(number, left)
        return (basis, factor) if left else (factor, basis)

    def _project(self, number: int, left: bool, factor: Tensor, flat: Tensor, step: Step) -> None:
        """Step 2 for one segment."""
        segment, scale = self._matrices[number], step.loss_scale
        x = flat[segment.start : segment.start + segment.numel]
        with self.setting.feedback.local.update(segment.name, segment.numel, 0, segment.numel) as (old, new):
            basis = self._basis_of(number, left)
            self._kernels.project(x, old, new, basis, factor, left=left, loss_scale=scale)
            signal = float(new.double().square().sum()) if step.sample else 0.0
            self._kernels.remove(*self._sides(number, left, factor), new, loss_scale=scale)
            if step.sample:
                error = float((scale * new.double()).square().sum())
                for kind, energy in (("error_energy", error), ("signal_energy", signal)):
                    event = Event(kind, energy, step.index, step.bucket, 1, segment.name)
                    self.setting.metrics.record(event)

    def _factors_of(self, lefts: tuple[bool, ...]) -> _Factors:
        """The chunk of factors for these sides."""
        if lefts not in self._factors:
            segments: list[Segment] = []
            start = 0
            for matrix, left in zip(self._matrices, lefts, strict=True):
                segments.append(matrix.factor(left, start))
                start += segments[-1].numel
            inner = self._matrices[0].inner
            assert inner is not None
            flat = torch.zeros(start, dtype=self.dtype, device=self.setting.device)
            views = [
                flat[s.start : s.start + s.numel].view(matrix.low_rank, -1)
                for s, matrix in zip(segments, self._matrices, strict=True)
            ]
            self._factors[lefts] = _Factors(flat, views, inner(segments, self.dtype, self.setting))
        return self._factors[lefts]
