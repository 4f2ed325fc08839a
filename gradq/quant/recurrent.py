"""LSTM and GRU cells with quantized weights, inputs and hidden states; gates are computed in float.

Shapes: B batch, I input size, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradq.quant.fake import ActQuant, WeightQuant
from gradq.quant.formats import Format, parse_format
from gradq.quant.modules import QuantLayer, share_parameters

__all__ = ["QuantGRUCell", "QuantLSTMCell", "why_float"]


class _QuantCell(QuantLayer):
    """What the cells share: two weights, two inputs.

    Attributes:
        weight_quant: quantizer of ``weight_ih``.
        hidden_weight_quant: quantizer of ``weight_hh``.
        input_quant: quantizer of x, or None.
        hidden_quant: quantizer of h, or None.
    """

    hidden_weight_quant: WeightQuant
    hidden_quant: ActQuant | None
    weight_ih: Tensor
    weight_hh: Tensor

    @classmethod
    def from_float(cls, cell: Any, weights: str | Format, activations: str | Format | None, **kw: str) -> Any:
        """A quantized cell that holds the very parameters of a float one."""
        new: Any = cls.__new__(cls)
        base = nn.LSTMCell if issubclass(cls, nn.LSTMCell) else nn.GRUCell
        base.__init__(new, cell.input_size, cell.hidden_size, cell.bias, device="meta")
        share_parameters(new, cell)
        new._attach_cell(weights, activations, **kw)
        return new

    def _attach_cell(
        self,
        weights: str | Format = "int8",
        activations: str | Format | None = "int8",
        *,
        observer: str = "mse",
        weight_observer: str = "mse",
        name: str = "cell",
    ) -> None:
        fmt = parse_format(weights, "weights")
        device = self.weight_ih.device
        for attribute, key in (("weight_quant", "weight_ih"), ("hidden_weight_quant", "weight_hh")):
            weight = getattr(self, key)
            quantizer = WeightQuant(fmt, weight.shape, observer=weight_observer, name=f"{name}.{key}").to(
                device
            )
            quantizer.fit(weight)
            setattr(self, attribute, quantizer)
        self.input_quant = self.hidden_quant = None
        if activations is not None:
            self.input_quant = ActQuant(activations, observer=observer, name=f"{name}.input").to(device)
            self.hidden_quant = ActQuant(activations, observer=observer, name=f"{name}.hidden").to(device)

    def effective_weight(self) -> Tensor:
        """(gates·H, I), the input's weight."""
        return self.weight_ih

    def effective_bias(self) -> Tensor | None:
        """The input's bias."""
        return self.bias_ih  # type: ignore[return-value]

    def quantized_weights(self) -> list[tuple[str, Tensor, WeightQuant]]:
        """Both weights."""
        return [
            ("weight_ih", self.weight_ih, self.weight_quant),
            ("weight_hh", self.weight_hh, self.hidden_weight_quant),
        ]

    def _gates(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """(B, gates·H) from the input and from the hidden state."""
        b_ih: Any = self.bias_ih if self.bias else None
        b_hh: Any = self.bias_hh if self.bias else None
        return (
            self._matmul(x, self.input_quant, self.weight_ih, self.weight_quant, b_ih),
            self._matmul(h, self.hidden_quant, self.weight_hh, self.hidden_weight_quant, b_hh),
        )


class QuantLSTMCell(_QuantCell, nn.LSTMCell):
    """`nn.LSTMCell` with quantized weights, input and hidden state; the cell state stays in float.

    Args:
        input_size: I.
        hidden_size: H.
        bias: whether there is a bias, as in torch.
        **kw: the keywords of `gradq.quant.QuantLinear`.
    """

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, **kw: Any) -> None:
        nn.LSTMCell.__init__(self, input_size, hidden_size, bias)
        self._attach_cell(**kw)

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """X (B, I) and (h, c), each (B, H) → the next (h, c)."""
        if hx is None:
            zeros = x.new_zeros(*x.shape[:-1], self.hidden_size)
            hx = (zeros, zeros)
        from_x, from_h = self._gates(x, hx[0])
        i, f, g, o = (from_x + from_h).chunk(4, -1)
        c = f.sigmoid() * hx[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class QuantGRUCell(_QuantCell, nn.GRUCell):
    """`nn.GRUCell` with quantized weights, input and hidden state.

    Args:
        input_size: I.
        hidden_size: H.
        bias: whether there is a bias, as in torch.
        **kw: the keywords of `gradq.quant.QuantLinear`.
    """

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, **kw: Any) -> None:
        nn.GRUCell.__init__(self, input_size, hidden_size, bias)
        self._attach_cell(**kw)

    def forward(self, x: Tensor, hx: Tensor | None = None) -> Tensor:
        """X (B, I) and h (B, H) → the next h."""
        h = x.new_zeros(*x.shape[:-1], self.hidden_size) if hx is None else hx
        from_x, from_h = self._gates(x, h)
        xr, xz, xn = from_x.chunk(3, -1)
        hr, hz, hn = from_h.chunk(3, -1)
        z = torch.sigmoid(xz + hz)
        n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
        return (1 - z) * n + z * h


def why_float(module: nn.Module) -> str:
    """Why a fused recurrent layer stays in float, and what would be quantized."""
    kind = type(module).__name__
    loop = "nn.GRUCell" if isinstance(module, nn.GRU) else "two nn.Linear and torch.tanh"
    return (
        f"ONNX Runtime has an integer kernel for nn.LSTM and none for nn.{kind}; use nn.LSTM, or write the "
        f"loop with {loop} to quantize its products"
    )
