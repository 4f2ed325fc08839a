"""Number formats: how many bits, which grid, who shares a scale, and when the range is known.

A format is written as a short string::

    <kind><bits>[-sym|-asym][-tensor|-channel|-g<size>][-batch|-token]

Examples: ``int8``, ``int4-g64``, ``int8-asym-channel``, ``int8-token``, ``nf4``, ``pot4``,
``codebook4-g128``, ``fp8``.

The kind ``int`` is the uniform affine grid ``x ≈ scale·(q − zero_point)``; ``nf``, ``pot`` and ``codebook``
are non-uniform tables of up to 16 entries **on the int8 grid**, so that they run at INT8 speed; ``fp8`` is
the float e4m3 (finite, largest value 448), for GPUs. What is left out takes the role's default: weights are
symmetric and per channel, activations asymmetric and per tensor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from gradq.errors import ConfigError, SpecError

__all__ = ["Format", "parse_format"]

KINDS = ("int", "nf", "pot", "codebook", "fp")
FLOAT8_MAX = 448  # of e4m3
GRANULARITIES = ("tensor", "channel", "group")
RANGES = ("static", "batch", "token")
_NON_UNIFORM_BITS = {"nf": (4, 4), "pot": (2, 4), "codebook": (2, 4), "fp": (8, 8)}


@dataclass(frozen=True, kw_only=True)
class Format:
    """One number format.

    Args:
        kind: ``int`` (uniform), ``nf`` (normal-float table), ``pot`` (powers of two) or ``codebook`` (fitted
            table), ``fp`` (e4m3).
        bits: 2 to 8 for ``int``; 8 for ``fp``; 4 for ``nf``; 2 to 4 for ``pot`` and ``codebook``.
        symmetric: zero point 0 and signed codes; otherwise unsigned codes with a zero point.
        granularity: who shares a scale: ``tensor``, ``channel`` (the first axis) or ``group``.
        group_size: elements that share a scale when the granularity is ``group``.
        range: ``static`` (calibrated), or found at inference for each ``batch`` or each ``token``.

    Raises:
        ConfigError: a value outside its legal range.
    """

    kind: str = "int"
    bits: int = 8
    symmetric: bool = True
    granularity: str = "tensor"
    group_size: int = 0
    range: str = "static"

    def __post_init__(self) -> None:
        """Check every field and every pair of fields that excludes another."""
        for name, value, legal in (
            ("kind", self.kind, KINDS),
            ("granularity", self.granularity, GRANULARITIES),
            ("range", self.range, RANGES),
        ):
            if value not in legal:
                raise ConfigError(f"Format.{name} is {value!r}; legal: {', '.join(legal)}")
        low, high = _NON_UNIFORM_BITS.get(self.kind, (2, 8))
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not low <= self.bits <= high:
            raise ConfigError(f"Format.bits is {self.bits!r}; legal for kind {self.kind!r}: {low} to {high}")
        if self.kind != "int" and not self.symmetric:
            raise ConfigError(f"Format.symmetric is False; kind {self.kind!r} has no zero point")
        if (self.granularity == "group") != (self.group_size > 0):
            raise ConfigError(
                f"Format.group_size is {self.group_size} with granularity {self.granularity!r}; "
                "give a size of at least 2 with 'group', and 0 otherwise"
            )
        if self.granularity == "group" and self.group_size < 2:
            raise ConfigError(f"Format.group_size is {self.group_size}; legal: 2 or more")
        if self.range != "static" and self.granularity != "tensor":
            raise ConfigError(
                f"Format.range {self.range!r} finds its own scales; granularity must be 'tensor', not "
                f"{self.granularity!r}"
            )
        if self.range != "static" and self.kind != "int":
            raise ConfigError(f"Format.range {self.range!r} needs kind 'int', not {self.kind!r}")

    @property
    def qmin(self) -> int:
        """Smallest code: on the int8 grid for tables, of e4m3 for ``fp``, of the integer otherwise."""
        if self.kind == "fp":
            return -FLOAT8_MAX
        if self.kind != "int":
            return -128
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        if self.kind == "fp":
            return FLOAT8_MAX
        if self.kind != "int":
            return 127
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def is_dynamic(self) -> bool:
        """True if the range is found at inference."""
        return self.range != "static"

    @property
    def is_uniform(self) -> bool:
        """True for the affine integer grid, False for tables and 8-bit floats."""
        return self.kind == "int"

    @property
    def is_float8(self) -> bool:
        """True for e4m3."""
        return self.kind == "fp"

    def with_bits(self, bits: int) -> Format:
        """The same format with another width.

        Raises:
            ConfigError: `bits` is not legal for this kind.
        """
        return replace(self, bits=bits)

    def __str__(self) -> str:
        """The full spec; `parse_format` reads it back to an equal format under any role."""
        parts = [f"{self.kind}{self.bits}"]
        if self.kind == "int":
            parts.append("sym" if self.symmetric else "asym")
        parts.append(f"g{self.group_size}" if self.granularity == "group" else self.granularity)
        if self.range != "static":
            parts.append(self.range)
        return "-".join(parts)


def parse_format(spec: str | Format, role: str) -> Format:
    """Read a format string.

    Args:
        spec: e.g. ``"int4-g64"``; a `Format` is passed through.
        role: ``"weights"`` (defaults: symmetric, per channel) or ``"activations"`` (asymmetric, per tensor).

    Returns:
        The format.

    Raises:
        SpecError: the string does not follow the grammar; the message shows it.
        ConfigError: it does, but a value is out of range.
    """
    if role not in ("weights", "activations"):
        raise ConfigError(f"role is {role!r}; legal: weights, activations")
    if isinstance(spec, Format):
        return spec
    match = (
        re.fullmatch(r"(u?int|nf|pot|codebook|fp)(\d+)((?:-\w+)*)", spec) if isinstance(spec, str) else None
    )
    if match is None:
        raise SpecError(
            f"cannot read the {role} format {spec!r}; write "
            "<int|nf|pot|codebook|fp><bits>[-sym|-asym][-tensor|-channel|-g<size>][-batch|-token], e.g. "
            "'int4-g64'"
        )
    kind, bits, tail = match.group(1), int(match.group(2)), match.group(3)
    symmetric = role == "weights" or kind in _NON_UNIFORM_BITS
    if kind == "uint":
        kind, symmetric = "int", False
    granularity, group_size, when = ("channel" if role == "weights" else "tensor"), 0, "static"
    for part in filter(None, tail.split("-")):
        if part in ("sym", "asym"):
            symmetric = part == "sym"
        elif part in ("tensor", "channel"):
            granularity = part
        elif part in ("batch", "token"):
            when = part
        elif re.fullmatch(r"g\d+", part):
            granularity, group_size = "group", int(part[1:])
        else:
            raise SpecError(
                f"unknown part {part!r} in the {role} format {spec!r}; "
                "legal: sym, asym, tensor, channel, g<size>, batch, token"
            )
    if role == "weights" and when != "static":
        raise SpecError(f"the weights format {spec!r} is dynamic; weights are known, leave out '-{when}'")
    if role == "activations" and granularity != "tensor":
        raise SpecError(
            f"the activations format {spec!r} is per {granularity}; integer kernels need one scale per "
            "tensor "
            "('-tensor') or per token ('-token')"
        )
    if role == "activations" and kind not in ("int", "fp"):
        raise SpecError(f"the activations format {spec!r} is a table; activations are uniform, or fp8")
    return Format(
        kind=kind, bits=bits, symmetric=symmetric, granularity=granularity, group_size=group_size, range=when
    )
