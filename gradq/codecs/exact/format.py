"""Exact: the parameters and sizes that its kernels share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradq.codecs.base import Kernels
from gradq.kernels.loader import Backends

__all__ = ["BACKENDS", "ExactFormat"]


@dataclass(frozen=True)
class ExactFormat:
    """The elements themselves, little-endian, in a float dtype.

    Attributes:
        wire_dtype: the dtype on the wire.
    """

    wire_dtype: torch.dtype

    def nbytes(self, numel: int) -> int:
        """The elements, one after another."""
        return numel * self.wire_dtype.itemsize


BACKENDS: Backends[Kernels[ExactFormat]] = Backends(
    "gradq.codecs.exact", "the exact codecs", ("reference", "numba", "triton")
)
