"""Specs: what a user writes to say how gradients travel, such as "int4", "int4+int8" or "powersgd:4+int8"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gradq.codecs import Codec, from_spec
from gradq.errors import ConfigError, SpecError

__all__ = ["Spec"]

_LOW_RANK = re.compile(r"\s*powersgd\s*(?::(?P<rank>.*))?")


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
        if type(self.low_rank) is not int or self.low_rank < 0:
            raise ConfigError(
                f"Spec(low_rank={self.low_rank!r}): the rank is an integer, 1 or more; 0 for none"
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
            raise SpecError(
                f"a spec is a string such as 'int4', a codec or a Spec, not {type(spec).__name__}"
            )
        if spec.strip() == "none":
            return cls(None)
        first, *rest = parts = spec.split("+")
        low_rank = 0
        if (match := _LOW_RANK.fullmatch(first)) is not None:
            low_rank, parts = _rank(match["rank"], spec), rest
        if any(_LOW_RANK.fullmatch(part) for part in parts):
            raise SpecError(
                f"{spec!r}: powersgd is not a codec and cannot carry means; write it first, and after it the "
                "codec of what is no matrix, as in 'powersgd:4+int8'"
            )
        if len(parts) > 2:
            raise SpecError(f"{spec!r}: a spec names one codec, or two as 'phase1+phase2'")
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


def _rank(text: str | None, spec: str) -> int:
    rank = (text or "").strip()
    if not (rank.isascii() and rank.isdigit() and int(rank) > 0):
        raise SpecError(
            f"{spec!r}: powersgd needs the rank of its approximation, 1 or more, as in 'powersgd:4'"
        )
    return int(rank)
