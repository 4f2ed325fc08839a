"""The contract of a policy: which codec for which parameter. `sync` asks it once per plan, never per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from gradq.codecs import Codec, ExactCodec
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

    def __str__(self) -> str:
        """The codecs as a spec, "+feedback" where residuals are kept."""
        both = [(self.phase1, self.feedback1), (self.phase2, self.feedback2)]
        return "+".join(f"{codec}{' with feedback' if feedback else ''}" for codec, feedback in both)


Plan = Mapping[str, Assignment]


class Policy(Protocol):
    """Decides a plan. Must decide the same on every rank."""

    def plan(self, parameters: Sequence[ParameterInfo]) -> Plan:
        """An assignment for every parameter, by name."""
