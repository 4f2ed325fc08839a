"""What a kernel backend offers, and which one serves a device.

A backend is a module with the functions of `Kernels`; `reference` (plain torch) is the truth, `cpu` (Numba)
equals it byte for byte. Segments are 1-D and contiguous: x, out and residuals are fp32 [n] (`exact_*`: fp32
or fp64), payload is uint8 [nbytes], payloads is uint8 [W, nbytes] with contiguous rows.
"""

from __future__ import annotations

import importlib
import os
from typing import Protocol, cast

import torch
from torch import Tensor

from gradq.errors import KernelError

__all__ = ["Kernels", "backend_name", "kernels_for"]

_MODULES = {"reference": "gradq.kernels.reference", "numba": "gradq.kernels.cpu"}


class Kernels(Protocol):
    """The operations of a backend; `gradq.kernels.reference` documents the format they write."""

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


def backend_name(device: torch.device) -> str:
    """The backend that serves a device; the environment variable GRADQ_KERNELS overrides it.

    Raises:
        KernelError: no backend for the device, or GRADQ_KERNELS names an unknown one.
    """
    chosen = os.environ.get("GRADQ_KERNELS", "")
    if chosen and chosen not in _MODULES:
        raise KernelError(f"GRADQ_KERNELS={chosen!r} is not a kernel backend; choose from {sorted(_MODULES)}")
    if device.type != "cpu":
        raise KernelError(f"gradq has no kernels for {device.type} tensors yet; it runs on CPU tensors")
    return chosen or "numba"


def kernels_for(device: torch.device) -> Kernels:
    """The kernels that serve a device.

    Raises:
        KernelError: as `backend_name`, or the backend's package is missing.
    """
    name = backend_name(device)
    try:
        return cast(Kernels, importlib.import_module(_MODULES[name]))
    except ImportError as error:
        raise KernelError(
            f"the {name!r} kernels cannot be imported ({error}); install them with `pip install numba` "
            "or set GRADQ_KERNELS=reference to run the slow plain-torch ones"
        ) from error
