"""The uniform codec in Triton: byte for byte what `gradq.codecs.uniform.reference` writes.

A program takes some blocks. A block of P elements (its length padded to 8) is cut into eight octants of
E = P / 8: planes of 4, 2 and 1 bits put elements into a byte that are P/2, P/4 or P/8 apart, so they are the
same place in different octants, and packing needs no exchange between threads. Octants are tensors [N, M]: N
blocks, M >= E a power of two. The last block, if it is shorter, has a program of its own.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from gradq.codecs.uniform.cuda_decode import decode_program
from gradq.codecs.uniform.cuda_encode import encode_program
from gradq.codecs.uniform.cuda_scales import KIND
from gradq.codecs.uniform.format import UniformFormat
from gradq.kernels.triton_tools import aligned, check, check_rows, launch, signed32
from gradq.rng import EncodeContext

__all__ = ["decode", "decode_mean", "encode"]

_ELEMENTS = 4096  # elements of a program, about
# registers of a thread of the decoder, so that more programs run at a time; only the short last block, whose
# loads are of single bytes, has some in memory then. Other widths are left to the compiler
_REGISTERS = {8: 80, 4: 72, 3: 72, 2: 72}


def _shape(n: int, block_size: int) -> tuple[int, int, int]:
    """Programs, and N and M."""
    M = triton.next_power_of_2(block_size // 8)
    N = max(_ELEMENTS // (8 * M), 1)
    return -(-(n // block_size) // N) + (n % block_size > 0), N, M


def _alignment(payload: Tensor, stride: int, n: int, form: UniformFormat) -> int:
    """The number, 4 or 2, of which the codes' addresses are multiples in every block and row; else 0."""
    codes_at = payload.data_ptr() + form.scale_bytes(n)
    if form.block_size % 32:
        return 0
    return next((size for size in (4, 2) if codes_at % size == 0 and stride % size == 0), 0)


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
    if (n := x.numel()) == 0:
        return
    device, key, scale = x.device, context.key, float(context.loss_scale)
    check(x, torch.float32, n, device)
    check(payload, torch.uint8, form.nbytes(n), device)
    old = x if residual is None else check(residual, torch.float32, n, device)
    new = x if new_residual is None else check(new_residual, torch.float32, n, device)
    programs, N, M = _shape(n, form.block_size)
    can = _alignment(payload, 0, n, form) if aligned(x, old, new) else 0
    launch(
        encode_program, programs, x, x, old, new, payload, n, signed32(key), signed32(key >> 32),
        context.shift, signed32(context.first_block), scale, 1.0 / scale,
        N=N, M=M, BLOCK=form.block_size, BITS=form.num_bits, KIND=KIND[form.scale_dtype], ALIGNED=can,
        STOCHASTIC=form.stochastic, READ=residual is not None, WRITE=new_residual is not None,
    )  # fmt: skip


def decode(payload: Tensor, out: Tensor, form: UniformFormat) -> None:
    """Decode one segment into out."""
    decode_mean(payload[None], out, form)


def decode_mean(payloads: Tensor, out: Tensor, form: UniformFormat) -> None:
    """Mean over the W rows of payloads, added in row order in fp32, divided once."""
    if (n := out.numel()) == 0:
        return
    check(out, torch.float32, n, out.device)
    num_rows, stride = check_rows(payloads, form.nbytes(n), out.device)
    programs, N, M = _shape(n, form.block_size)
    can = _alignment(payloads, stride, n, form) if aligned(out) else 0
    launch(
        decode_program, programs, out, payloads, out, n, num_rows, stride, 1.0 / num_rows,
        N=N, M=M, BLOCK=form.block_size, BITS=form.num_bits, KIND=KIND[form.scale_dtype], ALIGNED=can,
        EXACT_RECIPROCAL=num_rows & (num_rows - 1) == 0, maxnreg=_REGISTERS.get(form.num_bits),
    )  # fmt: skip
