"""Quantize and dequantize with ONNX's arithmetic, and the fake quantizers built from it.

Shapes: ``x`` is any shape; ``scale`` and ``zero_point`` broadcast against it (``(1,)``, or ``(R, 1)`` for
rows).

ONNX ``QuantizeLinear``: ``q = saturate(round_half_even(x / scale) + zero_point)``. It divides: multiplying by
``1/scale`` gives another code for about one element in a thousand. ``DequantizeLinear``: ``(q −
zero_point)·scale``. Arithmetic is fp32 for fp16, bf16 and fp32 input and fp64 for fp64 input; the result has
the input's dtype.

Gradients: straight through for x inside the range (Bengio et al. 2013, arXiv:1308.3432), and for the scale
the rule of LSQ (Esser et al. 2020, arXiv:1902.08153): ``round(v) − v`` inside and the saturated code outside.
The operators live in ``torch.library`` so that ``torch.compile``, ``torch.export`` and exporters see one
node.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "dequantize",
    "fake_codebook",
    "fake_float8",
    "fake_quantize",
    "float8",
    "nearest_code",
    "quantize",
]


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """ONNX ``QuantizeLinear``.

    Args:
        x: any floating dtype, any shape.
        scale: fp32, positive, broadcasts against `x`.
        zero_point: int32, broadcasts against `x`.
        qmin: smallest code.
        qmax: largest code.

    Returns:
        int32 codes of the shape of `x`.
    """
    v = x.to(_compute_dtype(x)) / scale
    return v.round_().add_(zero_point).clamp_(qmin, qmax).to(torch.int32)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """ONNX ``DequantizeLinear``: ``(codes − zero_point)·scale`` in fp32.

    Args:
        codes: integer codes, any shape.
        scale: fp32, broadcasts against `codes`.
        zero_point: int32, broadcasts against `codes`.

    Returns:
        fp32 values of the shape of `codes`.
    """
    return (codes - zero_point).to(torch.float32) * scale


def nearest_code(v: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest entry of a sorted table; a tie goes to the even index.

    Args:
        v: fp32 or fp64 values in units of the scale, any shape.
        table: (K,) sorted entries of the same dtype.

    Returns:
        int64 indices of the shape of `v`; NaN gives the last index.
    """
    if table.numel() == 1:
        return torch.zeros_like(v, dtype=torch.int64)
    middle = (table[1:] + table[:-1]) / 2
    low = torch.bucketize(v, middle)
    high = torch.bucketize(v, middle, right=True)
    return torch.where(low % 2 == 0, low, high)


def float8(x: Tensor, scale: Tensor) -> Tensor:
    """ONNX ``QuantizeLinear`` to FLOAT8E4M3FN: divide, saturate at 448, round half to even.

    Args:
        x: any floating dtype, any shape.
        scale: fp32, positive, broadcasts against `x`.

    Returns:
        float8_e4m3fn of the shape of `x`; NaN stays NaN.
    """
    v = x.to(_compute_dtype(x)) / scale
    return v.clamp_(-448.0, 448.0).to(torch.float8_e4m3fn)


def fake_float8(x: Tensor, scale: Tensor) -> Tensor:
    """Quantize to e4m3 and back, with straight-through gradients for x inside the range, none for the scale.

    Args:
        x: floating, any shape.
        scale: fp32, positive, broadcasts against `x`.

    Returns:
        A tensor like `x`.
    """
    with torch.no_grad():
        step = scale.detach()
        near = (float8(x, step).to(step.dtype) * step).to(x.dtype)
        inside = (x.abs() <= 448.0 * step).to(x.dtype)
    return near if not x.requires_grad else near + (x - x.detach()) * inside


@torch.library.custom_op("gradq_quant::fake_quantize", mutates_args=())
def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, scale_grad: float
) -> Tensor:
    """Quantize and dequantize: what an integer runtime would see of `x`.

    Args:
        x: floating, any shape.
        scale: fp32, positive, broadcasts against `x`; learnable.
        zero_point: int32, broadcasts against `x`.
        qmin: smallest code.
        qmax: largest code.
        scale_grad: factor on the gradient of the scale (LSQ: ``1/√(elements·qmax)``).

    Returns:
        A tensor like `x`. NaN stays NaN; infinities saturate.
    """
    v = x.to(_compute_dtype(x)) / scale
    v = v.round_().add_(zero_point).clamp_(qmin, qmax).sub_(zero_point).mul_(scale)
    return v.to(x.dtype, copy=True)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, scale_grad: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("gradq_quant::fake_codebook", mutates_args=())
def fake_codebook(x: Tensor, scale: Tensor, table: Tensor, scale_grad: float) -> Tensor:
    """Replace each element by the nearest table entry times the scale.

    Args:
        x: floating, any shape.
        scale: fp32, positive, broadcasts against `x`; learnable.
        table: (K,) int8, sorted.
        scale_grad: factor on the gradient of the scale.

    Returns:
        A tensor like `x`. NaN stays NaN; infinities saturate.
    """
    dtype = _compute_dtype(x)
    v = x.to(dtype) / scale
    levels = table.to(dtype)
    y = levels[nearest_code(v, levels)] * scale
    return torch.where(v.isnan(), v, y).to(x.dtype)


@fake_codebook.register_fake
def _(x: Tensor, scale: Tensor, table: Tensor, scale_grad: float) -> Tensor:
    return torch.empty_like(x)


def _straight_through(
    grad: Tensor, v: Tensor, code: Tensor, inside: Tensor, scale: Tensor, scale_grad: float, need_scale: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``y = code·scale`` for x and, if asked, for the scale."""
    g = grad.to(v.dtype)
    for_x = (g * inside).to(grad.dtype)
    if not need_scale:
        return for_x, None
    for_scale = g * torch.where(inside, code - v, code)
    return for_x, (for_scale.sum_to_size(scale.shape) * scale_grad).to(scale.dtype)


def _setup_uniform(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, scale, zero_point, ctx.qmin, ctx.qmax, ctx.scale_grad = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _backward_uniform(ctx, grad):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    x, scale, zero_point = ctx.saved_tensors
    v = x.to(_compute_dtype(x)) / scale
    shifted = v.round() + zero_point
    code = shifted.clamp(ctx.qmin, ctx.qmax)
    inside = code == shifted
    grads = _straight_through(
        grad, v, code - zero_point, inside, scale, ctx.scale_grad, ctx.needs_input_grad[1]
    )
    return (*grads, None, None, None, None)


def _setup_codebook(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, scale, table, ctx.scale_grad = inputs
    ctx.save_for_backward(x, scale, table)


def _backward_codebook(ctx, grad):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    x, scale, table = ctx.saved_tensors
    v = x.to(_compute_dtype(x)) / scale
    levels = table.to(v.dtype)
    code = levels[nearest_code(v, levels)]
    inside = (v >= levels[0] - 0.5) & (v <= levels[-1] + 0.5)
    grads = _straight_through(grad, v, code, inside, scale, ctx.scale_grad, ctx.needs_input_grad[1])
    return (*grads, None, None)


fake_quantize.register_autograd(_backward_uniform, setup_context=_setup_uniform)
fake_codebook.register_autograd(_backward_codebook, setup_context=_setup_codebook)
