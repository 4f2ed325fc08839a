"""`nn.LSTM` with quantized weights, as ONNX Runtime's DynamicQuantizeLSTM computes it.

The input is quantized once for the whole sequence, the hidden state at every step, each with the range that
it has then; the sums of products are integers, and gates, biases and the cell state are in float.

Shapes: T steps, B batch, I input size, H hidden size, D directions (1 or 2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from gradq.quant.config import Config
from gradq.quant.fake import ActQuant, WeightQuant
from gradq.quant.formats import Format, parse_format
from gradq.quant.modules import QuantLayer, share_parameters

__all__ = ["QuantLSTM", "why_lstm_stays_float"]

_DYNAMIC = "int8-batch"


def why_lstm_stays_float(layer: nn.LSTM, config: Config, name: str) -> str | None:
    """Why a layer stays in float; None if it has an integer form.

    Args:
        layer: the layer.
        config: formats.
        name: the layer's qualified name.
    """
    weights, activations = config.weight_format(name, convolution=True), config.activation_format()
    if weights is None:
        return "the configuration quantizes no weights"
    if type(layer).forward is not nn.LSTM.forward:
        return f"{type(layer).__name__} has a forward of its own; inherit nn.LSTM's to quantize it"
    if layer.proj_size:
        return "no runtime has an integer nn.LSTM with proj_size; use a linear layer behind one without"
    if activations is None:
        return "ONNX Runtime's LSTM takes quantized weights only together with quantized activations"
    if activations.symmetric or activations.bits != 8:
        return (
            "ONNX Runtime's integer LSTM finds an asymmetric range of 8 bits for its input itself; prepare "
            "with activations='int8' or 'int8-batch' to quantize it"
        )
    if not weights.symmetric:
        return "ONNX Runtime's integer LSTM takes symmetric weights; prepare with weights='int8'"
    return None


class QuantLSTM(QuantLayer, nn.LSTM):
    """`nn.LSTM` with quantized weights, input and hidden states.

    The ranges of activations are found at inference, for the whole batch, whatever the configuration says:
    that is what the runtime's kernel does. Packed sequences work here, but have no form in a file.

    Args:
        input_size: I.
        hidden_size: H.
        *args: as in torch.
        weights: format of the weights, symmetric, a scale a channel or a tensor.
        weight_observer: rule that chooses their ranges.
        name: the layer's name, for errors.
        **kw: as in torch; ``proj_size`` must be 0.
    """

    input_quant: ActQuant
    hidden_quant: ActQuant
    weight_ih_l0: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *args: Any,
        weights: str | Format = "int8",
        weight_observer: str = "mse",
        name: str = "lstm",
        **kw: Any,
    ) -> None:
        nn.LSTM.__init__(self, input_size, hidden_size, *args, **kw)
        self._attach_weights(weights, weight_observer, name)

    @classmethod
    def from_float(
        cls, layer: nn.LSTM, weights: str | Format, *, weight_observer: str = "mse", name: str = "lstm"
    ) -> QuantLSTM:
        """A quantized layer that holds the very parameters of a float one."""
        new = cls.__new__(cls)
        nn.LSTM.__init__(
            new, layer.input_size, layer.hidden_size, layer.num_layers, bias=layer.bias,
            batch_first=layer.batch_first, dropout=layer.dropout, bidirectional=layer.bidirectional,
            device="meta",
        )  # fmt: skip
        share_parameters(new, layer)
        new._flat_weights = [getattr(new, key) for key in new._flat_weights_names]
        new._attach_weights(weights, weight_observer, name)
        return new

    def _attach_weights(self, weights: str | Format, observer: str, name: str) -> None:
        fmt = parse_format(weights, "weights")
        device = self.weight_ih_l0.device
        self.more_weight_quants = nn.ModuleDict()
        for key in self._flat_weights_names:
            if not key.startswith("weight"):
                continue
            weight = getattr(self, key)
            quantizer = WeightQuant(fmt, weight.shape, observer=observer, name=f"{name}.{key}").to(device)
            quantizer.fit(weight)
            if key == "weight_ih_l0":
                self.weight_quant = quantizer
            else:
                self.more_weight_quants[key] = quantizer
        self.input_quant = ActQuant(_DYNAMIC, name=f"{name}.input").to(device)
        self.hidden_quant = ActQuant(_DYNAMIC, name=f"{name}.hidden").to(device)

    def quantizer(self, key: str) -> WeightQuant:
        """The quantizer of the weight of this name."""
        found: Any = self.weight_quant if key == "weight_ih_l0" else self.more_weight_quants[key]
        quantizer: WeightQuant = found
        return quantizer

    def effective_weight(self) -> Tensor:
        """(4H, I), the first layer's weight for its input."""
        return self.weight_ih_l0

    def effective_bias(self) -> Tensor | None:
        """None: the biases are added in float."""
        return None

    def quantized_weights(self) -> list[tuple[str, Tensor, WeightQuant]]:
        """Two weights a layer and direction."""
        keys = [key for key in self._flat_weights_names if key.startswith("weight")]
        return [(key, getattr(self, key), self.quantizer(key)) for key in keys]

    def suffixes(self, layer: int) -> list[str]:
        """Endings of the parameters' names, one a direction: ``_l0``, ``_l0_reverse``."""
        return [f"_l{layer}", f"_l{layer}_reverse"][: 2 if self.bidirectional else 1]

    def forward(self, x: Any, hx: tuple[Tensor, Tensor] | None = None) -> Any:
        """As `nn.LSTM`: x (T, B, I), (B, T, I), (T, I) or packed → the outputs and (h, c)."""
        if self.input_quant.mode in ("float", "copy"):
            return self._in_float(x, hx)
        if isinstance(x, PackedSequence):
            padded, lengths = pad_packed_sequence(x)
            y, states = self._run(padded, hx, lengths.to(padded.device))
            return pack_padded_sequence(y, lengths, enforce_sorted=x.sorted_indices is None), states
        alone = x.ndim == 2
        if alone:
            x = x.unsqueeze(1)
            hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        elif self.batch_first:
            x = x.transpose(0, 1)
        y, (h, c) = self._run(x, hx, None)
        if alone:
            return y.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return (y.transpose(0, 1) if self.batch_first else y), (h, c)

    def _in_float(self, x: Any, hx: Any) -> Any:
        """The kernel of torch, on weights that may be quantized; nothing else is."""
        weights = {key: q(weight) for key, weight, q in self.quantized_weights()}
        held = self._flat_weights
        self.__dict__["_flat_weights"] = [
            weights[key] if key in weights else getattr(self, key) for key in self._flat_weights_names
        ]
        try:
            return nn.LSTM.forward(self, x, hx)
        finally:
            self.__dict__["_flat_weights"] = held

    def _run(
        self, x: Tensor, hx: tuple[Tensor, Tensor] | None, lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Every layer on x (T, B, I)."""
        ends: list[tuple[Tensor, Tensor]] = []
        directions = 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            part = slice(layer * directions, (layer + 1) * directions)
            given = None if hx is None else (hx[0][part], hx[1][part])
            x, h, c = self._layer(x, given, lengths, layer)
            ends.append((h, c))
            if self.dropout and self.training and layer + 1 < self.num_layers:
                x = functional.dropout(x, self.dropout)
        return x, (torch.cat([h for h, _ in ends]), torch.cat([c for _, c in ends]))

    def _layer(
        self, x: Tensor, hx: tuple[Tensor, Tensor] | None, lengths: Tensor | None, layer: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer in all its directions: (T, B, D·H), (D, B, H), (D, B, H)."""
        if hx is None:
            zeros = x.new_zeros(2 if self.bidirectional else 1, x.shape[1], self.hidden_size)
            hx = (zeros, zeros)
        done = [
            self._direction(x, hx[0][i], hx[1][i], lengths, suffix)
            for i, suffix in enumerate(self.suffixes(layer))
        ]
        y, h, c = zip(*done, strict=True)
        return torch.cat(y, -1), torch.stack(h), torch.stack(c)

    def _direction(
        self, x: Tensor, h: Tensor, c: Tensor, lengths: Tensor | None, suffix: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One direction: (T, B, H), (B, H), (B, H). A sequence that has ended keeps its state."""
        ih, hh = f"weight_ih{suffix}", f"weight_hh{suffix}"
        from_x = self._matmul(x, self.input_quant, getattr(self, ih), self.quantizer(ih), None)
        if self.bias:
            from_x = from_x + (getattr(self, f"bias_ih{suffix}") + getattr(self, f"bias_hh{suffix}"))
        from_h = self._product_with_hidden(hh)
        steps = range(x.shape[0])
        outputs: list[Any] = [None] * len(steps)
        for t in reversed(steps) if suffix.endswith("_reverse") else steps:
            gates = from_x[t] + from_h(h)
            i, f, g, o = gates.chunk(4, -1)
            new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            new_h = o.sigmoid() * new_c.tanh()
            if lengths is not None:
                runs = (t < lengths)[:, None]
                new_h, new_c = torch.where(runs, new_h, h), torch.where(runs, new_c, c)
            h, c = new_h, new_c
            outputs[t] = h
        return torch.stack(outputs), h, c

    def _product_with_hidden(self, key: str) -> Callable[[Tensor], Tensor]:
        """The product of a hidden state with a weight, which is rounded once for all steps."""
        weight, quantizer = getattr(self, key), self.quantizer(key)
        if self.integer:
            return lambda h: self._matmul(h, self.hidden_quant, weight, quantizer, None)
        rounded = quantizer(weight)
        return lambda h: functional.linear(self.hidden_quant(h), rounded)
