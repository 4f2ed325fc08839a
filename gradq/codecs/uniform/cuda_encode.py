"""The encoder of the uniform codecs in Triton; see `gradq.codecs.uniform.cuda` for octants."""

# Triton unrolls loops over tuples, and a tuple grows by a sum.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

import triton.language as tl

from gradq.codecs.uniform.cuda_scales import FP32, nan_bits, scale_bits, scale_value
from gradq.kernels.triton_tools import as_bits, jit, mix32, move, quotient, store_number

__all__ = ["encode_program"]


@jit
def _store_plane(
    packed: tl.tensor, numbers: tl.tensor, E: tl.tensor, mine: tl.tensor, W: tl.constexpr, DONE: tl.constexpr
) -> None:
    """A plane of W bits, those above the DONE lowest."""
    for b in tl.static_range(W):
        byte = (numbers[b] >> DONE) & ((1 << W) - 1)
        for i in tl.static_range(1, 8 // W):
            byte = byte | (((numbers[b + i * W] >> DONE) & ((1 << W) - 1)) << (W * i))
        tl.store(packed + (DONE + b) * E, byte.to(tl.uint8), mask=mine)


@jit
def _encode_blocks(
    x: tl.tensor,
    residual: tl.tensor,
    new_residual: tl.tensor,
    scales: tl.tensor,
    codes: tl.tensor,
    num_blocks: tl.tensor,
    L: tl.tensor,
    E: tl.tensor,
    key_low: tl.tensor,
    key_high: tl.tensor,
    shift: tl.tensor,
    first_block: tl.tensor,
    loss_scale: tl.tensor,
    inverse_loss_scale: tl.tensor,
    N: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    READ: tl.constexpr,
    WRITE: tl.constexpr,
) -> None:
    """Encode up to N blocks of L elements each; pointers are those of the first."""
    QMAX: tl.constexpr = (1 << (BITS - 1)) - 1
    SIZE: tl.constexpr = 4 if KIND == FP32 else 2
    j = tl.arange(0, M)[None, :]
    block = tl.arange(0, N)
    start = block[:, None] * BLOCK
    there = block < num_blocks
    mine = there[:, None] & (j < E)

    values = ()
    most = tl.zeros([N, M], tl.int32)
    for k in tl.static_range(8):
        inside = mine & (k * E + j < L)
        v = tl.load(x + (start + k * E + j), mask=inside, other=0.0)
        if READ:
            v = v + tl.load(residual + (start + k * E + j), mask=inside, other=0.0) * loss_scale
        most = tl.maximum(most, v.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        values = values + (v,)

    absmax = tl.max(most, axis=1).to(tl.float32, bitcast=True)
    qmax = tl.full([N], QMAX, tl.float32)
    bits = scale_bits(quotient(absmax, qmax), KIND)
    top = as_bits(scale_value(bits, KIND) * qmax)  # rounded up, it could decode a finite value to Inf
    bits = tl.where(top < 0x7F800000, bits, nan_bits(KIND)).to(tl.uint32)
    store_number(scales + block * SIZE, bits, there, SIZE)
    scale = scale_value(bits, KIND)
    coded = scale > 0.0
    lost = (scale != scale)[:, None]
    inverse = tl.where(coded, quotient(tl.full([N], 1.0, tl.float32), tl.where(coded, scale, 1.0)), 0.0)
    inverse, coded, scale = inverse[:, None], coded[:, None], scale[:, None]

    numbers = ()
    if STOCHASTIC:
        block_key = mix32((block.to(tl.uint32) + first_block.to(tl.uint32)) ^ key_low.to(tl.uint32))
        block_key = (block_key + key_high.to(tl.uint32))[:, None]
        hashes = ()
        for k in tl.static_range(4):
            hashes = hashes + (mix32((k * E + j).to(tl.uint32) + block_key),)
    for k in tl.static_range(8):
        if STOCHASTIC:
            word = hashes[k % 4]
            word = (word & 0xFFFF) if k < 4 else (word >> 16)
            dither = ((word + shift.to(tl.uint32)) & 0xFFFF).to(tl.int32).to(tl.float32)
            y = values[k] * inverse + (dither * 0.0000152587890625 + (QMAX + 0.00000762939453125))
        else:
            y = values[k] * inverse + (QMAX + 0.5)
        numbers = numbers + (tl.minimum(tl.where(coded, y, QMAX).to(tl.int32), 2 * QMAX),)

    packed = codes + (block[:, None] * (BLOCK // 8 * BITS) + j)
    if BITS == 8:
        for k in tl.static_range(8):
            tl.store(packed + k * E, numbers[k].to(tl.uint8), mask=mine)
    else:
        if BITS & 4:
            _store_plane(packed, numbers, E, mine, 4, 0)
        if BITS & 2:
            _store_plane(packed, numbers, E, mine, 2, BITS & 4)
        if BITS & 1:
            _store_plane(packed, numbers, E, mine, 1, BITS & 6)

    if WRITE:
        for k in tl.static_range(8):
            inside = mine & (k * E + j < L)
            error = (values[k] - (numbers[k] - QMAX).to(tl.float32) * scale) * inverse_loss_scale
            old = tl.load(residual + (start + k * E + j), mask=inside & lost, other=0.0)
            tl.store(new_residual + (start + k * E + j), tl.where(lost, old, error), mask=inside)


@jit
def encode_program(
    x: tl.tensor,
    residual: tl.tensor,
    new_residual: tl.tensor,
    payload: tl.tensor,
    n: tl.tensor,
    key_low: tl.tensor,
    key_high: tl.tensor,
    shift: tl.tensor,
    first_block: tl.tensor,
    loss_scale: tl.tensor,
    inverse_loss_scale: tl.tensor,
    N: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    READ: tl.constexpr,
    WRITE: tl.constexpr,
) -> None:
    """The program of some blocks; the last one has the shorter last block."""
    full = n.to(tl.int64) // BLOCK
    rest = (n.to(tl.int64) - full * BLOCK).to(tl.int32)
    first = tl.minimum(tl.program_id(0).to(tl.int64) * N, full)
    ELEMENTS: tl.constexpr = 16 if ALIGNED else 4
    CODES: tl.constexpr = ALIGNED if ALIGNED else 1
    x = move(x, first * BLOCK, ELEMENTS)
    residual = move(residual, first * BLOCK, ELEMENTS)
    new_residual = move(new_residual, first * BLOCK, ELEMENTS)
    scales = payload + first * (4 if KIND == FP32 else 2)
    codes_at = (full + tl.where(rest > 0, 1, 0)) * (4 if KIND == FP32 else 2)
    codes = move(payload, codes_at + first * (BLOCK // 8 * BITS), CODES)
    first_block = first_block + first.to(tl.int32)
    if first < full:
        _encode_blocks(
            x, residual, new_residual, scales, codes, full - first, BLOCK, BLOCK // 8,
            key_low, key_high, shift, first_block, loss_scale, inverse_loss_scale,
            N, M, BLOCK, BITS, KIND, STOCHASTIC, READ, WRITE,
        )  # fmt: skip
    else:
        _encode_blocks(
            x, residual, new_residual, scales, codes, 1, rest, (rest + 7) // 8,
            key_low, key_high, shift, first_block, loss_scale, inverse_loss_scale,
            N, M, BLOCK, BITS, KIND, STOCHASTIC, READ, WRITE,
        )  # fmt: skip
