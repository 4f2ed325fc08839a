"""What the plain-torch references share: the hash and its dither, fused products, planes of bits, means.

32-bit numbers are held in int64. Shapes: P codes of a block, a multiple of 8; `...`: any dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["dither", "fused", "mean_of_rows", "mix32", "new_residual_of", "pack", "unpack", "value_of"]

_MASK32 = 0xFFFFFFFF
_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def mix32(h: Tensor) -> Tensor:
    """The mixing function of `gradq.rng` (products wrap at 2**64; the low 32 bits are right)."""
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & _MASK32
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & _MASK32
    return h ^ (h >> 16)


def dither(key: int, blocks: Tensor, shift: int, padded: int) -> Tensor:
    """The 16-bit dithers of blocks, fp32 [..., P], integers from 0 to 65535.

    Elements j and j + P/2 of a block take the low and the high half of one hash.

    Args:
        key: the key from `rng.dither_key`.
        blocks: int64 [...], indices of blocks within the parameter.
        shift: the shift from `rng.dither_shift`.
        padded: P.
    """
    keys = (mix32((blocks & _MASK32) ^ (key & _MASK32)) + (key >> 32)) & _MASK32
    h = mix32((torch.arange(padded // 2) + keys[..., None]) & _MASK32)
    u = torch.cat((h & 0xFFFF, h >> 16), -1)
    return ((u + shift) & 0xFFFF).to(torch.float32)


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


def value_of(x: Tensor, residual: Tensor | None, loss_scale: float) -> Tensor:
    """X + loss_scale * residual, a new tensor: what is encoded."""
    return x.clone() if residual is None else x + residual * torch.tensor(loss_scale, dtype=torch.float32)


def new_residual_of(
    value: Tensor, decoded: Tensor, residual: Tensor | None, kept: Tensor, loss_scale: float
) -> Tensor:
    """What was lost, in unscaled units; the old residual where `kept` says that nothing was sent."""
    assert residual is not None
    error = (value - decoded) * torch.tensor(1.0 / loss_scale, dtype=torch.float32)
    return torch.where(kept, residual, error)


def pack(codes: Tensor, num_bits: int) -> Tensor:
    """Codes, int32 [..., P], to bytes [..., P * num_bits / 8]: planes of 4, 2 and 1 bits, low bits first."""
    planes, low = [], 0
    for width in _PLANES[num_bits]:
        digits = (codes >> low) & ((1 << width) - 1)
        rows = digits.view(*codes.shape[:-1], 8 // width, -1)
        shifts = torch.arange(0, 8, width, dtype=torch.int32)[:, None]
        planes.append((rows << shifts).sum(-2).to(torch.uint8))
        low += width
    return torch.cat(planes, -1)


def unpack(code_bytes: Tensor, num_bits: int) -> Tensor:
    """Bytes, uint8 [..., P * num_bits / 8], to codes, int32 [..., P]."""
    padded = code_bytes.shape[-1] * 8 // num_bits
    codes = torch.zeros(*code_bytes.shape[:-1], padded, dtype=torch.int32)
    position, low = 0, 0
    for width in _PLANES[num_bits]:
        run = padded * width // 8
        plane = code_bytes[..., None, position : position + run].to(torch.int32)
        shifts = torch.arange(0, 8, width, dtype=torch.int32)[:, None]
        codes |= ((plane >> shifts) & ((1 << width) - 1)).flatten(-2) << low
        position += run
        low += width
    return codes


def mean_of_rows(decode: Callable[[Tensor, Tensor], object], payloads: Tensor, out: Tensor) -> None:
    """The mean over W payloads: decoded one by one, added in row order in fp32, divided once."""
    row = torch.empty_like(out)
    for rank, payload in enumerate(payloads):
        decode(payload, out if rank == 0 else row)
        if rank > 0:
            out.add_(row)
    out.div_(torch.tensor(payloads.shape[0], dtype=out.dtype, device=out.device))
