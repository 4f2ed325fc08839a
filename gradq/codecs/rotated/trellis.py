"""Trellis: the rotated codec with levels chosen along a path instead of one by one.

Each column of a rotated tile is coded by a trellis of four states: a code chooses among half of twice as many
levels, and which half depends on the codes before it. The encoder finds the best path (Viterbi), which is
slower; the decoder only looks at two more bits, and the payload has the size of `rotated`. About 30 % less
error than `rotated` at 4 bits.

References:
    Marcellin and Fischer, "Trellis coded quantization of memoryless and Gauss-Markov sources", IEEE Trans.
    Communications, 1990.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradq.codecs.rotated.codec import RotatedCodec

__all__ = ["TrellisCodec"]


@dataclass(frozen=True, kw_only=True)
class TrellisCodec(RotatedCodec):
    """`RotatedCodec` with levels="trellis", 1 to 4 bits."""

    _most_bits: ClassVar[int] = 4

    levels: str = "trellis"

    @property
    def name(self) -> str:
        """The name "trellis" and the number of bits."""
        return f"trellis{self.num_bits}"

    @classmethod
    def from_name(cls, name: str) -> TrellisCodec:
        """The codec for "trellis1" ... "trellis4"."""
        return cls(num_bits=int(name.removeprefix("trellis")))
