"""Scales on the wire in Triton, as `gradq.codecs.uniform.reference` has them."""

# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

import torch
import triton.language as tl

from gradq.kernels.triton_tools import as_bits, as_float, jit

__all__ = ["BF16", "FP32", "KIND", "nan_bits", "scale_bits", "scale_value"]

FP32, BF16, FP16 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
KIND = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@jit
def nan_bits(KIND: tl.constexpr) -> tl.tensor:
    """The bits of the one NaN."""
    return 0x7FC00000 if KIND == FP32 else (0x7FC0 if KIND == BF16 else 0x7E00)


@jit
def scale_bits(scale: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """As in the reference: rounded up, 0 for tiny scales, NaN for what is not finite."""
    bits = as_bits(scale)
    if KIND == FP32:
        rounded = bits
    elif KIND == BF16:
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
    return tl.where(bits >= 0x7F800000, nan_bits(KIND), rounded).to(tl.uint32)


@jit
def scale_value(bits: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """The fp32 number with these bits in the scales' dtype."""
    if KIND == FP32:
        return as_float(bits)
    if KIND == BF16:
        return as_float(bits << 16)
    value = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where(value != value, as_float(tl.full(bits.shape, 0x7FC00000, tl.uint32)), value)
