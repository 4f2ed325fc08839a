"""Uniform: the parameters and sizes that its kernels share; for the format on the wire see `reference`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradq.codecs.base import Kernels
from gradq.kernels.loader import Backends

__all__ = ["BACKENDS", "UniformFormat"]


@dataclass(frozen=True)
class UniformFormat:
    """Uniform levels around zero.

    Attributes:
        num_bits: bits of a code, 2 to 8.
        block_size: number of elements that share a scale, a multiple of 8.
        scale_dtype: torch.float32, torch.bfloat16 or torch.float16.
        stochastic: whether codes are rounded at random, or to the nearest; decoding does not depend on it.
    """

    num_bits: int
    block_size: int
    scale_dtype: torch.dtype
    stochastic: bool = True

    @property
    def qmax(self) -> int:
        """The largest level."""
        return (1 << (self.num_bits - 1)) - 1

    def scale_bytes(self, numel: int) -> int:
        """Bytes of the scales, after which the codes start."""
        return -(-numel // self.block_size) * self.scale_dtype.itemsize

    def nbytes(self, numel: int) -> int:
        """Scales, then codes; the last block is padded to a multiple of 8 elements."""
        return -(-numel // self.block_size) * self.scale_dtype.itemsize + -(-numel // 8) * self.num_bits


BACKENDS: Backends[Kernels[UniformFormat]] = Backends(
    "gradq.codecs.uniform", "the uniform codecs", ("reference", "numba", "triton")
)
