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

__all__ = [
    "exact_decode",
    "exact_decode_mean",
    "exact_encode",
    "fused",
    "uniform_decode",
    "uniform_decode_mean",
    "uniform_encode",
    "warm_up",
]

_MASK32 = 0xFFFFFFFF
_MIN_NORMAL = 2.0**-126
_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def warm_up() -> None:
    """Nothing to compile."""


def fused(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """A b + c in fp32, rounded once, as a fused multiply-add does.

    fp64 holds the product, and the sum's own error says on which side of a tie of fp32 it lies: its last bit
    is made odd if anything was lost, so that rounding a second time does no harm.

    References:
        Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding
        to odd", IEEE Trans. Computers, 2008.
    """
    product = a.double() * torch.as_tensor(b, dtype=torch.float32).double()
    addend = torch.as_tensor(c, dtype=torch.float32).double().expand_as(product)
    total = product + addend
    rest = total - product
    lost = (product - (total - rest)) + (addend - rest)
    bits = total.view(torch.int64)
    away = torch.where((lost > 0) == (total > 0), 1, -1)
    odd = torch.where(lost.isfinite() & (lost != 0) & (bits & 1 == 0), bits + away, bits)
    return odd.view(torch.float64).float()


# --- exact ---------------------------------------------------------------------------------------------


def exact_encode(x: Tensor, payload: Tensor, *, wire_dtype: torch.dtype) -> None:
    """Write x to the payload in wire_dtype (round to nearest even where it is narrower)."""
    payload.view(wire_dtype).copy_(x)


def exact_decode(payload: Tensor, out: Tensor, *, wire_dtype: torch.dtype) -> None:
    """Read a payload written by `exact_encode`."""
    out.copy_(payload.view(wire_dtype))


def exact_decode_mean(payloads: Tensor, out: Tensor, *, wire_dtype: torch.dtype) -> None:
    """Mean over the W rows of payloads, added in row order in out's dtype, divided once."""
    out.copy_(payloads[0].view(wire_dtype))
    for row in payloads[1:]:
        out.add_(row.view(wire_dtype))
    out.div_(payloads.shape[0])


# --- uniform -------------------------------------------------------------------------------------------


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
    """Encode x + loss_scale * residual; see the module docstring for the format."""
    n = x.numel()
    if n == 0:
        return
    qmax = (1 << (num_bits - 1)) - 1
    value = x.clone() if residual is None else x + residual * torch.tensor(loss_scale, dtype=torch.float32)
    decoded = torch.empty_like(value)
    kept = torch.zeros(n, dtype=torch.bool)  # elements whose residual stays as it was
    num_blocks = -(-n // block_size)
    scale_bytes = payload[: num_blocks * scale_dtype.itemsize]
    code_bytes = payload[num_blocks * scale_dtype.itemsize :]
    position = 0
    for block in range(num_blocks):
        span = slice(block * block_size, min((block + 1) * block_size, n))
        padded = -(-(span.stop - span.start) // 8) * 8
        value_P = torch.zeros(padded, dtype=torch.float32)
        value_P[: span.stop - span.start] = value[span]
        absmax = value_P.view(torch.int32).bitwise_and(0x7FFFFFFF).amax().view(torch.float32)
        scale_bits = _scale_bits(absmax / qmax, scale_dtype)
        scale = _scale_value(scale_bits, scale_dtype)
        if not bool(torch.isfinite(scale * qmax)):  # rounded up, it could decode a finite value to Inf
            scale_bits = _scale_bits(torch.tensor(torch.nan), scale_dtype)
            scale = torch.tensor(torch.nan)
        if bool(torch.isfinite(scale)) and scale > 0:
            if stochastic:
                u_P = _dither(key, first_block + block, shift, padded) * 2.0**-16 + (qmax + 2.0**-17)
            else:
                u_P = torch.full((padded,), qmax + 0.5, dtype=torch.float32)
            inverse = torch.tensor(1.0) / scale
            codes_P = (value_P * inverse + u_P).to(torch.int32).clamp_(max=2 * qmax)
        else:
            codes_P = torch.full((padded,), qmax, dtype=torch.int32)
            kept[span] = bool(torch.isnan(scale))
        _store_scale(scale_bytes, block, scale_bits, scale_dtype)
        size = padded * num_bits // 8
        code_bytes[position : position + size] = _pack(codes_P, num_bits)
        position += size
        decoded[span] = ((codes_P - qmax).to(torch.float32) * scale)[: span.stop - span.start]
    if new_residual is not None:
        assert residual is not None
        error = (value - decoded) * torch.tensor(1.0 / loss_scale, dtype=torch.float32)
        new_residual.copy_(torch.where(kept, residual, error))


def uniform_decode(
    payload: Tensor, out: Tensor, *, num_bits: int, block_size: int, scale_dtype: torch.dtype
) -> None:
    """Decode one segment into out."""
    n = out.numel()
    if n == 0:
        return
    qmax = (1 << (num_bits - 1)) - 1
    num_blocks = -(-n // block_size)
    scale_bytes = payload[: num_blocks * scale_dtype.itemsize]
    code_bytes = payload[num_blocks * scale_dtype.itemsize :]
    position = 0
    for block in range(num_blocks):
        span = slice(block * block_size, min((block + 1) * block_size, n))
        padded = -(-(span.stop - span.start) // 8) * 8
        size = padded * num_bits // 8
        codes_P = _unpack(code_bytes[position : position + size], num_bits, padded)
        position += size
        scale = _scale_value(_load_scale(scale_bytes, block, scale_dtype), scale_dtype)
        out[span] = ((codes_P - qmax).to(torch.float32) * scale)[: span.stop - span.start]


def uniform_decode_mean(
    payloads: Tensor, out: Tensor, *, num_bits: int, block_size: int, scale_dtype: torch.dtype
) -> None:
    """Mean over the W rows of payloads, added in row order in fp32, divided once."""
    row = torch.empty_like(out)
    for rank, payload in enumerate(payloads):
        target = out if rank == 0 else row
        uniform_decode(payload, target, num_bits=num_bits, block_size=block_size, scale_dtype=scale_dtype)
        if rank > 0:
            out.add_(row)
    out.div_(payloads.shape[0])


def _mix32(h: Tensor) -> Tensor:
    """lowbias32 on 32-bit values held in int64 (products wrap at 2**64; the low 32 bits are right)."""
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & _MASK32
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & _MASK32
    return h ^ (h >> 16)


def _dither(key: int, block: int, shift: int, padded: int) -> Tensor:
    """The 16-bit dithers of a block as fp32 integers, [padded]."""
    low, high = key & _MASK32, key >> 32
    block_key = (int(_mix32(torch.tensor((block & _MASK32) ^ low))) + high) & _MASK32
    h = _mix32((torch.arange(padded // 2) + block_key) & _MASK32)
    u = torch.cat((h & 0xFFFF, h >> 16))
    return ((u + shift) & 0xFFFF).to(torch.float32)


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


def _scale_value(bits: int, dtype: torch.dtype) -> Tensor:
    raw = torch.tensor(list(bits.to_bytes(dtype.itemsize, "little")), dtype=torch.uint8)
    scale = raw.view(dtype).to(torch.float32)[0]
    # one NaN everywhere: torch's fp16 conversion has two, depending on the tensor's length
    return torch.where(scale.isnan(), torch.nan, scale)


def _store_scale(scale_bytes: Tensor, block: int, bits: int, dtype: torch.dtype) -> None:
    size = dtype.itemsize
    raw = list(bits.to_bytes(size, "little"))
    scale_bytes[block * size : (block + 1) * size] = torch.tensor(raw, dtype=torch.uint8)


def _load_scale(scale_bytes: Tensor, block: int, dtype: torch.dtype) -> int:
    size = dtype.itemsize
    return int.from_bytes(bytes(scale_bytes[block * size : (block + 1) * size].tolist()), "little")


def _pack(codes_P: Tensor, num_bits: int) -> Tensor:
    """Codes [P] to bytes [P * num_bits / 8], plane after plane."""
    planes, low = [], 0
    for width in _PLANES[num_bits]:
        digits = (codes_P >> low) & ((1 << width) - 1)
        rows = digits.view(8 // width, -1)
        shifts = torch.arange(0, 8, width, dtype=torch.int32)[:, None]
        planes.append((rows << shifts).sum(0).to(torch.uint8))
        low += width
    return torch.cat(planes)


def _unpack(code_bytes: Tensor, num_bits: int, padded: int) -> Tensor:
    """Bytes [P * num_bits / 8] to codes [P], int32."""
    codes_P = torch.zeros(padded, dtype=torch.int32)
    position, low = 0, 0
    for width in _PLANES[num_bits]:
        run = padded * width // 8
        plane = code_bytes[position : position + run].to(torch.int32)
        shifts = torch.arange(0, 8, width, dtype=torch.int32)[:, None]
        codes_P |= ((plane[None, :] >> shifts) & ((1 << width) - 1)).reshape(-1) << low
        position += run
        low += width
    return codes_P
