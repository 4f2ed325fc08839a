"""What Numba kernels share: addresses and arrays at them, memory of their own, bits, the hash."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numba.np.numpy_support import carray
from torch import Tensor

from gradq.errors import KernelError
from gradq.kernels.numba_compile import inline

__all__ = [
    "address",
    "aligned",
    "as_bits",
    "as_float",
    "f32_at",
    "fence",
    "keep",
    "mix32",
    "plain",
    "row_addresses",
    "scratch",
    "u8_at",
    "u16_at",
    "u32_at",
    "u64_at",
]


def _array_at(numba_type: Any) -> Any:
    """A function (address, length) -> array for use inside kernels."""
    pointer = cast(Any, types.CPointer)(numba_type)

    def typed(_typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(pointer))

        return pointer(types.intp), generate

    to_pointer: Any = intrinsic(typed)

    @inline
    def array_at(address: Any, length: Any) -> Any:
        return carray(to_pointer(address), length)

    return array_at


u8_at, u16_at, u32_at = _array_at(types.uint8), _array_at(types.uint16), _array_at(types.uint32)
u64_at, f32_at = _array_at(types.uint64), _array_at(types.float32)


def _full_fence(_typing: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, _args: Any) -> None:
        builder.fence("seq_cst")

    return types.void(), generate


fence: Any = intrinsic(_full_fence)  # writes past the cache are not ordered with others without it


def _on_stack(_typing: Any, _nbytes: Any) -> Any:
    def generate(_context: Any, builder: Any, signature: Any, args: Any) -> Any:
        memory = builder.alloca(ir.IntType(8), size=args[0])
        memory.align = 64
        return builder.ptrtoint(memory, args[0].type)

    return types.intp(types.intp), generate


# the address of bytes of the kernel's own, on a cache line, until the kernel returns: call it once, for a few
# KiB; compiling an allocation of NumPy's costs a second
scratch: Any = intrinsic(_on_stack)


def _without_value(_typing: Any, _number: Any) -> Any:
    def generate(_context: Any, _builder: Any, _signature: Any, args: Any) -> Any:
        return args[0]

    return types.intp(types.intp), generate


# a constant whose type does not know its value, for which Numba would compile all that it is passed to once
# more; the machine code knows the value still
plain: Any = intrinsic(_without_value)


@inline
def aligned(at: Any) -> Any:
    """The next address on a cache line."""
    return np.intp((np.intp(at) + 63) // 64 * 64)


@inline
def keep(scratch: Any) -> None:
    """Call it last: Numba frees an array after its last use, and using its address is not a use."""
    scratch[0] = scratch[0]


def address(tensor: Tensor, dtype: torch.dtype, numel: int) -> int:
    """The address of a tensor that a kernel may read or write for numel elements.

    Raises:
        KernelError: it is too small, of another dtype, not contiguous or not in this machine's memory.
    """
    if tensor.dtype is not dtype or tensor.numel() < numel or not tensor.is_contiguous() or not tensor.is_cpu:
        raise KernelError(
            f"a kernel needs a contiguous CPU tensor of {numel} elements in {dtype}, got {tensor.dtype} of "
            f"shape {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
        )
    return tensor.data_ptr()


def row_addresses(payloads: Tensor, nbytes: int) -> tuple[int, tuple[int, int]]:
    """The address of the first of W rows of bytes, and (W, bytes from row to row).

    Raises:
        KernelError: the rows are shorter than nbytes, or not contiguous bytes in this machine's memory.
    """
    if payloads.dim() != 2 or payloads.shape[0] < 1:
        raise KernelError(f"payloads must be [W, nbytes] with W >= 1, got shape {tuple(payloads.shape)}")
    return address(payloads[0], torch.uint8, nbytes), (payloads.shape[0], payloads.stride(0))


@inline
def as_float(bits: Any) -> Any:
    """The fp32 number with these bits."""
    return np.uint32(bits).view(np.float32)


@inline
def as_bits(value: Any) -> Any:
    """The bits of an fp32 number."""
    return np.float32(value).view(np.uint32)


@inline
def mix32(h: Any) -> Any:
    """The mixing function of `gradq.rng`."""
    h = np.uint32(h ^ (h >> np.uint32(16)))
    h = np.uint32(h * np.uint32(0x7FEB352D))
    h = np.uint32(h ^ (h >> np.uint32(15)))
    h = np.uint32(h * np.uint32(0x846CA68B))
    return np.uint32(h ^ (h >> np.uint32(16)))
