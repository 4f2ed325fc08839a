"""Tensors as MPI takes them: flat, dense, in dtypes that MPI can add."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradq.errors import ConfigError, UnsupportedError

__all__ = ["array", "bits", "copy_back", "flatten", "in_parts", "rows", "to_reduce", "together"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.bool: torch.uint8}


def flatten(tensor: Tensor) -> Tensor:
    """The elements in order [n]: of a contiguous tensor a view, else a copy.

    Raises:
        UnsupportedError: not a dense CPU tensor.
    """
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise UnsupportedError(
            f"the backend mpi4py moves dense CPU tensors, not {tensor.layout} on {tensor.device}"
        )
    return tensor.detach().contiguous().reshape(-1)


def rows(tensor: Tensor, count: int) -> Sequence[Tensor]:
    """A contiguous tensor cut into equal parts, as views.

    Raises:
        UnsupportedError: it is not contiguous; ConfigError: the ranks do not divide it.
    """
    if not tensor.is_contiguous():
        raise UnsupportedError("a tensor of all ranks' parts must be contiguous; call .contiguous() first")
    if tensor.numel() % count:
        raise ConfigError(f"a tensor of {tensor.numel()} elements cannot be cut into {count} equal parts")
    return list(flatten(tensor).view(count, -1))


def together(parts: Sequence[Tensor], like: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """One flat tensor for all parts, and its pieces; if the parts are adjacent, over themselves."""
    total = sum(part.numel() for part in parts)
    flat = torch.empty(total, dtype=like.dtype)
    if parts and all(part.is_contiguous() and part.dtype == like.dtype for part in parts):
        starts = itertools.accumulate((part.nbytes for part in parts), initial=parts[0].data_ptr())
        end = parts[0].untyped_storage().data_ptr() + parts[0].untyped_storage().nbytes()
        if all(part.data_ptr() == start for part, start in zip(parts, starts, strict=False)) and (
            parts[0].data_ptr() + total * like.itemsize <= end
        ):
            flat = parts[0].detach().as_strided((total,), (1,), parts[0].storage_offset())
    return flat, torch.split(flat, [part.numel() for part in parts]) if parts else []


def copy_back(tensor: Tensor, flat: Tensor) -> None:
    """Copy flat [n] into the tensor, unless it is a view of it."""
    if flat.data_ptr() != tensor.data_ptr() or flat.dtype != tensor.dtype:
        tensor.detach().copy_(flat.view(tensor.shape))


def to_reduce(tensor: Tensor) -> Tensor:
    """A flat tensor that MPI can reduce: fp32 for fp16 and bf16, pairs of reals for complex numbers."""
    flat = flatten(tensor)
    if flat.is_complex():
        return torch.view_as_real(flat).reshape(-1)
    return flat.to(_WIDER.get(flat.dtype, flat.dtype))


def bits(flat: Tensor) -> Tensor:
    """The same memory as integers, for what only travels."""
    return flat.view(_BITS[min(flat.itemsize, 8)])


def in_parts(flat: Tensor, parts: Sequence[Tensor]) -> tuple[Any, list[int]]:
    """A flat tensor in parts as mpi4py takes it: its memory, and how many integers of it each part has."""
    return array(bits(flat)), [part.numel() * max(flat.itemsize // 8, 1) for part in parts]


def array(flat: Tensor) -> Any:
    """The memory of a flat tensor as mpi4py takes it.

    Raises:
        UnsupportedError: a dtype MPI cannot reduce.
    """
    try:
        return flat.numpy()
    except TypeError as error:
        raise UnsupportedError(f"MPI has no arithmetic for {flat.dtype}") from error
