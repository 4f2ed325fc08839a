"""Specs: what a user writes to say how gradients travel, such as "int4" or "int4+int8"."""

from __future__ import annotations

from dataclasses import dataclass

from gradq.codecs import Codec, from_spec
from gradq.errors import SpecError

__all__ = ["Spec"]


@dataclass(frozen=True)
class Spec:
    """One codec for the gradients and one for their means.

    Attributes:
        phase1: codec of phase 1; None means plain all-reduce (the spec "none").
        phase2: codec of phase 2; None leaves it to phase 1's codec: "int4" sends means in 8 bits, because
            their error is not averaged down.

    Example:
        >>> str(Spec.parse("int4")), str(Spec.parse("int4 + int8"))
        ('int4', 'int4+int8')
    """

    phase1: Codec | None
    phase2: Codec | None = None

    def __post_init__(self) -> None:
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
        parts = spec.split("+")
        if len(parts) > 2:
            raise SpecError(f"{spec!r}: a spec names one codec, or two as 'phase1+phase2'")
        return cls(*(from_spec(part) for part in parts))

    @property
    def is_none(self) -> bool:
        """Whether gradients are left to a plain all-reduce."""
        return self.phase1 is None

    def codecs(self, world_size: int | None = None) -> tuple[Codec, Codec]:
        """The codecs of both phases, for a number of ranks (None: unknown).

        Raises:
            SpecError: the spec is "none".
        """
        if self.phase1 is None:
            raise SpecError('the spec "none" has no codecs')
        if self.phase2 is not None:
            return self.phase1, self.phase2
        return self.phase1, self.phase1.default_phase2(world_size)

    def __str__(self) -> str:
        """The text that makes this spec again."""
        if self.phase1 is None:
            return "none"
        return str(self.phase1) if self.phase2 is None else f"{self.phase1}+{self.phase2}"
