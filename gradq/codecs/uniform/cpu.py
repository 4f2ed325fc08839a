"""The Numba kernels: one pass over memory, byte for byte what `gradq.codecs.uniform.reference` writes.

A few blocks at a time, in scratch that stays in the L1 cache: add the residual and find absmax, round to
one byte a code, pack the bytes. L elements in a block, P = L padded to 8, W rows; `_at` is an address, 0 for
none.

What makes them fast. Every operand is cast to 32 bits (Numba widens to 64). Kernels take addresses: a call
with six arrays costs more than a short segment. Loops over a constant length compile to far better code,
so the usual block sizes have their own copies, by inlining. Outputs nobody reads soon are written past the
cache.

What keeps them right. No fast-math: NaN, Inf and the reference's rounding survive. absmax is the greatest bit
pattern: integers have no NaN to lose.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradq.codecs.uniform.cpu_rounding import ROUND
from gradq.codecs.uniform.cpu_scales import FP32, KIND, load_scale, store_scale
from gradq.codecs.uniform.format import UniformFormat
from gradq.kernels.numba_blocks import (
    STREAM_FROM,
    load_absmax,
    load_copy,
    load_sum,
    next_blocks,
    write,
    write_mean,
)
from gradq.kernels.numba_compile import inline, variant
from gradq.kernels.numba_packing import packing
from gradq.kernels.numba_tools import (
    address,
    f32_at,
    fence,
    mix32,
    plain,
    row_addresses,
    scratch,
    u8_at,
)
from gradq.rng import EncodeContext

__all__ = ["decode", "decode_mean", "encode"]

_MASK32 = 0xFFFFFFFF
_USUAL = (64, 256)  # the block sizes with loops of their own
_TOGETHER = 1024  # elements of the blocks that are taken together
_WITH_FEEDBACK = 256  # the same where two more streams go to and from memory


# --- codes ---------------------------------------------------------------------------------------------


@inline
def _codes_as_they_are(packed_at: Any, _codes_at: Any, _count: Any, _P: Any) -> Any:
    return packed_at


@functools.cache
def _codes_of(num_bits: int, multiple: int) -> Any:
    """A function that gives the address of the codes of some blocks, one byte each."""
    if num_bits == 8:
        return _codes_as_they_are
    unpack = packing(num_bits, multiple)[1]

    @inline
    def codes_unpacked(packed_at: Any, codes_at: Any, count: Any, P: Any) -> Any:
        size = P // 8 * num_bits
        for i in range(count):
            unpack(packed_at + i * size, codes_at + i * P, P)
        return codes_at

    return codes_unpacked


# --- encode --------------------------------------------------------------------------------------------


@inline
def _no_packing(_codes_at: Any, _packed_at: Any, _P: Any) -> None:
    """Of 8 bits: the codes stand where they belong."""


@functools.cache
def _encoder(num_bits: int, stochastic: bool, feedback: bool, usual: int) -> Any:
    """The kernel for a form: only what that needs is compiled.

    Args:
        num_bits: bits of a code.
        stochastic: how it rounds.
        feedback: whether there is a residual.
        usual: the block size with loops of its own; 0 for none.
    """
    qmax = np.int32((1 << (num_bits - 1)) - 1)
    in_place = num_bits == 8  # codes are the packed bytes
    round_codes = ROUND[stochastic, feedback]

    def blocks_with(pack_codes: Any) -> Any:
        @inline
        def encode_block(
            at: Any, places: Any, stream: Any, scale: Any, factor: Any, key_shift: Any, L: Any, P: Any
        ) -> None:
            """Codes of the values at scratch, and what they lose."""
            residual_at, new_at, packed_at = at
            value_at, codes_at = places
            if in_place:
                codes_at = packed_at
            if scale != scale:
                codes = u8_at(codes_at, P)
                for j in range(P):
                    codes[j] = np.uint8(qmax)
            else:
                round_codes(value_at, codes_at, scale, qmax, key_shift, P)
            pack_codes(codes_at, packed_at, P)
            if feedback:  # noqa: SIM102 (Numba drops the branch)
                if new_at != 0:
                    if scale != scale:
                        write(residual_at, new_at, np.float32(1), L, False)
                    else:
                        write(value_at, new_at, factor, L, stream)

        @inline
        def encode_blocks(
            at: Any, count: Any, places: Any, stream: Any, factors: Any, dither: Any, L: Any, P: Any
        ) -> None:
            """Blocks of L elements, each step for all: what one waits for the others do not."""
            x_at, residual_at, new_at, scale_at, packed_at = at
            key_low, key_high, shift, first_block = dither
            value_at, codes_at, scales_at, kind = places
            scale_size = 4 if kind == FP32 else 2
            scales = f32_at(scales_at, count)
            copied = feedback or L != P  # else x is only read
            for i in range(count):
                more = 4 * i * L
                if feedback:
                    scales[i] = load_sum(x_at + more, residual_at + more, value_at + more, factors[0], L, P)
                elif L != P:
                    scales[i] = load_copy(x_at + more, value_at + more, L, P)
                else:
                    scales[i] = load_absmax(x_at + more, L)
            for i in range(count):
                scales[i] = store_scale(scale_at + scale_size * i, kind, scales[i], qmax)
            for i in range(count):
                more = 4 * i * L
                key = np.uint32(np.uint32(np.uint32(first_block) + np.uint32(i)) ^ np.uint32(key_low))
                key_shift = (np.uint32(mix32(key) + np.uint32(key_high)), np.uint32(shift))
                put_at = new_at + more if new_at != 0 else 0
                block_at = (residual_at + more, put_at, packed_at + i * (P // 8 * num_bits))
                here = ((value_at if copied else x_at) + more, codes_at)
                encode_block(block_at, here, stream, scales[i], factors[1], key_shift, L, P)

        return encode_blocks

    rest = blocks_with(_no_packing if in_place else packing(num_bits, 8 if usual else 0)[0])
    whole = rest if in_place or not usual else blocks_with(packing(num_bits, 64)[0])
    rounding = "stochastic" if stochastic else "nearest"

    @variant(f"{num_bits}-{rounding}-{'feedback' if feedback else 'alone'}-{usual}")
    def encode(tensors_at: Any, n: int, shape: Any, dither: Any, loss_scale: float) -> None:
        block_size, kind = shape
        size = plain(usual)
        scale_size = 4 if kind == FP32 else 2
        x_at, payload_at, residual_at, new_at = tensors_at
        key_low, key_high, shift, first_block = dither
        num_blocks = (n + block_size - 1) // block_size
        scale_at, packed_at = payload_at, payload_at + num_blocks * scale_size
        together = max((_WITH_FEEDBACK if feedback else _TOGETHER) // block_size, 1)
        value_at = scratch(4 * together * block_size + block_size + 4 * together + 128)
        codes_at = value_at + 4 * together * block_size
        places = (value_at, codes_at, codes_at + (block_size + 63) // 64 * 64, kind)
        stream = new_at != residual_at and new_at % 32 == 0 and n >= STREAM_FROM
        factors = (np.float32(loss_scale), np.float32(1.0 / loss_scale))
        block = 0
        while block < num_blocks:
            count, L = next_blocks(n - block * block_size, block_size, together)
            at = (x_at, residual_at, new_at, scale_at, packed_at)
            draws = (key_low, key_high, shift, first_block + block)
            if size == L:
                whole(at, count, places, stream, factors, draws, size, size)
            else:
                rest(at, count, places, stream, factors, draws, L, (L + 7) // 8 * 8)
            x_at += 4 * L * count
            residual_at += 4 * L * count if residual_at != 0 else 0
            new_at += 4 * L * count if new_at != 0 else 0
            scale_at += scale_size * count
            packed_at += block_size * num_bits // 8 * count
            block += count
        if stream:
            fence()

    return encode


def encode(
    x: Tensor,
    payload: Tensor,
    form: UniformFormat,
    context: EncodeContext,
    residual: Tensor | None = None,
    new_residual: Tensor | None = None,
) -> None:
    """Encode x + loss_scale * residual in one pass; the format is the reference's."""
    assert new_residual is None or residual is not None
    n, block_size, key = x.numel(), form.block_size, context.key
    residual_at = 0 if residual is None else address(residual, torch.float32, n)
    new_at = 0 if new_residual is None else address(new_residual, torch.float32, n)
    dither = key & _MASK32, (key >> 32) & _MASK32, context.shift, context.first_block & _MASK32
    payload_at = address(payload, torch.uint8, form.nbytes(n))
    usual = block_size if block_size in _USUAL else 0
    kernel = _encoder(form.num_bits, form.stochastic, residual is not None, usual)
    at = address(x, torch.float32, n), payload_at, residual_at, new_at
    kernel(at, n, (block_size, KIND[form.scale_dtype]), dither, float(context.loss_scale))


# --- decode --------------------------------------------------------------------------------------------


@inline
def _value(code: Any, qmax: Any, scale: Any) -> Any:
    return np.float32(np.int32(np.int32(code) - qmax)) * scale


@inline
def _add_two_rows(codes_at: Any, scales: Any, qmax: Any, sum_at: Any, first: Any, L: Any) -> None:
    """Two at a time: half the traffic to the sum."""
    a, b, total = u8_at(codes_at[0], L), u8_at(codes_at[1], L), f32_at(sum_at, L)
    if first:
        for j in range(L):
            total[j] = _value(a[j], qmax, scales[0]) + _value(b[j], qmax, scales[1])
    else:
        for j in range(L):
            total[j] = (total[j] + _value(a[j], qmax, scales[0])) + _value(b[j], qmax, scales[1])


@functools.cache
def _decoder(num_bits: int, usual: int) -> Any:
    """The kernel for a form; see `_encoder`."""
    qmax = np.int32((1 << (num_bits - 1)) - 1)

    def blocks_with(codes_of: Any) -> Any:
        @inline
        def mean_blocks(at: Any, count: Any, rows: Any, places: Any, stream: Any, L: Any, P: Any) -> None:
            """Blocks of L elements, as `encode_blocks`."""
            scale_at, packed_at, out_at = at
            num_rows, row_stride = rows
            sum_at, codes_at, kind = places
            scale_size = 4 if kind == FP32 else 2
            if num_rows & 1:
                a_at = codes_of(packed_at, codes_at, count, P)
                for i in range(count):
                    codes, total = u8_at(a_at + i * P, L), f32_at(sum_at + 4 * i * L, L)
                    scale = load_scale(scale_at + i * scale_size, kind)
                    for j in range(L):
                        total[j] = _value(codes[j], qmax, scale)
                scale_at, packed_at = scale_at + row_stride, packed_at + row_stride
            for row in range(num_rows & 1, num_rows, 2):
                a_at = codes_of(packed_at, codes_at, count, P)
                b_at = codes_of(packed_at + row_stride, codes_at + count * P, count, P)
                for i in range(count):
                    at_i = scale_at + i * scale_size
                    scales = (load_scale(at_i, kind), load_scale(at_i + row_stride, kind))
                    _add_two_rows((a_at + i * P, b_at + i * P), scales, qmax, sum_at + 4 * i * L, row == 0, L)
                scale_at, packed_at = scale_at + 2 * row_stride, packed_at + 2 * row_stride
            for i in range(count):
                write_mean(sum_at + 4 * i * L, out_at + 4 * i * L, num_rows, L, stream)

        return mean_blocks

    rest = blocks_with(_codes_of(num_bits, 8 if usual else 0))
    whole = rest if num_bits == 8 or not usual else blocks_with(_codes_of(num_bits, 64))

    @variant(f"{num_bits}-{usual}")
    def decode_mean(payload_at: int, rows: Any, out_at: int, n: int, shape: Any) -> None:
        block_size, kind = shape
        size = plain(usual)
        scale_size = 4 if kind == FP32 else 2
        num_blocks = (n + block_size - 1) // block_size
        scale_at, packed_at = payload_at, payload_at + num_blocks * scale_size
        together = max(_TOGETHER // block_size, 1)
        sum_at = scratch(6 * together * block_size + 64)
        places = (sum_at, sum_at + 4 * together * block_size, kind)
        stream = out_at % 32 == 0 and n >= STREAM_FROM
        block = 0
        while block < num_blocks:
            count, L = next_blocks(n - block * block_size, block_size, together)
            at = (scale_at, packed_at, out_at)
            if size == L:
                whole(at, count, rows, places, stream, size, size)
            else:
                rest(at, count, rows, places, stream, L, (L + 7) // 8 * 8)
            out_at += 4 * L * count
            scale_at += scale_size * count
            packed_at += block_size * num_bits // 8 * count
            block += count
        if stream:
            fence()

    return decode_mean


def decode(payload: Tensor, out: Tensor, form: UniformFormat) -> None:
    """Decode one segment into out."""
    n, block_size = out.numel(), form.block_size
    payload_at = address(payload, torch.uint8, form.nbytes(n))
    kernel = _decoder(form.num_bits, block_size if block_size in _USUAL else 0)
    kernel(payload_at, (1, 0), address(out, torch.float32, n), n, (block_size, KIND[form.scale_dtype]))


def decode_mean(payloads: Tensor, out: Tensor, form: UniformFormat) -> None:
    """Mean over the W rows of payloads, added in row order in fp32, divided once."""
    n, block_size = out.numel(), form.block_size
    rows_at, rows = row_addresses(payloads, form.nbytes(n))
    kernel = _decoder(form.num_bits, block_size if block_size in _USUAL else 0)
    kernel(rows_at, rows, address(out, torch.float32, n), n, (block_size, KIND[form.scale_dtype]))
