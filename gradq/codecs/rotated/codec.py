"""Rotated: 1 to 6 bits an element after a randomized Hadamard rotation, levels of Lloyd and Max.

A rotation makes any block look Gaussian, so one table of levels is right for every layer and every step, and
one large element no longer costs the others their precision. With z the rotated block and c the levels
nearest to z / σ::

    Q(x) = rotate back(s * c)        s = ‖z‖² / ⟨c, z⟩ (unbiased)  or  ⟨c, z⟩ / ‖c‖² (least squares)

Every rank rotates in its own way, by signs that follow from 32 bits in the payload. With one rotation for all
the errors of the ranks would be alike where their gradients are: in the mean of 64 real gradients 2.5 times
as much at 2 bits (benchmarks/results/rotations.csv).

References:
    Suresh et al., "Distributed mean estimation with limited communication", ICML 2017 (rotation).
    Vargaftik et al., "EDEN: Communication-efficient and robust distributed mean estimation for federated
    learning", ICML 2022 (Lloyd-Max levels and the unbiased scale).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from gradq.codecs.base import Codec, KernelCodec, Kernels
from gradq.codecs.phase2 import phase2_bits
from gradq.codecs.rotated.format import BACKENDS, TILE, RotatedFormat
from gradq.codecs.uniform.codec import UniformCodec
from gradq.errors import ConfigError
from gradq.kernels.loader import Backends

__all__ = ["RotatedCodec"]

_SCALES = ("auto", "unbiased", "mse")
_LEVELS = ("auto", "scalar", "trellis")
_MOST_TRELLIS_BITS = 4


@dataclass(frozen=True, kw_only=True)
class RotatedCodec(KernelCodec):
    """Rotate tiles of 4096 elements in columns of 256, round to the nearest level.

    Attributes:
        num_bits: 1 to 6.
        scale: "unbiased" (over rotations), "mse" (least squares: contractive, less error), or "auto": mse
            with error feedback, unbiased without.
        levels: "scalar" (each number by itself), "trellis" (a path through twice as many levels, of which
            each code may take half: a third less error at 3 and 4 bits, four times the time to encode, no
            CUDA kernels; see `gradq.codecs.rotated.reference_trellis`), or "auto": trellis for 1 and 2 bits.

    Example:
        >>> RotatedCodec(num_bits=4).wire_bits_per_element(1 << 20)
        4.062530517578125
    """

    backends: ClassVar[Backends[Kernels[Any]]] = BACKENDS

    num_bits: int = 4
    scale: str = "auto"
    levels: str = "auto"

    def __post_init__(self) -> None:
        if not (isinstance(self.num_bits, int) and 1 <= self.num_bits <= 6):
            raise ConfigError(
                f"RotatedCodec(num_bits={self.num_bits!r}): num_bits must be an integer from 1 to 6"
            )
        if self.scale not in _SCALES:
            raise ConfigError(f"RotatedCodec(scale={self.scale!r}): scale must be one of {_SCALES}")
        if self.levels not in _LEVELS:
            raise ConfigError(f"RotatedCodec(levels={self.levels!r}): levels must be one of {_LEVELS}")
        if self.trellis and self.num_bits > _MOST_TRELLIS_BITS:
            raise ConfigError(
                f"RotatedCodec(num_bits={self.num_bits}): a trellis takes at most {_MOST_TRELLIS_BITS} bits"
            )

    @property
    def name(self) -> str:
        """The name "rot" and the number of bits."""
        return f"rot{self.num_bits}"

    @property
    def trellis(self) -> bool:
        """Whether codes are chosen by a trellis."""
        return self.levels == "trellis" or (self.levels == "auto" and self.num_bits <= 2)

    @property
    def block_size(self) -> int:
        """A tile: 4096 elements."""
        return TILE

    @property
    def unbiased(self) -> bool:
        """With the unbiased scale: exactly over uniformly random rotations, nearly so over random signs."""
        return self.scale != "mse"

    @property
    def contractive(self) -> bool:
        """With the least-squares scale always: the error is ‖z‖² - ⟨c, z⟩² / ‖c‖².

        The unbiased scale errs by ‖z‖² (‖z‖² ‖c‖² / ⟨c, z⟩² - 1), more than ‖z‖² for some
        blocks at few bits.
        """
        return self.scale == "mse"

    @property
    def wants_feedback(self) -> bool:
        """Only with the least-squares scale, whose error is a bias.

        Error feedback through a rotation hurts: it spreads what loud elements lost over the quiet ones of a
        tile, step after step, and Adam divides by it. On the example's GPT the unbiased scale alone learns
        better at 1, 2 and 3 bits and as well at 4 (docs/bits.md).
        """
        return self.scale == "mse"

    def for_feedback(self, feedback: bool) -> RotatedCodec:
        """Decide scale="auto"."""
        return self if self.scale != "auto" else replace(self, scale="mse" if feedback else "unbiased")

    def default_phase2(self, world_size: int | None = None) -> Codec:
        """Uniform with 6 or 8 bits: the error of the mean is seen whole. See `gradq.codecs.phase2`."""
        return UniformCodec(num_bits=phase2_bits(self.num_bits + 1, world_size))

    @cached_property
    def form(self) -> RotatedFormat:
        """See `KernelCodec.form`. scale="auto" that was not decided is unbiased."""
        return RotatedFormat(self.num_bits, self.trellis, self.scale != "mse")

    @classmethod
    def from_name(cls, name: str) -> RotatedCodec:
        """The codec for "rot1" ... "rot6"."""
        return cls(num_bits=int(name.removeprefix("rot")))
