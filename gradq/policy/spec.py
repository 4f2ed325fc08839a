"""Specs: what a user writes to say how gradients travel, such as "int4", "int4+int8" or "powersgd:4+int8"."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradq.codecs import Codec, from_spec
from gradq.codecs import names as codec_names
from gradq.codecs.suggest import shown, suggestion
from gradq.errors import ConfigError, SpecError

__all__ = ["Spec"]

_LOW_RANK = "powersgd"
_LARGEST_RANK_DIGITS = 6


@dataclass(frozen=True)
class Spec:
    """One codec for the gradients and one for their means.

    Attributes:
        phase1: codec of phase 1; None means plain all-reduce (the spec "none").
        phase2: codec of phase 2; None leaves it to phase 1's codec: "int4" sends means in 8 bits, because
            their error is not averaged down.
        low_rank: the rank of PowerSGD for matrices, 0 for none. It is not a codec but a way to average (see
            `gradq.collectives.low_rank`); phase1 and phase2 are then for what is no matrix or too small,
            and phase1 None means exact.

    Raises:
        SpecError: phase 2 without phase 1. ConfigError: the rank is not an integer of at least 0.

    Example:
        >>> str(Spec.parse("int4")), str(Spec.parse("int4 + int8")), str(Spec.parse("powersgd:4 + int8"))
        ('int4', 'int4+int8', 'powersgd:4+int8')
    """

    phase1: Codec | None
    phase2: Codec | None = None
    low_rank: int = 0

    def __post_init__(self) -> None:
        if type(self.low_rank) is not int or not 0 <= self.low_rank < 10**_LARGEST_RANK_DIGITS:
            raise ConfigError(
                f"Spec(low_rank={shown(str(self.low_rank))}): the rank is an integer, 1 or more; 0 for none"
            )
        if self.phase1 is None and self.phase2 is not None:
            raise SpecError("a spec with a codec for phase 2 needs one for phase 1")

    @classmethod
    def parse(cls, spec: str | Codec | Spec) -> Spec:
        """A spec from its text, from a codec, or from itself.

        Raises:
            SpecError: the text is not a spec.
        """
        if isinstance(spec, Spec):
            return spec
        if isinstance(spec, Codec):
            return cls(spec)
        if not isinstance(spec, str):
            raise SpecError(_not_a_string(spec))
        if not spec.strip():
            raise SpecError(
                f"{shown(spec)} is not a codec spec; write 'none' to leave gradients to a plain all-reduce, "
                "or a name such as 'int8'"
            )
        if spec.strip() == "none":
            return cls(None)
        first, *rest = parts = spec.split("+")
        low_rank = 0
        if _is_low_rank(first):
            low_rank, parts = _rank(first, spec), rest
        if any(_is_low_rank(part) for part in parts):
            raise SpecError(
                f"{shown(spec)}: powersgd is not a codec and cannot carry means; write it first, and after "
                "it the codec of what is no matrix, as in 'powersgd:4+int8'"
            )
        if len(parts) > 2:
            raise SpecError(f"{shown(spec)}: a spec names one codec, or two as 'phase1+phase2'")
        phase1, phase2 = [*(from_spec(part) for part in parts), None, None][:2]
        return cls(phase1, phase2, low_rank)

    @property
    def is_none(self) -> bool:
        """Whether gradients are left to a plain all-reduce."""
        return self.phase1 is None and not self.low_rank

    def codecs(self, world_size: int | None = None) -> tuple[Codec, Codec]:
        """The codecs of both phases, for a number of ranks (None: unknown).

        Raises:
            SpecError: the spec names none.
        """
        if self.phase1 is None:
            raise SpecError(f'the spec "{self}" has no codecs')
        if self.phase2 is not None:
            return self.phase1, self.phase2
        return self.phase1, self.phase1.default_phase2(world_size)

    def __str__(self) -> str:
        """The text that makes this spec again."""
        parts = [f"powersgd:{self.low_rank}"] if self.low_rank else []
        parts += [str(codec) for codec in (self.phase1, self.phase2) if codec is not None]
        return "+".join(parts) or "none"


def _is_low_rank(part: str) -> bool:
    """Whether a part of a spec is "powersgd" or "powersgd:" and anything."""
    return part.partition(":")[0].strip() == _LOW_RANK


def _rank(part: str, spec: str) -> int:
    text = part.partition(":")[2].strip()
    is_number = text.isascii() and text.isdigit() and len(text) <= _LARGEST_RANK_DIGITS
    if not is_number or int(text) == 0:
        raise SpecError(
            f"{shown(spec)}: powersgd needs the rank of its approximation, 1 or more, as in 'powersgd:4'"
        )
    return int(text)


def _not_a_string(spec: object) -> str:
    """The message for an object that is no spec."""
    kind = getattr(spec, "__name__", "") if isinstance(spec, type) else type(spec).__name__
    said = "a spec is a string such as 'int4', a codec or a Spec, not "
    if spec is None or isinstance(spec, bool):
        return f"{said}{kind}; write 'none' for no compression, 'int8' for the default"
    if isinstance(spec, type):
        return f"{said}the class {kind}; make one of it, such as gradq.Spec.parse('int4')"
    if isinstance(spec, int | float | torch.dtype):
        meant = suggestion(str(spec).removeprefix("torch."), codec_names())
        return f"{said}{kind}" + (f"; did you mean {meant!r}?" if meant else "")
    if isinstance(spec, list | tuple):
        return f"{said}{kind}; write the codecs of phase 1 and 2 as one string, 'int4+int8'"
    return f"{said}{kind}"
