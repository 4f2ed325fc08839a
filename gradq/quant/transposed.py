"""Transposed convolutions with quantized weights.

Shapes: I input and O output channels, g groups. torch keeps the weight as (I, O / g, *kernel); it is
quantized as (O, I / g, *kernel), so that every output channel owns a scale, as in other convolutions.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from torch.nn import functional

from gradq.quant.fake import WeightQuant
from gradq.quant.formats import Format
from gradq.quant.integer import Accumulator, Codes, integer_conv
from gradq.quant.modules import QuantLayer, share_parameters

__all__ = [
    "TRANSPOSED",
    "QuantConvTranspose",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "why_transposed_stays_float",
]

T = TypeVar("T", bound="QuantConvTranspose")


class QuantConvTranspose(QuantLayer):
    """What transposed convolutions share; made by `from_float`."""

    is_convolution = True
    torch_class: ClassVar[Any]
    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def from_float(
        cls: type[T],
        layer: Any,
        weights: str | Format,
        activations: str | Format | None,
        *,
        observer: str = "mse",
        weight_observer: str = "mse",
        name: str = "conv_transpose",
    ) -> T:
        """A quantized layer that holds the very parameters of a float one."""
        new = cls.__new__(cls)
        cls.torch_class.__init__(
            new, layer.in_channels, layer.out_channels, layer.kernel_size, stride=layer.stride,
            padding=layer.padding, output_padding=layer.output_padding, groups=layer.groups,
            bias=layer.bias is not None, dilation=layer.dilation, device="meta",
        )  # fmt: skip
        share_parameters(new, layer)
        new._attach(weights, activations, observer=observer, weight_observer=weight_observer, name=name)
        return new

    def effective_weight(self) -> Tensor:
        """(O, I / g, *kernel)."""
        weight: Any = self.weight
        turned: Any = weight if weight is None else self._turn(weight)
        return turned  # type: ignore[no-any-return]

    def _turn(self, weight: Tensor) -> Tensor:
        """(I, O / g, *kernel) to (O, I / g, *kernel), or back."""
        outer, inner = weight.shape[0] // self.groups, weight.shape[1]
        apart = weight.reshape(self.groups, outer, inner, *weight.shape[2:])
        return apart.transpose(1, 2).reshape(self.groups * inner, outer, *weight.shape[2:])

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        call: Any = functional.conv_transpose1d if len(self.kernel_size) == 1 else functional.conv_transpose2d
        padding: Any = self.padding
        out: Tensor = call(
            x, self._turn(weight), bias, self.stride, padding, self.output_padding, self.groups,
            self.dilation,
        )  # fmt: skip
        return out

    def integer_forward(self, x: Codes) -> Accumulator | Tensor:
        """The layer on codes (B, I, *spatial)."""
        return integer_conv(
            x, self.effective_weight(), self.weight_quant, self.effective_bias(), self._convolve
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, *spatial) → (B, O, *spatial)."""
        if self.integer and self.input_quant is not None:
            return self._run_integer(x)
        weight_quant: WeightQuant = self.weight_quant
        return self._convolve(
            self._quantized_input(x), weight_quant(self.effective_weight()), self.effective_bias()
        )


class QuantConvTranspose1d(QuantConvTranspose, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with a quantized weight and input."""

    torch_class = nn.ConvTranspose1d
    forward = QuantConvTranspose.forward  # type: ignore[assignment]


class QuantConvTranspose2d(QuantConvTranspose, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with a quantized weight and input."""

    torch_class = nn.ConvTranspose2d
    forward = QuantConvTranspose.forward  # type: ignore[assignment]


TRANSPOSED: dict[type[nn.Module], Any] = {
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
}


def why_transposed_stays_float(layer: Any) -> str | None:
    """Why a transposed convolution has no integer form; None if it has one.

    A kernel runs it as a convolution of stride 1 that computes every phase of the output as channels.
    """
    if type(layer).forward not in (nn.ConvTranspose1d.forward, nn.ConvTranspose2d.forward):
        return f"nn.{type(layer).__name__} has no integer form here"
    if any(d != 1 for d in layer.dilation):
        return "a transposed convolution with a dilation has no integer form here"
    if len(set(layer.stride)) > 1:
        return "a transposed convolution with different strides along its axes has no integer form here"
    return None
