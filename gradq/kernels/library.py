"""The kernels as PyTorch operators, `torch.ops.gradq.*`: for torch.compile, export, and other frameworks.

Importing this module registers them. Each writes into tensors that it is given and returns nothing; the
schemas say which. They dispatch by device (CPU, CUDA) to `gradq.kernels`, and have fake implementations that
check shapes and dtypes without data. gradq itself calls the kernels directly: the dispatch would cost as much
as a short segment.

    >>> import torch, gradq.kernels.library
    >>> x, payload = torch.randn(1000), torch.zeros(1008, dtype=torch.uint8)
    >>> torch.ops.gradq.uniform_encode(
    ...     x, payload, 8, 256, torch.bfloat16, True, 1, 0, 0, None, None, 1.0)
    >>> torch.ops.gradq.uniform_decode(payload, x, 8, 256, torch.bfloat16)

Keys are 64-bit and torch's integers signed: a key of 2**63 or more is passed as key - 2**64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from gradq.errors import KernelError
from gradq.kernels.ops import kernels_for
from gradq.kernels.rotated import payload_bytes, rotated_kernels

__all__ = ["OPERATORS"]

_UNIFORM = "int num_bits, int block_size, ScalarType scale_dtype"
_ROTATED = "int num_bits, bool trellis"
_RESIDUALS = "Tensor? residual, Tensor(b!)? new_residual, float loss_scale"

OPERATORS = {
    "uniform_encode": f"(Tensor x, Tensor(a!) payload, {_UNIFORM}, bool stochastic, int key, int shift, "
    f"int first_block, {_RESIDUALS}) -> ()",
    "uniform_decode": f"(Tensor payload, Tensor(a!) out, {_UNIFORM}) -> ()",
    "uniform_decode_mean": f"(Tensor payloads, Tensor(a!) out, {_UNIFORM}) -> ()",
    "rotated_encode": f"(Tensor x, Tensor(a!) payload, {_ROTATED}, bool unbiased, int base, "
    f"{_RESIDUALS}) -> ()",
    "rotated_decode": f"(Tensor payload, Tensor(a!) out, {_ROTATED}) -> ()",
    "rotated_decode_mean": f"(Tensor payloads, Tensor(a!) out, {_ROTATED}) -> ()",
}  # the schemas, by name


def _check_encode(
    x: Tensor, payload: Tensor, nbytes: Any, residual: Tensor | None, new_residual: Tensor | None
) -> None:
    if new_residual is not None and residual is None:
        raise KernelError("new_residual is written only where residual is given")
    for tensor in (x, residual, new_residual):
        if tensor is not None:
            _check(tensor, torch.float32, x.numel(), x)
    _check(payload, torch.uint8, nbytes, x)


def _check(tensor: Tensor, dtype: torch.dtype, numel: Any, like: Tensor) -> None:
    if tensor.dtype != dtype or tensor.dim() != 1 or tensor.device != like.device or tensor.numel() < numel:
        raise KernelError(
            f"an operator needs {dtype} of one dimension with at least {numel} elements on {like.device}, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        )


def _uniform_bytes(numel: Any, num_bits: int, block_size: int, scale_dtype: torch.dtype) -> Any:
    return -(-numel // block_size) * scale_dtype.itemsize + -(-numel // 8) * num_bits


# --- implementations, for CPU and CUDA -----------------------------------------------------------------


def _uniform_encode(
    x: Tensor,
    payload: Tensor,
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
    kernels_for(x.device).uniform_encode(
        x,
        payload,
        num_bits=num_bits,
        block_size=block_size,
        scale_dtype=scale_dtype,
        stochastic=stochastic,
        key=key & (2**64 - 1),
        shift=shift,
        first_block=first_block,
        residual=residual,
        new_residual=new_residual,
        loss_scale=loss_scale,
    )


def _uniform_decode(
    payload: Tensor, out: Tensor, num_bits: int, block_size: int, scale_dtype: torch.dtype
) -> None:
    form: dict[str, Any] = {"num_bits": num_bits, "block_size": block_size, "scale_dtype": scale_dtype}
    kernels_for(out.device).uniform_decode(payload, out, **form)


def _uniform_decode_mean(
    payloads: Tensor, out: Tensor, num_bits: int, block_size: int, scale_dtype: torch.dtype
) -> None:
    form: dict[str, Any] = {"num_bits": num_bits, "block_size": block_size, "scale_dtype": scale_dtype}
    kernels_for(out.device).uniform_decode_mean(payloads, out, **form)


def _rotated_encode(
    x: Tensor,
    payload: Tensor,
    num_bits: int,
    trellis: bool,
    unbiased: bool,
    base: int,
    residual: Tensor | None,
    new_residual: Tensor | None,
    loss_scale: float,
) -> None:
    rotated_kernels(x.device).rotated_encode(
        x,
        payload,
        num_bits=num_bits,
        trellis=trellis,
        unbiased=unbiased,
        base=base,
        residual=residual,
        new_residual=new_residual,
        loss_scale=loss_scale,
    )


def _rotated_decode(payload: Tensor, out: Tensor, num_bits: int, trellis: bool) -> None:
    rotated_kernels(out.device).rotated_decode(payload, out, num_bits=num_bits, trellis=trellis)


def _rotated_decode_mean(payloads: Tensor, out: Tensor, num_bits: int, trellis: bool) -> None:
    rotated_kernels(out.device).rotated_decode_mean(payloads, out, num_bits=num_bits, trellis=trellis)


# --- fake implementations: nothing is returned, so they only check --------------------------------------


def _fake_uniform_encode(
    x: Tensor,
    payload: Tensor,
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
    nbytes = _uniform_bytes(x.numel(), num_bits, block_size, scale_dtype)
    _check_encode(x, payload, nbytes, residual, new_residual)


def _fake_uniform_decode(
    payload: Tensor, out: Tensor, num_bits: int, block_size: int, scale_dtype: torch.dtype
) -> None:
    _check(out, torch.float32, out.numel(), out)
    _check(payload, torch.uint8, _uniform_bytes(out.numel(), num_bits, block_size, scale_dtype), out)


def _fake_uniform_decode_mean(
    payloads: Tensor, out: Tensor, num_bits: int, block_size: int, scale_dtype: torch.dtype
) -> None:
    _fake_uniform_decode(payloads[0], out, num_bits, block_size, scale_dtype)


def _fake_rotated_encode(
    x: Tensor,
    payload: Tensor,
    num_bits: int,
    trellis: bool,
    unbiased: bool,
    base: int,
    residual: Tensor | None,
    new_residual: Tensor | None,
    loss_scale: float,
) -> None:
    _check_encode(x, payload, payload_bytes(x.numel(), num_bits), residual, new_residual)


def _fake_rotated_decode(payload: Tensor, out: Tensor, num_bits: int, trellis: bool) -> None:
    _check(out, torch.float32, out.numel(), out)
    _check(payload, torch.uint8, payload_bytes(out.numel(), num_bits), out)


def _fake_rotated_decode_mean(payloads: Tensor, out: Tensor, num_bits: int, trellis: bool) -> None:
    _fake_rotated_decode(payloads[0], out, num_bits, trellis)


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "uniform_encode": (_uniform_encode, _fake_uniform_encode),
    "uniform_decode": (_uniform_decode, _fake_uniform_decode),
    "uniform_decode_mean": (_uniform_decode_mean, _fake_uniform_decode_mean),
    "rotated_encode": (_rotated_encode, _fake_rotated_encode),
    "rotated_decode": (_rotated_decode, _fake_rotated_decode),
    "rotated_decode_mean": (_rotated_decode_mean, _fake_rotated_decode_mean),
}

_NAMESPACE = __name__.partition(".")[0]
_library = cast(Any, torch.library.Library)(_NAMESPACE, "DEF")  # its operators live as long as this object
for _name, _schema in OPERATORS.items():
    _real, _fake = _IMPLEMENTATIONS[_name]
    _library.define(_name + _schema)
    for _backend in ("CPU", "CUDA"):
        _library.impl(_name, _real, _backend)
    torch.library.register_fake(f"{_NAMESPACE}::{_name}", _fake, lib=_library)
