"""The decoder of the uniform codecs in Triton; see `gradq.codecs.uniform.cuda` for octants.

Its sums in their present form were not run on a GPU, only in Triton's interpreter: products fused with the
sum where they are exact, and the next payload's bytes on their way while one is summed.
"""

# Triton unrolls loops over tuples, and a tuple grows by a sum.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

import triton.language as tl

from gradq.codecs.uniform.cuda_scales import FP32, scale_value
from gradq.kernels.triton_tools import as_float, fused, jit, load_number, move, quotient

__all__ = ["decode_program"]

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
    bits = load_number(scales, there, 4 if KIND == FP32 else 2)
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
    scale = scale_value(row[0], KIND)[:, None]
    widest = ()
    for b in tl.static_range(W):
        widest = widest + (row[1][b] | _BIAS,)
    values = ()
    for k in tl.static_range(8):
        code = _difference(widest, row[2], row[3], k, W, W * (k // W), BITS)
        unit = 1.0 / (1 << W * (k // W))
        if KIND == FP32:
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
    scale_at = block * (4 if KIND == FP32 else 2)
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
def decode_program(
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
    """The program of some blocks; the last one has the shorter last block."""
    full = n.to(tl.int64) // BLOCK
    rest = (n.to(tl.int64) - full * BLOCK).to(tl.int32)
    first = tl.minimum(tl.program_id(0).to(tl.int64) * N, full)
    out = move(out, first * BLOCK, 16 if ALIGNED else 4)
    scales = payloads + first * (4 if KIND == FP32 else 2)
    codes_at = (full + tl.where(rest > 0, 1, 0)) * (4 if KIND == FP32 else 2)
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
