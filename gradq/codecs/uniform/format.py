"""The operations of the uniform and the exact codecs, and the backend that serves a device.

Segments are 1-D and contiguous: x, out and residuals are fp32 [n] (`exact_*`: fp32 or fp64), payload is uint8
[nbytes], payloads is uint8 [W, nbytes] with contiguous rows.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from gradq.kernels.loader import backend_for

__all__ = ["Kernels", "kernels_for"]

_MODULES = {
    "reference": "gradq.codecs.uniform.reference",
    "numba": "gradq.codecs.uniform.cpu",
    "triton": "gradq.codecs.exact.cuda",
}


class Kernels(Protocol):
    """The operations of a backend; `gradq.codecs.uniform.reference` documents the format they write."""

    def warm_up(self) -> None:
        """Compile whatever is compiled on first use, so that the first training step does not."""

    def exact_encode(self, x: Tensor, payload: Tensor, *, wire_dtype: torch.dtype) -> None:
        """Write x to payload in wire_dtype."""

    def exact_decode(self, payload: Tensor, out: Tensor, *, wire_dtype: torch.dtype) -> None:
        """Read a payload of `exact_encode` into out."""

    def exact_decode_mean(self, payloads: Tensor, out: Tensor, *, wire_dtype: torch.dtype) -> None:
        """Mean over the W payloads into out."""

    def uniform_encode(
        self,
        x: Tensor,
        payload: Tensor,
        *,
        num_bits: int,
        block_size: int,
        scale_dtype: torch.dtype,
        stochastic: bool,
        key: int,
        shift: int,
        first_block: int,
        residual: Tensor | None,
        new_residual: Tensor | None,
        loss_scale: float,
    ) -> None:
        """Encode x + loss_scale * residual and write what was lost, / loss_scale, to new_residual."""

    def uniform_decode(
        self, payload: Tensor, out: Tensor, *, num_bits: int, block_size: int, scale_dtype: torch.dtype
    ) -> None:
        """Decode a payload of `uniform_encode` into out."""

    def uniform_decode_mean(
        self, payloads: Tensor, out: Tensor, *, num_bits: int, block_size: int, scale_dtype: torch.dtype
    ) -> None:
        """Mean over the W decoded payloads into out."""


def kernels_for(device: torch.device) -> Kernels:
    """The kernels that serve a device.

    Raises:
        KernelError: as `backend_for`.
    """
    return cast(Kernels, backend_for(device, _MODULES, "uniform and exact codecs"))
