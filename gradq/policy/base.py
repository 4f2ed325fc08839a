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
from gradq.errors import ConfigError
from gradq.metrics import Event

__all__ = ["AdaptivePolicy", "Assignment", "ParameterInfo", "Plan", "Policy"]


@dataclass(frozen=True, kw_only=True)
class ParameterInfo:
    """What a policy knows of a parameter.

    Attributes:
        name: as in `module.named_parameters()`.
        shape: of the parameter.
        dtype: of its gradient.
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


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """How one parameter travels: codecs and feedback of both phases.

    Raises:
        ConfigError: error feedback through a codec that has none or does not contract.
    """

    phase1: Codec
    phase2: Codec
    feedback1: bool = False
    feedback2: bool = False

    def __post_init__(self) -> None:
        for codec, feedback in ((self.phase1, self.feedback1), (self.phase2, self.feedback2)):
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

    def __str__(self) -> str:
        """The codecs as a spec, "+feedback" where residuals are kept."""
        both = [(self.phase1, self.feedback1), (self.phase2, self.feedback2)]
        return "+".join(f"{codec}{' with feedback' if feedback else ''}" for codec, feedback in both)


Plan = Mapping[str, Assignment]


class Policy(Protocol):
    """Decides a plan. Must decide the same on every rank."""

    def plan(self, parameters: Sequence[ParameterInfo]) -> Plan:
        """An assignment for every parameter, by name."""


@runtime_checkable
class AdaptivePolicy(Policy, Protocol):
    """A policy that learns. One object for one model; `gradq.adaptive` says who calls it, when.

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
