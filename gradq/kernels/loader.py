"""Which kernel backend serves a device.

Every algorithm has a folder with a module for each backend: `reference` (plain torch) is the truth; `cpu`
(Numba) and, where there is one, `cuda` (Triton) equal it byte for byte. Its `format.py` names the folder in a
`Backends`.
"""

from __future__ import annotations

import importlib
import os
from typing import Generic, TypeVar, cast

import torch

from gradq.errors import KernelError

__all__ = ["Backends", "backend_name"]

_K = TypeVar("_K")
_MODULES = {"reference": "reference", "numba": "cpu", "triton": "cuda"}
_INSTALL = {"reference": "torch", "numba": "numba", "triton": "gradq[gpu]"}


def backend_name(device: torch.device) -> str:
    """The backend that serves a device; the environment variable GRADQ_KERNELS overrides it for CPU tensors.

    Raises:
        KernelError: no backend for the device, GRADQ_KERNELS names an unknown one or one that does not serve
            the device.
    """
    chosen = os.environ.get("GRADQ_KERNELS", "")
    if chosen and chosen not in _INSTALL:
        raise KernelError(f"GRADQ_KERNELS={chosen!r} is not a kernel backend; choose from {sorted(_INSTALL)}")
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


class Backends(Generic[_K]):
    """The kernels of one algorithm.

    Args:
        package: dotted name of the folder with the modules `reference`, `cpu` and perhaps `cuda`.
        what: what the kernels are for, as error messages say it.
        names: the backends that there are.
    """

    def __init__(self, package: str, what: str, names: tuple[str, ...] = ("reference", "numba")) -> None:
        self.what = what
        self._found_in = {name: f"{package}.{_MODULES[name]}" for name in names}

    def on(self, device: torch.device) -> _K:
        """The module that serves tensors on a device.

        Raises:
            KernelError: as `backend_name`; this algorithm does not have the backend; or the backend's package
                is missing.
        """
        name = backend_name(device)
        if name not in self._found_in:
            raise KernelError(
                f"gradq has no {name} kernels for {self.what}, so it cannot be used with {device.type} "
                "tensors; choose a codec that has: int2 to int8, rot3 to rot6, rot1(levels=scalar), "
                "rot2(levels=scalar), fp32, bf16, fp16, fp64"
            )
        try:
            return cast(_K, importlib.import_module(self._found_in[name]))
        except ImportError as error:
            slow = (
                "" if name == "triton" else " or set GRADQ_KERNELS=reference to run the slow plain-torch ones"
            )
            raise KernelError(
                f"the {name!r} kernels cannot be imported ({error}); install them with "
                f"`pip install '{_INSTALL[name]}'`{slow if name == 'numba' else ''}"
            ) from error
