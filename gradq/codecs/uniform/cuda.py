"""The uniform codec in Triton: byte for byte what `gradq.codecs.uniform.reference` writes.

A program takes some blocks. A block of P elements (its length padded to 8) is cut into eight octants of
E = P / 8: planes of 4, 2 and 1 bits put elements into a byte that are P/2, P/4 or P/8 apart, so they are the
same place in different octants, and packing needs no exchange between threads. Octants are tensors [N, M]: N
blocks, M >= E a power of two. The last block, if it is shorter, has a program of its own.

The decoder's sums in their present form were not run on a GPU, only in Triton's interpreter: products fused
with the sum where they are exact, and the next payload's bytes on their way while one is summed.
"""

# Triton unrolls loops over tuples, and a tuple grows by a sum.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradq.kernels.triton_tools import (
    aligned,
    as_bits,
    as_float,
    check,
    check_rows,
    fused,
    jit,
    launch,
    load_number,
    mix32,
    move,
    quotient,
    signed32,
    store_number,
)

__all__ = ["uniform_decode", "uniform_decode_mean", "uniform_encode"]

_FP32, _BF16, _FP16 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_KIND = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ELEMENTS = 4096  # of a program, about
# registers of a thread of the decoder, so that more programs run at a time; only the short last block, whose
# loads are of single bytes, has some in memory then. Other widths are left to the compiler
_REGISTERS = {8: 80, 4: 72, 3: 72, 2: 72}


# --- scales --------------------------------------------------------------------------------------------


@jit
def _nan_bits(KIND: tl.constexpr) -> tl.tensor:
    return 0x7FC00000 if KIND == _FP32 else (0x7FC0 if KIND == _BF16 else 0x7E00)


@jit
def _scale_bits(scale: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """As in the reference: rounded up, 0 for tiny scales, NaN for what is not finite."""
    bits = as_bits(scale)
    if KIND == _FP32:
        rounded = bits
    elif KIND == _BF16:
        rounded = (bits + 0xFFFF) >> 16
        rounded = tl.where(rounded >= 0x7F80, 0x7FC0, rounded)
    else:
        exponent = (bits >> 23).to(tl.int32) - 112
        rounded = (bits - (112 << 23) + 0x1FFF) >> 13
        rounded = tl.where(rounded >= 0x7C00, 0x7E00, rounded)
        mantissa = (bits & 0x7FFFFF) | 0x800000
        drop = tl.minimum(tl.maximum(14 - exponent, 0), 25).to(tl.uint32)
        subnormal = (mantissa + (1 << drop).to(tl.uint32) - 1) >> drop
        rounded = tl.where(exponent >= 1, rounded, subnormal)
    rounded = tl.where(bits < 0x00800000, 0, rounded)
    return tl.where(bits >= 0x7F800000, _nan_bits(KIND), rounded).to(tl.uint32)


@jit
def _scale_value(bits: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    if KIND == _FP32:
        return as_float(bits)
    if KIND == _BF16:
        return as_float(bits << 16)
    value = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where(value != value, as_float(tl.full(bits.shape, 0x7FC00000, tl.uint32)), value)


# --- encode --------------------------------------------------------------------------------------------


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
    SIZE: tl.constexpr = 4 if KIND == _FP32 else 2
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
    bits = _scale_bits(quotient(absmax, qmax), KIND)
    top = as_bits(_scale_value(bits, KIND) * qmax)  # rounded up, it could decode a finite value to Inf
    bits = tl.where(top < 0x7F800000, bits, _nan_bits(KIND)).to(tl.uint32)
    store_number(scales + block * SIZE, bits, there, SIZE)
    scale = _scale_value(bits, KIND)
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
def _encode(
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
    full = n.to(tl.int64) // BLOCK
    rest = (n.to(tl.int64) - full * BLOCK).to(tl.int32)
    first = tl.minimum(tl.program_id(0).to(tl.int64) * N, full)
    ELEMENTS: tl.constexpr = 16 if ALIGNED else 4
    CODES: tl.constexpr = ALIGNED if ALIGNED else 1
    x = move(x, first * BLOCK, ELEMENTS)
    residual = move(residual, first * BLOCK, ELEMENTS)
    new_residual = move(new_residual, first * BLOCK, ELEMENTS)
    scales = payload + first * (4 if KIND == _FP32 else 2)
    codes_at = (full + tl.where(rest > 0, 1, 0)) * (4 if KIND == _FP32 else 2)
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


def _shape(n: int, block_size: int) -> tuple[int, int, int]:
    """Programs, and N and M."""
    M = triton.next_power_of_2(block_size // 8)
    N = max(_ELEMENTS // (8 * M), 1)
    return -(-(n // block_size) // N) + (n % block_size > 0), N, M


def _payload_bytes(n: int, num_bits: int, block_size: int, scale_dtype: torch.dtype) -> int:
    return -(-n // block_size) * scale_dtype.itemsize + -(-n // 8) * num_bits


def _alignment(payload: Tensor, stride: int, n: int, block_size: int, scale_dtype: torch.dtype) -> int:
    """Of what, 4 or 2, the codes' addresses are multiples in every block and row; 0 if of neither."""
    codes_at = payload.data_ptr() + -(-n // block_size) * scale_dtype.itemsize
    if block_size % 32:
        return 0
    return next((size for size in (4, 2) if codes_at % size == 0 and stride % size == 0), 0)


def uniform_encode(
    x: Tensor,
    payload: Tensor,
    *,
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
    """Encode x + loss_scale * residual in one pass; the format is the reference's."""
    assert new_residual is None or residual is not None
    if (n := x.numel()) == 0:
        return
    device = x.device
    check(x, torch.float32, n, device)
    check(payload, torch.uint8, _payload_bytes(n, num_bits, block_size, scale_dtype), device)
    old = x if residual is None else check(residual, torch.float32, n, device)
    new = x if new_residual is None else check(new_residual, torch.float32, n, device)
    programs, N, M = _shape(n, block_size)
    can = _alignment(payload, 0, n, block_size, scale_dtype) if aligned(x, old, new) else 0
    launch(
        _encode, programs, x, x, old, new, payload, n, signed32(key), signed32(key >> 32), shift,
        signed32(first_block), float(loss_scale), 1.0 / loss_scale,
        N=N, M=M, BLOCK=block_size, BITS=num_bits, KIND=_KIND[scale_dtype], ALIGNED=can,
        STOCHASTIC=stochastic, READ=residual is not None, WRITE=new_residual is not None,
    )  # fmt: skip


# --- decode --------------------------------------------------------------------------------------------


_BIAS = tl.constexpr(0x4B000000)  # the bits of 2**23: with those of an integer below, of their sum in fp32


@jit
def _load_plane(
    packed: tl.tensor, E: tl.tensor, mine: tl.tensor, W: tl.constexpr, DONE: tl.constexpr
) -> tl.tensor:
    """The W bytes of a plane of W bits above the DONE lowest; eight bits: whole codes."""
    plane = ()
    for b in tl.static_range(W):
        plane = plane + (tl.load(packed + (DONE + b) * E, mask=mine, other=0).to(tl.int32),)
    return plane


@jit
def _field(plane: tl.tensor, K: tl.constexpr, W: tl.constexpr, TO: tl.constexpr) -> tl.tensor:
    """The W bits of octant K, moved up to bit TO of a number."""
    return (plane[K % W] << (TO - W * (K // W))) & (((1 << W) - 1) << TO)


@jit
def _difference(
    widest: tl.tensor,
    plane2: tl.tensor,
    plane1: tl.tensor,
    K: tl.constexpr,
    W: tl.constexpr,
    AT: tl.constexpr,
    BITS: tl.constexpr,
) -> tl.tensor:
    """Code - QMAX of octant K, times 2**AT: the widest plane's W bits stay where they are, others go on top.

    Exact, and cheaper than shifts of every code and conversions, which have half the rate of sums.
    """
    QMAX: tl.constexpr = (1 << (BITS - 1)) - 1
    code = widest[K % W] & (_BIAS | (((1 << W) - 1) << AT))
    if W == 4 and BITS & 2:
        code = code | _field(plane2, K, 2, AT + 4)
    if BITS & 1:
        code = code | _field(plane1, K, 1, AT + (BITS & 6))
    return as_float(code) - (8388608.0 + QMAX * (1 << AT))


@jit
def _load_row(
    scales: tl.tensor,
    codes: tl.tensor,
    E: tl.tensor,
    there: tl.tensor,
    mine: tl.tensor,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
) -> tl.tensor:
    """Of the blocks of one payload: scales [N, 1], and the bytes of the planes, the widest first."""
    W: tl.constexpr = 8 if BITS == 8 else (4 if BITS & 4 else 2)
    bits = load_number(scales, there, 4 if KIND == _FP32 else 2)
    widest = _load_plane(codes, E, mine, W, 0)
    plane2 = ()
    plane1 = ()
    if W == 4 and BITS & 2:
        plane2 = _load_plane(codes, E, mine, 2, 4)
    if BITS & 1:
        plane1 = _load_plane(codes, E, mine, 1, BITS & 6)
    return bits, widest, plane2, plane1


@jit
def _add_row(sums: tl.tensor, row: tl.tensor, BITS: tl.constexpr, KIND: tl.constexpr) -> tl.tensor:
    """The eight sums with what `_load_row` gave added."""
    W: tl.constexpr = 8 if BITS == 8 else (4 if BITS & 4 else 2)
    scale = _scale_value(row[0], KIND)[:, None]
    widest = ()
    for b in tl.static_range(W):
        widest = widest + (row[1][b] | _BIAS,)
    values = ()
    for k in tl.static_range(8):
        code = _difference(widest, row[2], row[3], k, W, W * (k // W), BITS)
        unit = 1.0 / (1 << W * (k // W))
        if KIND == _FP32:
            values = values + (sums[k] + code * unit * scale,)
        else:  # the product has few bits and is exact: fused with the sum it is rounded as often
            values = values + (fused(code, scale * unit, sums[k]),)
    return values


@jit
def _mean_blocks(
    scales: tl.tensor,
    codes: tl.tensor,
    out: tl.tensor,
    num_blocks: tl.tensor,
    L: tl.tensor,
    E: tl.tensor,
    num_rows: tl.tensor,
    stride: tl.tensor,
    reciprocal: tl.tensor,
    N: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    EXACT_RECIPROCAL: tl.constexpr,
) -> None:
    CODES: tl.constexpr = ALIGNED if ALIGNED else 1
    j = tl.arange(0, M)[None, :]
    block = tl.arange(0, N)
    start = block[:, None] * BLOCK
    there = block < num_blocks
    mine = there[:, None] & (j < E)
    scale_at = block * (4 if KIND == _FP32 else 2)
    code_at = block[:, None] * (BLOCK // 8 * BITS) + j
    zero = tl.full([N, M], -1.0, tl.float32) * 0.0  # -0: -0 + v is v, for every v
    sums = (zero, zero, zero, zero, zero, zero, zero, zero)
    row = _load_row(scales + scale_at, codes + code_at, E, there, mine, BITS, KIND)
    for _ in range(num_rows - 1):  # the next row is on its way while one is summed
        scales = scales + stride
        codes = move(codes, stride, CODES)
        following = _load_row(scales + scale_at, codes + code_at, E, there, mine, BITS, KIND)
        sums = _add_row(sums, row, BITS, KIND)
        row = following
    sums = _add_row(sums, row, BITS, KIND)
    for k in tl.static_range(8):
        if EXACT_RECIPROCAL:  # of a power of two: a product with it equals the quotient
            mean = sums[k] * reciprocal
        else:
            mean = quotient(sums[k], tl.full([N, M], 1.0, tl.float32) * num_rows.to(tl.float32))
        tl.store(out + (start + k * E + j), mean, mask=mine & (k * E + j < L))


@jit
def _decode_mean(
    payloads: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    num_rows: tl.tensor,
    stride: tl.tensor,
    reciprocal: tl.tensor,
    N: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    EXACT_RECIPROCAL: tl.constexpr,
) -> None:
    full = n.to(tl.int64) // BLOCK
    rest = (n.to(tl.int64) - full * BLOCK).to(tl.int32)
    first = tl.minimum(tl.program_id(0).to(tl.int64) * N, full)
    out = move(out, first * BLOCK, 16 if ALIGNED else 4)
    scales = payloads + first * (4 if KIND == _FP32 else 2)
    codes_at = (full + tl.where(rest > 0, 1, 0)) * (4 if KIND == _FP32 else 2)
    codes = move(payloads, codes_at + first * (BLOCK // 8 * BITS), ALIGNED if ALIGNED else 1)
    stride = stride.to(tl.int64)
    if first < full:
        _mean_blocks(
            scales, codes, out, full - first, BLOCK, BLOCK // 8, num_rows, stride, reciprocal,
            N, M, BLOCK, BITS, KIND, ALIGNED, EXACT_RECIPROCAL,
        )  # fmt: skip
    else:
        _mean_blocks(
            scales, codes, out, 1, rest, (rest + 7) // 8, num_rows, stride, reciprocal,
            N, M, BLOCK, BITS, KIND, ALIGNED, EXACT_RECIPROCAL,
        )  # fmt: skip


def uniform_decode(
    payload: Tensor, out: Tensor, *, num_bits: int, block_size: int, scale_dtype: torch.dtype
) -> None:
    """Decode one segment into out."""
    form: dict[str, Any] = {"num_bits": num_bits, "block_size": block_size, "scale_dtype": scale_dtype}
    uniform_decode_mean(payload[None], out, **form)


def uniform_decode_mean(
    payloads: Tensor, out: Tensor, *, num_bits: int, block_size: int, scale_dtype: torch.dtype
) -> None:
    """Mean over the W rows of payloads, added in row order in fp32, divided once."""
    if (n := out.numel()) == 0:
        return
    check(out, torch.float32, n, out.device)
    nbytes = _payload_bytes(n, num_bits, block_size, scale_dtype)
    num_rows, stride = check_rows(payloads, nbytes, out.device)
    programs, N, M = _shape(n, block_size)
    can = _alignment(payloads, stride, n, block_size, scale_dtype) if aligned(out) else 0
    launch(
        _decode_mean, programs, out, payloads, out, n, num_rows, stride, 1.0 / num_rows,
        N=N, M=M, BLOCK=block_size, BITS=num_bits, KIND=_KIND[scale_dtype], ALIGNED=can,
        EXACT_RECIPROCAL=num_rows & (num_rows - 1) == 0, maxnreg=_REGISTERS.get(num_bits),
    )  # fmt: skip
