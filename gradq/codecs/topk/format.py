"""Top-k: the parameters and sizes that its kernels share; for the format on the wire see `reference`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradq.codecs.base import Kernels
from gradq.kernels.loader import Backends

__all__ = ["BACKENDS", "SCALE_BYTES", "Block", "TopKFormat"]

SCALE_BYTES = 2  # bf16


@dataclass(frozen=True)
class TopKFormat:
    """How much is kept.

    Attributes:
        percent: share of the elements of a block, rounded up.
        num_bits: bits of a kept element's code.
        block_size: number of elements to choose from, which share a scale.
    """

    percent: float
    num_bits: int
    block_size: int

    def block(self, length: int) -> Block:
        """The shape of a block of some elements."""
        kept = max(1, math.ceil(length * self.percent / 100 - 1e-6))
        low_bits = (length // kept).bit_length() - 1
        return Block(length, kept, self.num_bits, low_bits)

    def nbytes(self, numel: int) -> int:
        """Scales, then blocks; the last may be shorter and keeps fewer."""
        whole, rest = divmod(numel, self.block_size)
        nbytes = whole * (SCALE_BYTES + self.block(self.block_size).nbytes)
        return nbytes + (SCALE_BYTES + self.block(rest).nbytes if rest else 0)


@dataclass(frozen=True)
class Block:
    """What a block of `length` elements looks like on the wire.

    Attributes:
        length: elements.
        kept: how many of them are sent.
        num_bits: bits of a code.
        low_bits: bits of an index that are sent as they are, the lowest ones; the others are sent in unary.
    """

    length: int
    kept: int
    num_bits: int
    low_bits: int

    @property
    def padded(self) -> int:
        """Codes, with those that fill the last bytes."""
        return -(-self.kept // 8) * 8

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes."""
        return self.padded * self.num_bits // 8

    @property
    def high_bytes(self) -> int:
        """Bytes of the indices' high parts: a one for each, and a zero for each step."""
        return -(-(self.kept + ((self.length - 1) >> self.low_bits)) // 8)

    @property
    def low_bytes(self) -> int:
        """Bytes of the indices' low parts."""
        return -(-self.kept * self.low_bits // 8)

    @property
    def nbytes(self) -> int:
        """Bytes without the scale."""
        return self.code_bytes + self.high_bytes + self.low_bytes


BACKENDS: Backends[Kernels[TopKFormat]] = Backends("gradq.codecs.topk", "the codec topk")
