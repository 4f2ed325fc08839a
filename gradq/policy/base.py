"""The contract of a policy: which codec for which parameter. `sync` asks it once per plan.

An `AdaptivePolicy` plans again during training, on all ranks at the same step boundary, from measurements
that reach it as events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from gradq.codecs import Codec, ExactCodec
from gradq.collectives import COLLECTIVES
from gradq.errors import ConfigError
from gradq.metrics import Event

__all__ = ["AdaptivePolicy", "Assignment", "ParameterInfo", "Plan", "Policy", "check_plan"]


@dataclass(frozen=True, kw_only=True)
class ParameterInfo:
    """What a policy knows of a parameter.

    Attributes:
        name: the name in `module.named_parameters()`, without what wrappers add; see `policy.canonical_name`.
        shape: shape of the parameter; () for a scalar, and any dimension may be 0.
        dtype: dtype of its gradient.
        index: position among the module's parameters.
        role: "embedding", "norm", "bias", "matmul" or "other" (see `gradq.policy.roles`), "" if unknown.
        world_size: the ranks that average it, None if unknown; `GradientSync` fills it in.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    index: int
    role: str = ""
    world_size: int | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows, columns for `collectives.low_rank`: the first dimension, and all others in memory order.

        A scalar is one row of one column; a parameter without elements has neither.
        """
        if not self.numel:
            return 0, 0
        rows = self.shape[0] if self.shape else 1
        return rows, self.numel // rows


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """How one parameter travels: codecs and feedback of both phases, and the collective.

    Attributes:
        phase1: codec of the gradients.
        phase2: codec of the means.
        feedback1: whether phase 1 keeps a local residual.
        feedback2: whether phase 2, where the collective has one, keeps a shard residual.
        collective: a name in `gradq.collectives.COLLECTIVES`, or "auto": see `resolve`.
        low_rank: rank of the approximation, with collective="low_rank". phase1 and phase2 then carry its
            factors, exact, and feedback1 is always on.

    Raises:
        ConfigError: error feedback through a codec that has none or does not contract; an unknown collective;
            a collective that cannot work with the rest.
    """

    phase1: Codec
    phase2: Codec
    feedback1: bool = False
    feedback2: bool = False
    collective: str = "auto"
    low_rank: int = 0

    def __post_init__(self) -> None:
        known = ("auto", *COLLECTIVES)
        if self.collective not in known:
            raise ConfigError(f"Assignment(collective={self.collective!r}): choose from {', '.join(known)}")
        if (self.collective == "low_rank") != (self.low_rank > 0):
            raise ConfigError(
                f"Assignment(collective={self.collective!r}, low_rank={self.low_rank}): low_rank is the "
                'rank, at least 1, with collective="low_rank", and 0 with any other'
            )
        if self.low_rank:
            self._check_low_rank()
            return
        if self.collective == "sparse" and self.phase1.collective != "sparse":
            raise ConfigError(f'collective="sparse" is for sparse codecs such as topk, not for {self.phase1}')
        for codec, feedback in ((self.phase1, self.feedback1), (self.phase2, self.feedback2)):
            if codec.needs_feedback and not feedback:
                raise ConfigError(
                    f"{codec} needs error feedback: what it leaves out would never be sent, and training "
                    'does not converge; use feedback="auto"'
                )
            if feedback and isinstance(codec, ExactCodec):
                raise ConfigError(f"codec {codec} has no error feedback; it loses nothing worth feeding back")
            if feedback and not codec.contractive:
                raise ConfigError(
                    f"feedback=True with {codec}: this codec's error can exceed the gradient itself, and "
                    "feeding that back diverges; use rounding=nearest, more bits or a smaller block_size"
                )

    @property
    def exact(self) -> bool:
        """Whether both phases only cast."""
        return isinstance(self.phase1, ExactCodec) and isinstance(self.phase2, ExactCodec)

    def _check_low_rank(self) -> None:
        if not self.feedback1 or self.feedback2:
            raise ConfigError(
                "low_rank needs feedback1=True (what the factors leave out would be lost in every step, and "
                "training does not converge) and feedback2=False (they are averaged exactly)"
            )
        for codec in (self.phase1, self.phase2):
            if not isinstance(codec, ExactCodec) or codec.dtype != "fp32":
                raise ConfigError(f"low_rank averages its factors in fp32, not in {codec}")

    def check(self, parameter: ParameterInfo) -> None:
        """Whether this parameter can travel so.

        Raises:
            ConfigError: naming the parameter and why not.
        """
        if self.low_rank and (parameter.ndim < 2 or parameter.numel == 0):
            raise ConfigError(
                f"low_rank for parameter {parameter.name!r} of shape {list(parameter.shape)}: it needs a "
                "matrix; give this one a codec"
            )
        if self.low_rank and parameter.dtype == torch.float64:
            raise ConfigError(
                f"low_rank computes in fp32 and parameter {parameter.name!r} is fp64; send it exact"
            )

    def resolve(self, collective: str) -> str:
        """The collective's name: what was asked for here, or for the run, or what phase 1 is best with."""
        asked = (self.collective, collective, self.phase1.collective)
        return next((name for name in asked if name != "auto"), "auto")

    def payload_bytes(self, parameter: ParameterInfo) -> float:
        """Bytes of this rank's part in phase 1, on average over the steps."""
        if not self.low_rank:
            return self.phase1.nbytes(parameter.numel)
        rank = min(self.low_rank, *parameter.matrix)
        return sum(self.phase1.nbytes(rank * size) for size in parameter.matrix) / 2

    def __str__(self) -> str:
        """The codecs as a spec, "with feedback" where residuals are kept; a collective that was asked for."""
        if self.low_rank:
            return f"powersgd:{self.low_rank} with feedback"
        both = [(self.phase1, self.feedback1), (self.phase2, self.feedback2)]
        codecs = "+".join(f"{codec}{' with feedback' if feedback else ''}" for codec, feedback in both)
        return codecs if self.collective == "auto" else f"{codecs} by {self.collective}"


Plan = Mapping[str, Assignment]


def check_plan(plan: Plan, parameters: Mapping[str, ParameterInfo], label: str) -> None:
    """Whether a policy's plan fits the model.

    Raises:
        ConfigError: it leaves parameters out, or has others; a parameter cannot travel as planned.
    """
    if plan.keys() != parameters.keys():
        wrong = sorted(plan.keys() ^ parameters.keys())
        raise ConfigError(f"the policy {label} must plan for exactly the parameters it is given, not {wrong}")
    for name, entry in plan.items():
        entry.check(parameters[name])


class Policy(Protocol):
    """Decides a plan. Must decide the same on every rank."""

    def plan(self, parameters: Sequence[ParameterInfo]) -> Plan:
        """An assignment for every parameter, by name."""


@runtime_checkable
class AdaptivePolicy(Policy, Protocol):
    """A policy that learns. One object for one model; `gradq.sync.learner` says who calls it, when.

    Whatever decides a plan must be equal on all ranks: the arguments (compared by `label`), the step, and
    what `learn` is given. What a rank measures itself may enter a plan through `learn` only.
    """

    @property
    def label(self) -> str:
        """All settings, in words that are equal on all ranks if the settings are."""

    def candidates(self, step: int, name: str) -> Mapping[str, Codec]:
        """The codecs whose error on this parameter's gradient is wanted in this step, by any name."""

    def observe(self, event: Event) -> None:
        """Take an event; called by the worker threads."""

    def is_due(self, step: int) -> bool:
        """Whether to plan again before this step. Must not depend on anything that was measured."""

    def measured(self) -> list[float]:
        """What this rank has measured since the last plan; as long on every rank."""

    def learn(self, everyone: Sequence[Sequence[float]]) -> None:
        """Take all ranks' `measured`, by rank. `plan` follows."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What decides the current and the next plan, but for `measured`; equal on all ranks."""

    def load_state_dict(self, state: Mapping[str, torch.Tensor], measured: Sequence[float]) -> None:
        """Continue from `state_dict` and `measured`. `plan` follows.

        Raises:
            CheckpointError: they are of other settings or another model.
        """
