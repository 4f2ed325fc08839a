"""The truth of the top-k codec, in plain torch.

Shapes: n elements in blocks of B; the last holds L <= B. k elements of a block are kept, those of the largest
magnitude; among equal ones, the first.

One segment on the wire: a bf16 scale for each block, then block after block::

    codes    of the kept elements, in the order of their indices, padded to P, a multiple of 8, with zeros,
             as planes (see `gradq.codecs.uniform.reference`); a code stands for (code - qmax) * scale
    high     the upper part of the indices, in unary (Elias-Fano): with l low bits, bit (index_i >> l) + i is
             one for i = 0, 1, ... k - 1; k + ((L - 1) >> l) bits, padded to bytes, the lowest bits first
    low      the l lowest bits of every index, one after another, padded to bytes

    l = floor(log2(L / k)), so that an index takes between 2 + l and 3 + l bits: 8.6 for 41 of 4096, where the
    index itself would take 12, and the size is the same whatever is kept.

Scales are rounded up and never make Inf, as in `gradq.codecs.uniform.reference`: scale = absmax / qmax, 0
for blocks that are too small, NaN for a block with NaN or Inf (which decodes to NaN, every element, on every
rank, and leaves its residual as it was). The other bytes of a block with scale 0 or NaN are zero.
Rounding: code = trunc(x / scale + qmax + 1/2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradq.codecs.topk.format import SCALE_BYTES, Block, TopKFormat
from gradq.codecs.uniform.reference import load_scale, store_scale
from gradq.kernels.reference_tools import mean_of_rows, new_residual_of, pack, unpack, value_of
from gradq.rng import EncodeContext

__all__ = ["decode", "decode_mean", "encode"]


def _to_bytes(bits: Tensor, nbytes: int) -> Tensor:
    """Bits, the lowest first, to bytes."""
    padded = torch.zeros(8 * nbytes, dtype=torch.int64)
    padded[: bits.numel()] = bits
    return (padded.view(-1, 8) << torch.arange(8)).sum(1).to(torch.uint8)


def _to_bits(data: Tensor) -> Tensor:
    return ((data.to(torch.int64)[:, None] >> torch.arange(8)) & 1).view(-1)


def _pack_indices(indices_k: Tensor, block: Block) -> Tensor:
    k, low = block.kept, block.low_bits
    high = torch.zeros(8 * block.high_bytes, dtype=torch.int64)
    high[(indices_k >> low) + torch.arange(k)] = 1
    low_kl = (indices_k[:, None] >> torch.arange(low)) & 1
    return torch.cat((_to_bytes(high, block.high_bytes), _to_bytes(low_kl.reshape(-1), block.low_bytes)))


def _unpack_indices(data: Tensor, block: Block) -> Tensor:
    k, low = block.kept, block.low_bits
    ones = _to_bits(data[: block.high_bytes]).nonzero()[:k, 0]
    low_kl = _to_bits(data[block.high_bytes :])[: k * low].view(k, low)
    return ((ones - torch.arange(k)) << low) + (low_kl << torch.arange(low)).sum(1)


def encode(
    x: Tensor,
    payload: Tensor,
    form: TopKFormat,
    context: EncodeContext,
    residual: Tensor | None = None,
    new_residual: Tensor | None = None,
) -> None:
    """Encode x + loss_scale * residual; see the module docstring for the format."""
    n, qmax = x.numel(), (1 << (form.num_bits - 1)) - 1
    value = value_of(x, residual, context.loss_scale)
    decoded, kept_as_was = torch.zeros_like(value), torch.zeros(n, dtype=torch.bool)
    num_blocks = -(-n // form.block_size)
    position = num_blocks * SCALE_BYTES
    for number in range(num_blocks):
        span = slice(number * form.block_size, min((number + 1) * form.block_size, n))
        block, value_L = form.block(span.stop - span.start), value[span]
        magnitudes = value_L.view(torch.int32).bitwise_and(0x7FFFFFFF)
        scale = store_scale(payload, number, magnitudes.amax().view(torch.float32), qmax, torch.bfloat16)
        data = payload[position : position + block.nbytes].zero_()
        position += block.nbytes
        if bool(scale > 0):
            order = torch.sort(magnitudes, descending=True, stable=True).indices
            indices_k = order[: block.kept].sort().values
            codes_P = torch.full((block.padded,), qmax, dtype=torch.int32)
            codes_P[: block.kept] = (value_L[indices_k] * (1 / scale) + (qmax + 0.5)).to(torch.int32)
            codes_P.clamp_(0, 2 * qmax)
            data[: block.code_bytes] = pack(codes_P, form.num_bits)
            data[block.code_bytes :] = _pack_indices(indices_k, block)
            decoded[span][indices_k] = (codes_P[: block.kept] - qmax) * scale
        kept_as_was[span] = bool(scale.isnan())
    if new_residual is not None:
        new_residual.copy_(new_residual_of(value, decoded, residual, kept_as_was, context.loss_scale))


def decode(payload: Tensor, out: Tensor, form: TopKFormat) -> None:
    """Decode one segment into out."""
    n, qmax = out.numel(), (1 << (form.num_bits - 1)) - 1
    out.zero_()
    num_blocks = -(-n // form.block_size)
    position = num_blocks * SCALE_BYTES
    for number in range(num_blocks):
        span = slice(number * form.block_size, min((number + 1) * form.block_size, n))
        block = form.block(span.stop - span.start)
        scale = load_scale(payload, number, torch.bfloat16)
        data = payload[position : position + block.nbytes]
        position += block.nbytes
        if bool(scale.isnan()):
            out[span] = torch.nan
        elif bool(scale > 0):
            codes_P = unpack(data[: block.code_bytes], form.num_bits)
            indices_k = _unpack_indices(data[block.code_bytes :], block)
            out[span][indices_k] = (codes_P[: block.kept] - qmax) * scale


def decode_mean(payloads: Tensor, out: Tensor, form: TopKFormat) -> None:
    """Mean over the W rows of payloads, added in row order in fp32, divided once."""
    mean_of_rows(lambda payload, to: decode(payload, to, form), payloads, out)
