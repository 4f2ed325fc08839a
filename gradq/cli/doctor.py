"""`gradq doctor`: what this machine has, what gradq can do with it, and what to install for the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import rich.console
import rich.table
import torch
import torch.distributed as dist

from gradq import codecs
from gradq.bench.records import cpu_name
from gradq.errors import GradqError
from gradq.kernels.ops import backend_name, kernels_for

__all__ = ["doctor"]

_EXTRAS = {
    "ray": ("ray", "gradq bench --cluster"),
    "mpi4py": ("mpi", "training under mpiexec"),
    "triton": ("gpu", "kernels for CUDA tensors"),
    "onnx": ("export", "ONNX export"),
    "onnxruntime": ("export", "INT8 inference"),
    "onnxscript": ("export", "ONNX export"),
    "matplotlib": ("plot", "plots"),
    "fastapi": ("serve", "the serving example"),
}


def doctor() -> None:
    """Show what this machine has, what gradq can do with it and what to install for the rest."""
    table = rich.table.Table("", "here", "what to do", box=None, header_style="bold")
    table.add_row("processor", f"{cpu_name()}, {os.cpu_count()} cores", "")
    table.add_row(
        "system", f"{platform.system()} {platform.release()}, Python {platform.python_version()}", ""
    )
    for package in ("gradq", "torch", "numpy", "numba"):
        table.add_row(package, _version(package) or "missing", "")
    table.add_row("CPU kernels", *_cpu_kernels())
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    table.add_row("GPUs", str(gpus), "")
    backends = [name for name in ("gloo", "nccl", "mpi") if dist.is_backend_available(name)]
    table.add_row("process groups", ", ".join(backends) if dist.is_available() else "none", "")
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    advice = "" if interface else "set GLOO_SOCKET_IFNAME if ranks cannot reach each other"
    table.add_row("Gloo's interface", interface or "chosen by the host name", advice)
    for package, (extra, use) in _EXTRAS.items():
        found = _version(package)
        table.add_row(
            package, found or "missing", "" if found else f"for {use}: pip install 'gradq[{extra}]'"
        )
    table.add_row("codecs", ", ".join(codecs.names()), "")
    rich.console.Console().print(table)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_kernels() -> tuple[str, str]:
    try:
        kernels_for(torch.device("cpu"))
    except GradqError as error:
        return "missing", str(error)
    return backend_name(torch.device("cpu")), ""
