"""What a kernel backend offers, and which one serves a device.

A backend is a module with the functions of `Kernels`; `reference` (plain torch) is the truth, `cpu` (Numba)
and `cuda` (Triton) equal it byte for byte. Segments are 1-D and contiguous: x, out and residuals are fp32 [n]
(`exact_*`: fp32 or fp64), payload is uint8 [nbytes], payloads is uint8 [W, nbytes] with contiguous rows.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Protocol, cast

import torch
from torch import Tensor

from gradq.errors import KernelError

__all__ = ["Kernels", "backend_for", "backend_name", "kernels_for"]

_MODULES = {
    "reference": "gradq.kernels.reference",
    "numba": "gradq.kernels.cpu",
    "triton": "gradq.kernels.cuda",
}
_INSTALL = {"reference": "torch", "numba": "numba", "triton": "gradq[gpu]"}


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
    """The backend that serves a device; the environment variable GRADQ_KERNELS overrides it for CPU tensors.

    Raises:
        KernelError: no backend for the device, GRADQ_KERNELS names an unknown one or one that does not serve
            the device.
    """
    chosen = os.environ.get("GRADQ_KERNELS", "")
    if chosen and chosen not in _MODULES:
        raise KernelError(f"GRADQ_KERNELS={chosen!r} is not a kernel backend; choose from {sorted(_MODULES)}")
    if device.type == "cuda":
        if chosen not in ("", "triton"):
            raise KernelError(
                f"GRADQ_KERNELS={chosen!r} serves CPU tensors, and this one is on {device}; unset it"
            )
        return "triton"
    if device.type != "cpu":
        raise KernelError(f"gradq has no kernels for {device.type} tensors; it runs on CPU and CUDA tensors")
    if chosen == "triton" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise KernelError(
            "GRADQ_KERNELS='triton' serves CUDA tensors; for CPU tensors it needs Triton's interpreter "
            "(slow, for tests): start Python with TRITON_INTERPRET=1, or unset GRADQ_KERNELS"
        )
    return chosen or "numba"


def backend_for(device: torch.device, modules: Mapping[str, str], what: str) -> object:
    """The module that serves a device.

    Args:
        device: of the tensors.
        modules: names of modules by backend.
        what: the modules are for, for error messages.

    Raises:
        KernelError: as `backend_name`; the backend does not have it; or the backend's package is missing.
    """
    name = backend_name(device)
    if name not in modules:
        raise KernelError(
            f"gradq has no {name} kernels for {what}, so it cannot be used with {device.type} tensors; "
            "choose a codec that has: int2 to int8, rot3 to rot6, rot1(levels=scalar), rot2(levels=scalar), "
            "fp32, bf16, fp16, fp64"
        )
    try:
        return importlib.import_module(modules[name])
    except ImportError as error:
        hint = "" if name == "triton" else " or set GRADQ_KERNELS=reference to run the slow plain-torch ones"
        raise KernelError(
            f"the {name!r} kernels cannot be imported ({error}); install them with "
            f"`pip install '{_INSTALL[name]}'`{hint}"
        ) from error


def kernels_for(device: torch.device) -> Kernels:
    """The kernels that serve a device.

    Raises:
        KernelError: as `backend_for`.
    """
    return cast(Kernels, backend_for(device, _MODULES, "uniform and exact codecs"))
