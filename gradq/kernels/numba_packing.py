"""Codes, one byte each, and planes of 4, 2 and 1 bits, the low bits first, as which they are sent."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from gradq.kernels.numba_compile import inline
from gradq.kernels.numba_tools import u8_at, u64_at

__all__ = ["packing"]

# the digits of the planes, in each of eight bytes
_FOURS, _TWOS, _ONES = 0x0F0F0F0F0F0F0F0F, 0x0303030303030303, 0x0101010101010101


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
        multiple: what divides the number of codes: 8 takes them one by one, 64 mostly eight at a time; 0
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
