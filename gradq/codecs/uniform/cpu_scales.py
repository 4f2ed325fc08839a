"""Scales on the wire in Numba, as `gradq.codecs.uniform.reference` has them; also those of top-k."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gradq.kernels.numba_compile import inline
from gradq.kernels.numba_tools import as_bits, as_float, u16_at, u32_at

__all__ = ["BF16", "FP32", "KIND", "load_scale", "store_scale"]

FP32, BF16, _FP16 = 0, 1, 2
KIND = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: _FP16}


@inline
def _scale_bits(scale: Any, kind: Any) -> Any:
    """As in the reference: rounded up, 0 for tiny scales, NaN for what is not finite."""
    bits = as_bits(scale)
    if bits >= np.uint32(0x7F800000):
        return np.uint32(0x7FC00000 if kind == FP32 else (0x7FC0 if kind == BF16 else 0x7E00))
    if bits < np.uint32(0x00800000):
        return np.uint32(0)
    if kind == FP32:
        return bits
    if kind == BF16:
        up = np.uint32((bits + np.uint32(0xFFFF)) >> np.uint32(16))
        return np.uint32(0x7FC0) if up >= np.uint32(0x7F80) else up
    exponent = np.int32(bits >> np.uint32(23)) - np.int32(112)
    if exponent >= 1:
        up = np.uint32((bits - np.uint32(112 << 23) + np.uint32(0x1FFF)) >> np.uint32(13))
        return np.uint32(0x7E00) if up >= np.uint32(0x7C00) else up
    mantissa = np.uint32((bits & np.uint32(0x7FFFFF)) | np.uint32(0x800000))
    drop = np.uint32(min(14 - exponent, 25))
    return np.uint32((mantissa + (np.uint32(1) << drop) - np.uint32(1)) >> drop)


@inline
def _scale_value(bits: Any, kind: Any) -> Any:
    if kind == FP32:
        return as_float(bits)
    if kind == BF16:
        return as_float(bits << np.uint32(16))
    sign = np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))
    exponent, mantissa = bits & np.uint32(0x7C00), bits & np.uint32(0x3FF)
    if exponent == 0:
        return as_float(sign | as_bits(np.float32(np.int32(mantissa)) * np.float32(2.0**-24)))
    bias = np.uint32((224 if exponent == 0x7C00 else 112) << 23)
    return as_float(sign | (((exponent | mantissa) << np.uint32(13)) + bias))


@inline
def load_scale(at: Any, kind: Any) -> Any:
    """The scale at an address."""
    bits = u32_at(at, 1)[0] if kind == FP32 else np.uint32(u16_at(at, 1)[0])
    return _scale_value(bits, kind)


@inline
def store_scale(at: Any, kind: Any, absmax: Any, qmax: Any) -> Any:
    """Write the scale of a block; returns what it will be read as: NaN where it could decode to Inf."""
    bits = _scale_bits(absmax / np.float32(qmax), kind)
    if not np.float32(_scale_value(bits, kind) * np.float32(qmax)) < np.float32(np.inf):
        bits = _scale_bits(np.float32(np.nan), kind)
    if kind == FP32:
        u32_at(at, 1)[0] = bits
    else:
        u16_at(at, 1)[0] = np.uint16(bits)
    return _scale_value(bits, kind)
