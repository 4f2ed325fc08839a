"""What Numba kernels share: addresses and arrays at them, the hash, blocks, planes of bits."""

from __future__ import annotations

import functools
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
    "load_absmax",
    "load_copy",
    "load_sum",
    "mix32",
    "next_blocks",
    "pack_few",
    "packing",
    "plain",
    "row_addresses",
    "scratch",
    "u8_at",
    "u16_at",
    "u32_at",
    "unit_dither",
    "unpack_few",
]

# the digits of the planes, in each of eight bytes
_FOURS, _TWOS, _ONES = 0x0F0F0F0F0F0F0F0F, 0x0303030303030303, 0x0101010101010101


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
def load_absmax(x_at: Any, L: Any) -> Any:
    """The largest magnitude of L elements."""
    x, most = f32_at(x_at, L), np.uint32(0)
    for j in range(L):
        most = np.uint32(max(most, np.uint32(as_bits(x[j]) & np.uint32(0x7FFFFFFF))))
    return as_float(most)


@inline
def load_copy(x_at: Any, value_at: Any, L: Any, P: Any) -> Any:
    """As `load_absmax`; the elements go to scratch, padded with zeros."""
    x, value = f32_at(x_at, L), f32_at(value_at, P)
    for j in range(L):
        value[j] = x[j]
    for j in range(L, P):
        value[j] = np.float32(0)
    return load_absmax(x_at, L)


@inline
def load_sum(x_at: Any, residual_at: Any, value_at: Any, unscale: Any, L: Any, P: Any) -> Any:
    """As `load_copy`, of x + unscale * residual."""
    x, residual, value = f32_at(x_at, L), f32_at(residual_at, L), f32_at(value_at, P)
    most = np.uint32(0)
    for j in range(L):
        v = x[j] + residual[j] * unscale
        value[j] = v
        most = np.uint32(max(most, np.uint32(as_bits(v) & np.uint32(0x7FFFFFFF))))
    for j in range(L, P):
        value[j] = np.float32(0)
    return as_float(most)


# --- planes of bits ------------------------------------------------------------------------------------


@inline
def _digits(word: Any, down: Any, mask: Any) -> Any:
    """The digits of a mask in each byte, moved down."""
    return np.uint64(np.uint64(word >> np.uint64(down)) & np.uint64(mask))


@inline
def _up(word: Any, by: Any) -> Any:
    return np.uint64(word << np.uint64(by))


@functools.cache
def packing(num_bits: int, multiple: int = 8) -> tuple[Any, Any]:
    """Functions between codes of a width, one byte each, and planes of 4, 2 and 1 bits.

    Args:
        num_bits: 1 to 7.
        multiple: of which the number of codes is one: 8 takes them one by one, 64 mostly eight at a time; 0
            is for numbers that are not known and chooses between both.

    Returns:
        pack(codes_at, packed_at, P) and unpack(packed_at, codes_at, P), to be inlined.
    """
    if multiple == 8:
        return _packing_bytes(num_bits)
    if multiple == 64:
        return _packing_words(num_bits)
    pack_bytes, unpack_bytes = _packing_bytes(num_bits)
    pack_words, unpack_words = _packing_words(num_bits)

    @inline
    def pack(codes_at: Any, packed_at: Any, P: Any) -> None:
        if P % 64 == 0:
            pack_words(codes_at, packed_at, P)
        else:
            pack_bytes(codes_at, packed_at, P)

    @inline
    def unpack(packed_at: Any, codes_at: Any, P: Any) -> None:
        if P % 64 == 0:
            unpack_words(packed_at, codes_at, P)
        else:
            unpack_bytes(packed_at, codes_at, P)

    return pack, unpack


@functools.cache
def _packing_bytes(num_bits: int) -> tuple[Any, Any]:
    @inline
    def pack_bytes(codes_at: Any, packed_at: Any, P: Any) -> None:
        codes_P, packed = u8_at(codes_at, P), u8_at(packed_at, P * num_bits // 8)
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
    def unpack_bytes(packed_at: Any, codes_at: Any, P: Any) -> None:
        packed, codes_P = u8_at(packed_at, P * num_bits // 8), u8_at(codes_at, P)
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

    return pack_bytes, unpack_bytes


@functools.cache
def _packing_words(num_bits: int) -> tuple[Any, Any]:
    @inline
    def pack_words(codes_at: Any, packed_at: Any, P: Any) -> None:
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
    def unpack_words(packed_at: Any, codes_at: Any, P: Any) -> None:
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

    # words take what earlier planes left, so not of one bit
    return pack_words, unpack_words if num_bits > 1 else _packing_bytes(num_bits)[1]


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
