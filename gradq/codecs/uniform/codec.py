"""Uniform: 2 to 8 bits an element, one scale a block, stochastic or nearest rounding.

With s = absmax(block) / qmax and qmax = 2**(num_bits - 1) - 1::

    Q(x) = s * clamp(floor(x / s + u), -qmax, qmax)        u ~ U[0, 1) stochastic, u = 1/2 nearest

References:
    Alistarh et al., "QSGD: Communication-efficient SGD via gradient quantization and encoding", NeurIPS 2017
    (stochastic rounding of blocks; here with the max norm). Seide et al., "1-bit SGD", Interspeech 2014, and
    Karimireddy et al., "Error feedback fixes SignSGD", ICML 2019 (error feedback).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch

from gradq.codecs.base import KernelCodec, Kernels
from gradq.codecs.phase2 import phase2_bits
from gradq.codecs.uniform.format import BACKENDS, UniformFormat
from gradq.errors import ConfigError
from gradq.kernels.loader import Backends

__all__ = ["UniformCodec"]

_SCALE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ROUNDINGS = ("auto", "stochastic", "nearest")


@dataclass(frozen=True, kw_only=True)
class UniformCodec(KernelCodec):
    """Uniform levels around zero.

    Scales are rounded up, so the largest element of a block can decode to a little more than it was (2**-8 of
    it with bf16 scales); within that of the maximum of fp16 or bf16 the cast back to those dtypes gives Inf.

    Attributes:
        num_bits: 2 to 8, packed tight.
        block_size: elements that share a scale: 64 to 1024, a multiple of 64. "int3" has 64: with 256 a GPT
            misses bf16's loss by 1.7 %, with 64, for a fifth of a bit, by 0.4 % (docs/bits.md).
        rounding: "stochastic" (unbiased), "nearest" (contractive, less error), or "auto": nearest with error
            feedback, stochastic without.
        scale_dtype: "bf16", "fp16" or "fp32". fp16 spends its
            bits on precision that the error does not need; a block above 65504 * qmax becomes NaN in it.

    Example:
        >>> UniformCodec(num_bits=4).wire_bits_per_element(1 << 20)
        4.0625
    """

    backends: ClassVar[Backends[Kernels[Any]]] = BACKENDS

    num_bits: int = 8
    block_size: int = 256  # a field serves as the contract's property
    rounding: str = "auto"
    scale_dtype: str = "bf16"

    def __post_init__(self) -> None:
        if not (isinstance(self.num_bits, int) and 2 <= self.num_bits <= 8):
            raise ConfigError(
                f"UniformCodec(num_bits={self.num_bits!r}): num_bits must be an integer from 2 to 8"
            )
        if not (isinstance(self.block_size, int) and self.block_size in range(64, 1025, 64)):
            raise ConfigError(
                f"UniformCodec(block_size={self.block_size!r}): block_size takes 64, 128, ... 1024"
            )
        if self.rounding not in _ROUNDINGS:
            raise ConfigError(
                f"UniformCodec(rounding={self.rounding!r}): rounding must be one of {_ROUNDINGS}"
            )
        if self.scale_dtype not in _SCALE_DTYPES:
            raise ConfigError(
                f"UniformCodec(scale_dtype={self.scale_dtype!r}): choose one of {', '.join(_SCALE_DTYPES)}"
            )

    @property
    def name(self) -> str:
        """The name "int" and the number of bits."""
        return f"int{self.num_bits}"

    @property
    def unbiased(self) -> bool:
        """Stochastic rounding is; nearest is not."""
        return self.rounding != "nearest"

    @property
    def contractive(self) -> bool:
        """Nearest always is: it keeps the largest element and enlarges no error.

        Stochastic rounding errs by at most s²/4 an element in variance, so it is contractive for every x only
        while block_size < 4 qmax², and never with fp16 scales, which cannot be small enough for small blocks.
        """
        qmax = (1 << (self.num_bits - 1)) - 1
        stochastic_is = self.block_size < 4 * qmax * qmax and self.scale_dtype != "fp16"
        return self.rounding == "nearest" or stochastic_is

    @property
    def wants_feedback(self) -> bool:
        """At 4 bits and below."""
        return self.num_bits <= 4

    def for_feedback(self, feedback: bool) -> UniformCodec:
        """Decide rounding="auto"."""
        if self.rounding != "auto":
            return self
        return replace(self, rounding="nearest" if feedback else "stochastic")

    def default_phase2(self, world_size: int | None = None) -> UniformCodec:
        """6 or 8 bits: the error of the mean is seen whole by every rank. See `gradq.codecs.phase2`."""
        return replace(self, num_bits=phase2_bits(self.num_bits, world_size))

    @cached_property
    def form(self) -> UniformFormat:
        """See `KernelCodec.form`. rounding="auto" that was not decided is stochastic."""
        stochastic = self.rounding != "nearest"
        return UniformFormat(self.num_bits, self.block_size, _SCALE_DTYPES[self.scale_dtype], stochastic)

    @classmethod
    def from_name(cls, name: str) -> UniformCodec:
        """The codec for "int2" ... "int8"; "int3" has blocks of 64."""
        num_bits = int(name.removeprefix("int"))
        return cls(num_bits=num_bits, block_size=64 if num_bits == 3 else 256)
