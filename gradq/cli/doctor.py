"""`gradq doctor`: what this machine has, what gradq can do with it, and what to install for the rest.

It needs no extra: it prints plain text, for it is what people call when an extra is missing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Sequence

import torch
import torch.distributed as dist

import gradq
from gradq import codecs
from gradq.bench.records import cpu_name
from gradq.codecs.uniform.format import BACKENDS
from gradq.errors import GradqError
from gradq.kernels.loader import backend_name

__all__ = ["doctor"]

# package → the extra that brings it, and what it is for
_EXTRAS = {
    "typer": ("cli", "the command gradq"),
    "rich": ("cli", "the command gradq"),
    **({} if sys.version_info >= (3, 11) else {"tomli": ("cli", "scenario files")}),
    "ray": ("ray", "gradq bench --cluster"),
    "mpi4py": ("mpi", "training under mpiexec"),
    "triton": ("gpu", "kernels for CUDA tensors"),
    "onnx": ("export", "ONNX export"),
    "onnxruntime": ("export", "INT8 inference"),
    "onnxscript": ("export", "ONNX export"),
    "matplotlib": ("plot", "plots"),
    "fastapi": ("serve", "the serving example"),
}

Row = tuple[str, str, str]


def doctor() -> None:
    """Show what this machine has, what gradq can do with it and what to install for the rest."""
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    rows: list[Row] = [
        ("", "here", "what to do"),
        ("processor", f"{cpu_name()}, {os.cpu_count()} cores", ""),
        ("system", system, ""),
        ("gradq", gradq.__version__, ""),
        *((package, _version(package) or "missing", "") for package in ("torch", "numpy", "numba")),
        ("CPU kernels", *_cpu_kernels()),
        ("GPUs", str(torch.cuda.device_count() if torch.cuda.is_available() else 0), ""),
        ("process groups", _process_groups(), ""),
        ("Gloo's interface", *_interface()),
    ]
    for package, (extra, use) in _EXTRAS.items():
        found = _version(package)
        advice = "" if found else f"for {use}: pip install 'gradq[{extra}]'"
        rows.append((package, found or "missing", advice))
    rows.append(("codecs", ", ".join(codecs.names()), ""))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 120
    sys.stdout.write(_aligned(rows, max(60, width)) + "\n")


def _aligned(rows: Sequence[Row], width: int) -> str:
    """Three columns within a width; what is too long goes on below, in its column."""
    first = max(len(name) for name, _, _ in rows)
    room = width - first - 4
    wanted = max(len(advice) for _, _, advice in rows)  # a command to copy stays on its line where it can
    second = max(10, min(max(len(here) for _, here, advice in rows if advice), room - wanted))
    third = min(wanted, room - second)
    lines = []
    for name, here, advice in rows:
        wide = second if advice else room
        left = textwrap.wrap(here, wide, break_on_hyphens=False) or [""]
        right = textwrap.wrap(advice, third, break_on_hyphens=False)
        for index in range(max(len(left), len(right))):
            parts = (
                name if index == 0 else "",
                left[index] if index < len(left) else "",
                right[index] if index < len(right) else "",
            )
            lines.append(f"{parts[0]:{first}}  {parts[1]:{second}}  {parts[2]}".rstrip())
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_kernels() -> tuple[str, str]:
    try:
        BACKENDS.on(torch.device("cpu"))
    except GradqError as error:
        return "missing", str(error)
    return backend_name(torch.device("cpu")), ""


def _process_groups() -> str:
    if not dist.is_available():
        return "none"
    return ", ".join(name for name in ("gloo", "nccl", "mpi") if dist.is_backend_available(name))


def _interface() -> tuple[str, str]:
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    if chosen:
        return chosen, ""
    return "chosen by the host name", "set GLOO_SOCKET_IFNAME if ranks cannot reach each other"
