"""Top-k: only the largest elements of a block are sent, in few bits; the rest waits in the residual.

Of every 4096 elements the 41 largest in magnitude (1 %) travel as a 4-bit code of a shared scale and an index
in 8.6 bits: 0.13 bits an element in all. Measured on gradients of the example GPT, at 1 %:

    block 1024, fp16 values, plain indices     0.254 bits   NMSE .772
    block 4096, fp16 values, plain indices     0.280        .513
    block 4096, fp16 values, Elias-Fano        0.246        .513
    block 4096, 8-bit values, Elias-Fano       0.170        .513
    block 4096, 4-bit values, Elias-Fano       0.130        .515     chosen
    block 4096, 3-bit magnitudes from the smallest kept to the largest, Elias-Fano    0.134  .513

What is not sent would be lost without error feedback, so top-k needs it. It is contractive, barely: what is
kept leaves the error smaller than the whole by at least part of the largest element, 1/4096 of it at worst.

References:
    Stich, Cordonnier, Jaggi, "Sparsified SGD with memory", NeurIPS 2018. Lin et al., "Deep gradient
    compression", ICLR 2018. Indices: Elias 1974, Fano 1971; Vigna, "Quasi-succinct indices", WSDM 2013.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from gradq.codecs.base import KernelCodec, Kernels
from gradq.codecs.topk.format import BACKENDS, TopKFormat
from gradq.errors import ConfigError
from gradq.kernels.loader import Backends

__all__ = ["TopKCodec"]


@dataclass(frozen=True, kw_only=True)
class TopKCodec(KernelCodec):
    """The largest magnitudes of each block, rounded to the nearest level.

    Attributes:
        percent: share of the elements of a block that is kept, rounded up: 0.01 to 50 per cent.
        num_bits: bits of a kept element: 2 to 8.
        block_size: number of elements to choose from, which share a scale: a power of two from 256 to 65536.

    Example:
        >>> round(TopKCodec(percent=1.0).wire_bits_per_element(1 << 20), 3)
        0.137
    """

    backends: ClassVar[Backends[Kernels[Any]]] = BACKENDS

    percent: float = 1.0
    num_bits: int = 4
    block_size: int = 4096  # a field serves as the contract's property

    def __post_init__(self) -> None:
        if not 0.01 <= self.percent <= 50:
            raise ConfigError(f"TopKCodec(percent={self.percent!r}): percent is between 0.01 and 50")
        if not (isinstance(self.num_bits, int) and 2 <= self.num_bits <= 8):
            raise ConfigError(
                f"TopKCodec(num_bits={self.num_bits!r}): num_bits must be an integer from 2 to 8"
            )
        if self.block_size not in [1 << power for power in range(8, 17)]:
            raise ConfigError(
                f"TopKCodec(block_size={self.block_size!r}): block_size takes 256, 512, ... 65536"
            )

    @property
    def name(self) -> str:
        """The name "topk"; how many per cent is an option."""
        return "topk"

    @property
    def unbiased(self) -> bool:
        """False: what is small is never sent."""
        return False

    @property
    def contractive(self) -> bool:
        """True: the largest element of a block loses at most half a step, and no error grows."""
        return True

    @property
    def needs_feedback(self) -> bool:
        """True: what is small would never be sent."""
        return True

    @property
    def wants_feedback(self) -> bool:
        """Always."""
        return True

    def default_phase2(self, world_size: int | None = None) -> TopKCodec:
        """Twice as many: more is left of a mean than of each gradient, and its error is not averaged down."""
        return replace(self, percent=min(2 * self.percent, 50))

    @property
    def collective(self) -> str:
        """The collective `sparse`."""
        return "sparse"

    @cached_property
    def form(self) -> TopKFormat:
        """See `KernelCodec.form`."""
        return TopKFormat(self.percent, self.num_bits, self.block_size)

    @classmethod
    def from_name(cls, name: str) -> TopKCodec:
        """The codec for "topk"."""
        return cls()
