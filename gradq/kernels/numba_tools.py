"""What Numba kernels share: compilation, addresses and arrays at them, the hash, planes of bits.

A kernel's compiled form is cached by the file it stands in: after a change here, remove the kernels'
`__pycache__`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic
from numba.np.numpy_support import carray
from torch import Tensor

from gradq.errors import KernelError

__all__ = [
    "address",
    "aligned",
    "as_bits",
    "as_float",
    "f32_at",
    "fence",
    "inline",
    "jit",
    "keep",
    "mix32",
    "pack",
    "row_addresses",
    "u8_at",
    "u16_at",
    "u32_at",
    "unpack",
]

_F = TypeVar("_F", bound=Callable[..., Any])


def jit(function: _F) -> _F:
    """Compile on first use; keep the result on disk."""
    return cast(_F, numba.njit(nogil=True, cache=True)(function))


def inline(function: _F) -> _F:
    """Compile into every caller."""
    return cast(_F, numba.njit(nogil=True, forceinline=True)(function))


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
f32_at = _array_at(types.float32)


def _full_fence(_typing: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, _args: Any) -> None:
        builder.fence("seq_cst")

    return types.void(), generate


fence: Any = intrinsic(_full_fence)  # writes past the cache are not ordered with others without it


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


@inline
def pack(codes_P: Any, packed: Any, num_bits: Any) -> None:
    """One byte a code to planes of 4, 2 and 1 bits, P a multiple of 8; 8 bits are copied."""
    P = len(codes_P)
    if num_bits == 8:
        for j in range(P):
            packed[j] = codes_P[j]
        return
    low = np.uint8(0)
    if num_bits & 4:
        run = P // 2
        a, b, plane = codes_P[:run], codes_P[run:], packed[:run]
        for j in range(len(plane)):
            plane[j] = np.uint8((a[j] & np.uint8(15)) | (b[j] << np.uint8(4)))
        packed = packed[run:]
        low = np.uint8(4)
    if num_bits & 2:
        run = P // 4
        plane = packed[:run]
        a, b, c, d = codes_P[:run], codes_P[run : 2 * run], codes_P[2 * run : 3 * run], codes_P[3 * run :]
        for j in range(len(plane)):
            ab = ((a[j] >> low) & np.uint8(3)) | (((b[j] >> low) & np.uint8(3)) << np.uint8(2))
            cd = ((c[j] >> low) & np.uint8(3)) | (((d[j] >> low) & np.uint8(3)) << np.uint8(2))
            plane[j] = np.uint8(ab | (cd << np.uint8(4)))
        packed = packed[run:]
        low = np.uint8(low + np.uint8(2))
    if num_bits & 1:
        run = P // 8
        plane = packed[:run]
        for j in range(len(plane)):
            plane[j] = np.uint8(0)
        for k in range(8):
            a = codes_P[k * run : (k + 1) * run]
            for j in range(len(plane)):
                plane[j] |= np.uint8(((a[j] >> low) & np.uint8(1)) << np.uint8(k))


@inline
def unpack(packed: Any, codes_P: Any, num_bits: Any) -> None:
    """What `pack` wrote, back to one byte a code."""
    P = len(codes_P)
    if num_bits == 8:
        for j in range(P):
            codes_P[j] = packed[j]
        return
    low = np.uint8(0)
    if num_bits & 4:
        run = P // 2
        a, b, plane = codes_P[:run], codes_P[run:], packed[:run]
        for j in range(len(plane)):
            byte = plane[j]
            a[j] = byte & np.uint8(15)
            b[j] = byte >> np.uint8(4)
        packed = packed[run:]
        low = np.uint8(4)
    else:
        for j in range(P):
            codes_P[j] = np.uint8(0)
    if num_bits & 2:
        run = P // 4
        plane = packed[:run]
        for k in range(4):
            a = codes_P[k * run : (k + 1) * run]
            for j in range(len(plane)):
                a[j] |= np.uint8(((plane[j] >> np.uint8(2 * k)) & np.uint8(3)) << low)
        packed = packed[run:]
        low = np.uint8(low + np.uint8(2))
    if num_bits & 1:
        run = P // 8
        plane = packed[:run]
        for k in range(8):
            a = codes_P[k * run : (k + 1) * run]
            for j in range(len(plane)):
                a[j] |= np.uint8(((plane[j] >> np.uint8(k)) & np.uint8(1)) << low)
