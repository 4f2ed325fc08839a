"""Integer arithmetic of the layers: codes in, 32-bit accumulators out, one fp32 multiplier to requantize.

This is what ONNX Runtime's ``QLinearConv``, ``QGemm``, ``MatMulInteger``, ``QLinearAdd`` and
``QLinearGlobalAveragePool`` compute, in plain torch. Sums of products are taken in fp64, where integers below
2**53 are exact.

Shapes: activations (B, …, I) for linear layers and (B, I, *spatial) for convolutions; O output channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from gradq.errors import NonFiniteError
from gradq.quant.fake import ActQuant, WeightQuant
from gradq.quant.ops import quantize

__all__ = [
    "Accumulator",
    "Codes",
    "PendingSum",
    "integer_bias",
    "integer_conv",
    "integer_linear",
    "quantize_activation",
    "saturation",
]


@dataclass(frozen=True)
class Codes:
    """A quantized activation: ``value = (codes − zero_point)·scale``.

    Attributes:
        codes: int32 codes, of any shape.
        scale: fp32 scale, (1,), or (…, 1) with one for each token.
        zero_point: int32 code of zero, in the shape of `scale`.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def dequantize(self) -> Tensor:
        """The values in fp32."""
        return (self.codes - self.zero_point).to(torch.float32) * self.scale

    def map(self, function: Callable[[Tensor], Tensor]) -> Codes:
        """Apply a function that only moves or selects elements."""
        return replace(self, codes=function(self.codes))


@dataclass(frozen=True)
class Accumulator:
    """Output of an integer layer that is not requantized yet: ``value = total·multiplier``.

    Attributes:
        total: integers in fp64, the bias included.
        multiplier: fp32 product of input scale and weight scale, which broadcasts against `total`.
        low: bound to which smaller values are raised (0 after ReLU); None for no bound.
        high: bound to which larger values are lowered (6 after ReLU6); None for no bound.
        divisor: number of elements that a mean was taken of (``QLinearGlobalAveragePool``).
    """

    total: Tensor
    multiplier: Tensor
    low: float | None = None
    high: float | None = None
    divisor: int = 1

    def dequantize(self) -> Tensor:
        """The values in fp32."""
        return _clip(self.total.to(torch.float32) * self.multiplier / self.divisor, self.low, self.high)

    def requantize(self, quantizer: ActQuant) -> Codes:
        """Codes: ``saturate(round(fp32(total)·fp32(multiplier / (scale·divisor))) + zero_point)``."""
        scale, zero_point = quantizer.scale.detach(), quantizer.zero_point
        low, high = saturation(quantizer, self.low, self.high)
        v = self.total.to(torch.float32) * (self.multiplier / (scale * self.divisor))
        return Codes((v.round() + zero_point).clamp(low, high).to(torch.int32), scale, zero_point)


@dataclass(frozen=True)
class PendingSum:
    """A sum of two quantized tensors that is not requantized yet (``QLinearAdd``).

    A difference is the sum with the second tensor's scale negative.
    """

    left: Codes
    right: Codes
    low: float | None = None
    high: float | None = None

    def dequantize(self) -> Tensor:
        """The values in fp32."""
        return _clip(self.left.dequantize() + self.right.dequantize(), self.low, self.high)

    def requantize(self, quantizer: ActQuant) -> Codes:
        """Codes, in the order of operations of ONNX Runtime's x86 kernel (with FMA)."""
        scale, zero_point = quantizer.scale.detach(), quantizer.zero_point
        low, high = saturation(quantizer, self.low, self.high)
        a = (self.left.scale / scale).double()
        b = (self.right.scale / scale).double()
        # fma(a, code_a, fma(b, code_b, z − fma(a, z_a, b·z_b))): each fused step rounds once to fp32.
        offset = (a * self.left.zero_point + (b * self.right.zero_point).float().double()).float()
        fixed = (zero_point.float() - offset).double()
        partial = (self.right.codes.double() * b + fixed).float().double()
        v = (self.left.codes.double() * a + partial).float()
        return Codes(v.round().clamp(low, high).to(torch.int32), scale, zero_point)


def _clip(x: Tensor, low: float | None, high: float | None) -> Tensor:
    return x if low is None and high is None else x.clamp(low, high)


def saturation(quantizer: ActQuant, low: float | None, high: float | None) -> tuple[int, int]:
    """Smallest and largest code of a static quantizer behind a ReLU or its like.

    Rounding is monotonic, so bounding values and then quantizing gives what quantizing and then bounding the
    codes gives: a bound of the values is a bound of the codes.

    Args:
        quantizer: static quantizer with a range.
        low: bound to which smaller values were raised; None for no bound.
        high: bound to which larger values were lowered; None for no bound.
    """
    fmt = quantizer.format

    def code(bound: float) -> int:
        value = torch.tensor([bound], dtype=torch.float32)
        return int(
            quantize(value, quantizer.scale.detach().cpu(), quantizer.zero_point.cpu(), fmt.qmin, fmt.qmax)
        )

    return fmt.qmin if low is None else code(low), fmt.qmax if high is None else code(high)


def quantize_activation(x: Tensor, quantizer: ActQuant) -> Codes:
    """Codes of a float tensor, by division as ONNX does.

    Raises:
        NonFiniteError: NaN or Inf in `x`; the tensor is named.
        CalibrationError: a quantizer without a range; named.
    """
    if not bool(x.isfinite().all()):
        raise NonFiniteError(f"{quantizer.name} holds NaN or Inf where the integer reference quantizes it")
    fmt = quantizer.format
    x = x.to(torch.float32)
    if not fmt.is_dynamic:
        scale, zero_point = quantizer.scale.detach(), quantizer.zero_point
    elif x.numel() == 0:
        scale, zero_point = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    else:
        scale, zero_point = quantizer.dynamic_range(x)
    return Codes(quantize(x, scale, zero_point, fmt.qmin, fmt.qmax), scale, zero_point)


def integer_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """The int32 bias whose scale is exactly input scale × weight scale; every exporter uses these numbers.

    Args:
        bias: (O,) floating bias.
        input_scale: (1,) fp32 scale of the input.
        weight_scale: (1,) or (O,) fp32 scale of the weight.

    Returns:
        (O,) int32 codes.
    """
    step = (input_scale * weight_scale).double()
    return (bias.double() / step).round().clamp(-(2.0**31), 2.0**31 - 1).to(torch.int32)


def _integer_weight(weight: Tensor, quantizer: WeightQuant) -> Tensor:
    """The integers (codes − zero point) in fp64, in the shape of the weight."""
    codes = quantizer.quantize(weight)
    rows = quantizer.rows(codes) - quantizer.zero_point[:, None]
    return quantizer.unrows(rows, weight.shape).double()


def integer_linear(
    x: Codes, weight: Tensor, quantizer: WeightQuant, bias: Tensor | None
) -> Accumulator | Tensor:
    """Compute a linear layer on codes.

    Args:
        x: (B, …, I) codes of the input.
        weight: (O, I) floating weight.
        quantizer: quantizer of the weight.
        bias: (O,) floating bias, or None.

    Returns:
        An accumulator (B, …, O). For grouped weights, whose scales differ within a sum, and for activations
        with a scale per token and a bias, the fp32 result.
    """
    if quantizer.format.granularity == "group":
        return functional.linear(x.dequantize(), quantizer(weight.detach()).float(), bias)
    total = functional.linear((x.codes - x.zero_point).double(), _integer_weight(weight, quantizer))
    weight_scale = quantizer.scale.detach()
    multiplier = x.scale * weight_scale
    if bias is None:
        return Accumulator(total, multiplier)
    if x.scale.numel() != 1 or x.scale.ndim > 1:
        return total.float() * multiplier + bias.float()
    return Accumulator(total + integer_bias(bias, x.scale, weight_scale), multiplier)


def integer_conv(
    x: Codes,
    weight: Tensor,
    quantizer: WeightQuant,
    bias: Tensor | None,
    convolve: Callable[[Tensor, Tensor, None], Tensor],
) -> Accumulator:
    """Compute a convolution on codes.

    Args:
        x: (B, I, *spatial) codes of the input, with one scale.
        weight: (O, I / groups, *kernel) floating weight.
        quantizer: quantizer of the weight.
        bias: (O,) floating bias, or None.
        convolve: the layer's own convolution (stride, padding, …), a function of input, weight and bias.

    Returns:
        An accumulator (B, O, *spatial).
    """
    total = convolve((x.codes - x.zero_point).double(), _integer_weight(weight, quantizer), None)
    weight_scale = quantizer.scale.detach()
    shape = (-1,) + (1,) * (weight.ndim - 2)
    if bias is not None:
        total = total + integer_bias(bias, x.scale, weight_scale).view(shape)
    return Accumulator(total, (x.scale * weight_scale).view(shape))
