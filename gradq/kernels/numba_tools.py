"""What Numba kernels share: compilation, addresses and arrays at them, the hash, blocks, planes of bits.

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
    "load_block",
    "mix32",
    "next_blocks",
    "pack",
    "pack_few",
    "row_addresses",
    "u8_at",
    "u16_at",
    "u32_at",
    "unit_dither",
    "unpack",
    "unpack_few",
]

# the digits of the planes, in each of eight bytes
_FOURS, _TWOS, _ONES = 0x0F0F0F0F0F0F0F0F, 0x0303030303030303, 0x0101010101010101

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
u64_at, f32_at = _array_at(types.uint64), _array_at(types.float32)


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
def unit_dither(bits: Any, shift: Any) -> Any:
    """The low 16 bits, shifted, in the middle of their step of (0, 1)."""
    d = np.uint32(np.uint32(bits + shift) & np.uint32(0xFFFF))
    return np.float32(np.int32(d)) * np.float32(2.0**-16) + np.float32(2.0**-17)


@inline
def next_blocks(left: Any, block_size: Any, together: Any) -> Any:
    """How many blocks come next, and of how many elements each: a shorter last one comes alone."""
    count = min(together, left // block_size)
    return (1, left) if count == 0 else (count, block_size)


@inline
def load_block(x_at: Any, residual_at: Any, value_at: Any, unscale: Any, L: Any, P: Any) -> Any:
    """Return absmax of x + unscale * residual; the sum goes to scratch, if any, padded with zeros."""
    x, residual, value = f32_at(x_at, L), f32_at(residual_at, L), f32_at(value_at, P)
    most = np.uint32(0)
    if residual_at != 0:
        for j in range(L):
            v = x[j] + residual[j] * unscale
            value[j] = v
            most = np.uint32(max(most, np.uint32(as_bits(v) & np.uint32(0x7FFFFFFF))))
    else:
        for j in range(L):
            most = np.uint32(max(most, np.uint32(as_bits(x[j]) & np.uint32(0x7FFFFFFF))))
        if value_at != 0:
            for j in range(L):
                value[j] = x[j]
    for j in range(L, P):
        value[j] = np.float32(0)
    return as_float(most)


# --- planes of bits ------------------------------------------------------------------------------------


@inline
def pack(codes_at: Any, packed_at: Any, num_bits: Any, P: Any) -> None:
    """One byte a code to planes of 4, 2 and 1 bits, P a multiple of 8; of 8 bits there is nothing to pack."""
    if P % 64 == 0:
        _pack_words(codes_at, packed_at, num_bits, P)
    else:
        _pack_bytes(u8_at(codes_at, P), u8_at(packed_at, P * num_bits // 8), num_bits)


@inline
def unpack(packed_at: Any, codes_at: Any, num_bits: Any, P: Any) -> None:
    """What `pack` wrote, back to one byte a code; words take what earlier planes left, so not of one bit."""
    if P % 64 == 0 and num_bits > 1:
        _unpack_words(packed_at, codes_at, num_bits, P)
    else:
        _unpack_bytes(u8_at(packed_at, P * num_bits // 8), u8_at(codes_at, P), num_bits)


@inline
def _pack_bytes(codes_P: Any, packed: Any, num_bits: Any) -> None:
    P = len(codes_P)
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
def _unpack_bytes(packed: Any, codes_P: Any, num_bits: Any) -> None:
    P = len(codes_P)
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


@inline
def _digits(word: Any, down: Any, mask: Any) -> Any:
    """The digits of a mask in each byte, moved down."""
    return np.uint64(np.uint64(word >> np.uint64(down)) & np.uint64(mask))


@inline
def _up(word: Any, by: Any) -> Any:
    return np.uint64(word << np.uint64(by))


@inline
def _pack_words(codes_at: Any, packed_at: Any, num_bits: Any, P: Any) -> None:
    """Mostly eight codes at a time."""
    w, done = P // 64, 0  # words of an octant of the codes
    codes = u64_at(codes_at, 8 * w)
    if num_bits & 4:
        if w == 1:
            plane = u64_at(packed_at, 4)
            for j in range(4):
                plane[j] = _digits(codes[j], 0, _FOURS) | _up(_digits(codes[j + 4], 0, _FOURS), 4)
        else:  # a loop over bytes, if it is not short, becomes the better code
            run = 32 * w
            low, high, bytes4 = u8_at(codes_at, run), u8_at(codes_at + run, run), u8_at(packed_at, run)
            for j in range(run):
                bytes4[j] = np.uint8((low[j] & np.uint8(15)) | np.uint8(high[j] << np.uint8(4)))
        packed_at, done = packed_at + 32 * w, 4
    if num_bits & 2:
        plane = u64_at(packed_at, 2 * w)
        for j in range(2 * w):
            ab = _digits(codes[j], done, _TWOS) | _up(_digits(codes[j + 2 * w], done, _TWOS), 2)
            cd = _digits(codes[j + 4 * w], done, _TWOS) | _up(_digits(codes[j + 6 * w], done, _TWOS), 2)
            plane[j] = ab | _up(cd, 4)
        packed_at, done = packed_at + 16 * w, done + 2
    if num_bits & 1:
        plane = u64_at(packed_at, w)
        for j in range(w):
            word = np.uint64(0)
            for k in range(8):
                word |= _up(_digits(codes[j + k * w], done, _ONES), k)
            plane[j] = word


@inline
def _unpack_words(packed_at: Any, codes_at: Any, num_bits: Any, P: Any) -> None:
    w, done = P // 64, 0
    codes = u64_at(codes_at, 8 * w)
    if num_bits & 4:
        if w == 1:
            plane = u64_at(packed_at, 4)
            for j in range(4):
                word = plane[j]
                codes[j], codes[j + 4] = _digits(word, 0, _FOURS), _digits(word, 4, _FOURS)
        else:
            run = 32 * w
            low, high, bytes4 = u8_at(codes_at, run), u8_at(codes_at + run, run), u8_at(packed_at, run)
            for j in range(run):
                low[j] = bytes4[j] & np.uint8(15)
                high[j] = bytes4[j] >> np.uint8(4)
        packed_at, done = packed_at + 32 * w, 4
    if num_bits & 2:
        plane, old = u64_at(packed_at, 2 * w), np.uint64(_FOURS if done else 0)
        for j in range(2 * w):
            word = plane[j]
            for k in range(4):
                at = j + 2 * k * w
                codes[at] = (codes[at] & old) | _up(_digits(word, 2 * k, _TWOS), done)
        packed_at, done = packed_at + 16 * w, done + 2
    if num_bits & 1:
        plane = u64_at(packed_at, w)
        for j in range(w):
            word = plane[j]
            for k in range(8):
                codes[j + k * w] |= _up(_digits(word, k, _ONES), done)


@inline
def pack_few(codes_at: Any, packed_at: Any, P: Any) -> None:
    """`pack` of 4 bits for 16, 32 or 48 codes; as a branch of `pack` it costs the other codecs a tenth."""
    w = P // 16
    codes, plane = u64_at(codes_at, 2 * w), u64_at(packed_at, w)
    for j in range(w):
        plane[j] = _digits(codes[j], 0, _FOURS) | _up(_digits(codes[j + w], 0, _FOURS), 4)


@inline
def unpack_few(packed_at: Any, codes_at: Any, P: Any) -> None:
    """What `pack_few` wrote, back to one byte a code."""
    w = P // 16
    codes, plane = u64_at(codes_at, 2 * w), u64_at(packed_at, w)
    for j in range(w):
        word = plane[j]
        codes[j], codes[j + w] = _digits(word, 0, _FOURS), _digits(word, 4, _FOURS)
