"""The contract of a policy: which codec for which parameter. `sync` asks it once per plan, never per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from gradq.codecs import Codec, ExactCodec
from gradq.collectives import COLLECTIVES
from gradq.errors import ConfigError

__all__ = ["Assignment", "ParameterInfo", "Plan", "Policy"]


@dataclass(frozen=True, kw_only=True)
class ParameterInfo:
    """What a policy knows of a parameter.

    Attributes:
        name: as in `module.named_parameters()`.
        shape: of the parameter.
        dtype: of its gradient.
        index: position among the module's parameters.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    index: int

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
    """How one parameter travels: codecs and feedback of both phases, and the collective.

    Attributes:
        phase1: codec of the gradients.
        phase2: codec of the means.
        feedback1: whether phase 1 keeps a local residual.
        feedback2: whether phase 2, where the collective has one, keeps a shard residual.
        collective: a name in `gradq.collectives.COLLECTIVES`, or "auto" for the one of the whole model.

    Raises:
        ConfigError: error feedback through a codec that has none or does not contract; an unknown collective.
    """

    phase1: Codec
    phase2: Codec
    feedback1: bool = False
    feedback2: bool = False
    collective: str = "auto"

    def __post_init__(self) -> None:
        if self.collective not in ("auto", *COLLECTIVES):
            raise ConfigError(
                f"Assignment(collective={self.collective!r}): choose from auto, {', '.join(COLLECTIVES)}"
            )
        for codec, feedback in ((self.phase1, self.feedback1), (self.phase2, self.feedback2)):
            if feedback and isinstance(codec, ExactCodec):
                raise ConfigError(f"codec {codec} has no error feedback; it loses nothing worth feeding back")
            if feedback and not codec.contractive:
                raise ConfigError(
                    f"feedback=True with {codec}: this codec's error can exceed the gradient itself, and "
                    "feeding that back diverges; use rounding=nearest, more bits or a smaller block_size"
                )

    def __str__(self) -> str:
        """The codecs as a spec, "with feedback" where residuals are kept; a collective that was asked for."""
        both = [(self.phase1, self.feedback1), (self.phase2, self.feedback2)]
        codecs = "+".join(f"{codec}{' with feedback' if feedback else ''}" for codec, feedback in both)
        return codecs if self.collective == "auto" else f"{codecs} by {self.collective}"


Plan = Mapping[str, Assignment]


class Policy(Protocol):
    """Decides a plan. Must decide the same on every rank."""

    def plan(self, parameters: Sequence[ParameterInfo]) -> Plan:
        """An assignment for every parameter, by name."""
