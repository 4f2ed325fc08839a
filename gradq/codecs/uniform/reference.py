"""The truth: every kernel in plain torch, slow and obvious. Other backends equal it byte for byte.

Shapes: n elements in blocks of B = block_size; the last block holds L <= B of them and is padded with zeros
to the next multiple of 8. W is the number of ranks.

One segment on the wire (`uniform`)::

    scales   ceil(n / B) numbers in scale_dtype (fp32 | bf16 | fp16), little-endian
    codes    block after block, num_bits x padded length / 8 bytes each

A code is an unsigned integer in [0, 2 * qmax], qmax = 2**(num_bits-1) - 1, that stands for
(code - qmax) * scale. A block's codes are stored as planes of 4, 2 and 1 bits, the low bits first (3 bits =
a plane of 2, then one of 1; 8 bits = bytes). A plane of w bits puts the elements j, j + P*w/8, j + 2*P*w/8,
... of a block padded to P into byte j, the first in the lowest bits, so that a kernel reads and writes runs.

scale = absmax / qmax, rounded up to scale_dtype so that no value exceeds qmax. A block whose scale is below
2**-126 is sent as scale 0 (its residual keeps everything). A block with NaN or Inf, or whose scale or
qmax * scale overflows, is sent as scale NaN, so it decodes to NaN on every rank, and its residual is left as
it was.

Rounding: code = trunc(x / scale + qmax + u), u = 1/2 (nearest, ties up) or a 16-bit dither (stochastic):
elements j and j + P/2 of a block take the low and high half of one 32-bit hash.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradq.codecs.uniform.format import UniformFormat
from gradq.kernels.reference_tools import dither, mean_of_rows, new_residual_of, pack, unpack, value_of
from gradq.rng import EncodeContext

__all__ = ["decode", "decode_mean", "encode", "load_scale", "store_scale"]

_MIN_NORMAL = 2.0**-126


def encode(
    x: Tensor,
    payload: Tensor,
    form: UniformFormat,
    context: EncodeContext,
    residual: Tensor | None = None,
    new_residual: Tensor | None = None,
) -> None:
    """Encode x + loss_scale * residual; see the module docstring for the format."""
    n, qmax = x.numel(), form.qmax
    value = value_of(x, residual, context.loss_scale)
    decoded = torch.empty_like(value)
    kept = torch.zeros(n, dtype=torch.bool)  # elements whose residual stays as it was
    position = form.scale_bytes(n)
    for block in range(-(-n // form.block_size)):
        span = slice(block * form.block_size, min((block + 1) * form.block_size, n))
        padded = -(-(span.stop - span.start) // 8) * 8
        value_P = torch.zeros(padded, dtype=torch.float32)
        value_P[: span.stop - span.start] = value[span]
        absmax = value_P.view(torch.int32).bitwise_and(0x7FFFFFFF).amax().view(torch.float32)
        scale = store_scale(payload, block, absmax, qmax, form.scale_dtype)
        if bool(scale > 0):
            if form.stochastic:
                blocks = torch.tensor(context.first_block + block)
                u_P = dither(context.key, blocks, context.shift, padded) * 2.0**-16 + (qmax + 2.0**-17)
            else:
                u_P = torch.full((padded,), qmax + 0.5, dtype=torch.float32)
            inverse = torch.tensor(1.0) / scale
            codes_P = (value_P * inverse + u_P).to(torch.int32).clamp_(max=2 * qmax)
        else:
            codes_P = torch.full((padded,), qmax, dtype=torch.int32)
            kept[span] = bool(torch.isnan(scale))
        size = padded * form.num_bits // 8
        payload[position : position + size] = pack(codes_P, form.num_bits)
        position += size
        decoded[span] = ((codes_P - qmax).to(torch.float32) * scale)[: span.stop - span.start]
    if new_residual is not None:
        new_residual.copy_(new_residual_of(value, decoded, residual, kept, context.loss_scale))


def decode(payload: Tensor, out: Tensor, form: UniformFormat) -> None:
    """Decode one segment into out."""
    n = out.numel()
    position = form.scale_bytes(n)
    for block in range(-(-n // form.block_size)):
        span = slice(block * form.block_size, min((block + 1) * form.block_size, n))
        size = -(-(span.stop - span.start) // 8) * form.num_bits
        codes_P = unpack(payload[position : position + size], form.num_bits)
        position += size
        scale = load_scale(payload, block, form.scale_dtype)
        out[span] = ((codes_P - form.qmax).to(torch.float32) * scale)[: span.stop - span.start]


def decode_mean(payloads: Tensor, out: Tensor, form: UniformFormat) -> None:
    """Mean over the W rows of payloads, added in row order in fp32, divided once."""
    mean_of_rows(lambda payload, to: decode(payload, to, form), payloads, out)


# --- scales --------------------------------------------------------------------------------------------


def store_scale(scale_bytes: Tensor, block: int, absmax: Tensor, qmax: int, dtype: torch.dtype) -> Tensor:
    """Write the scale of a block whose largest magnitude is absmax; returns what it will be read as."""
    size = dtype.itemsize
    place = scale_bytes[block * size : (block + 1) * size]
    for scale in (absmax / qmax, torch.tensor(torch.nan)):
        raw = list(_scale_bits(scale, dtype).to_bytes(size, "little"))
        place.copy_(torch.tensor(raw, dtype=torch.uint8))
        stored = load_scale(scale_bytes, block, dtype)
        if bool(torch.isfinite(stored * qmax)):  # rounded up, it could decode a finite value to Inf
            break
    return stored


def load_scale(scale_bytes: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """The scale of a block, fp32."""
    size = dtype.itemsize
    scale = scale_bytes[block * size : (block + 1) * size].clone().view(dtype).to(torch.float32)[0]
    # one NaN everywhere: torch's fp16 conversion has two, depending on the tensor's length
    return torch.where(scale.isnan(), torch.nan, scale)


def _scale_bits(scale: Tensor, dtype: torch.dtype) -> int:
    """The bits of a non-negative fp32 scale in dtype, rounded up; 0 below 2**-126, NaN if not finite."""
    if not bool(torch.isfinite(scale)):
        return {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}[dtype]
    if scale < _MIN_NORMAL:
        return 0
    bits = int(scale.view(torch.int32))
    if dtype == torch.float32:
        return bits
    if dtype == torch.bfloat16:
        up = (bits + 0xFFFF) >> 16
        return 0x7FC0 if up >= 0x7F80 else up
    exponent = (bits >> 23) - 112  # fp16 exponent field if it is a normal number there
    if exponent >= 1:
        up = (bits - (112 << 23) + 0x1FFF) >> 13
        return 0x7E00 if up >= 0x7C00 else up
    mantissa = (bits & 0x7FFFFF) | 0x800000
    drop = min(14 - exponent, 25)  # 24-bit mantissa to units of 2**-24, rounded up
    return (mantissa + (1 << drop) - 1) >> drop
