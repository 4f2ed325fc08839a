"""Layers with quantized weights, placed by `gradq.quant.prepare`, or by hand where fx cannot trace.

Each is a subclass of the torch layer with the same parameter names, a `weight_quant`, and an `input_quant`
that is None where `prepare` has placed one shared quantizer on the tensor that the layer reads. In integer
mode (set by `gradq.quant.integer_reference`) the same forward runs on codes.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradq.errors import UnsupportedError
from gradq.quant.fake import ActQuant, WeightQuant
from gradq.quant.formats import Format, parse_format
from gradq.quant.integer import Accumulator, Codes, integer_conv, integer_linear, quantize_activation

__all__ = [
    "QUANTIZED",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantEmbedding",
    "QuantLayer",
    "QuantLinear",
    "share_parameters",
]

T = TypeVar("T", bound="QuantLayer")


class QuantLayer(nn.Module):
    """The base class of quantized layers.

    Attributes:
        weight_quant: quantizer of the weight.
        input_quant: quantizer of the input; None if the input arrives quantized, or stays in float.
        integer: whether the layer computes in integers, as the integer reference does.
    """

    is_convolution: ClassVar[bool] = False
    is_embedding: ClassVar[bool] = False
    weight_quant: WeightQuant
    input_quant: ActQuant | None
    integer: bool = False

    @property
    def bias_correction(self) -> Tensor | None:
        """The correction of the bias by `gradq.quant.correct_bias`, (O,), or None.

        It is added to the bias while the weight is quantized; the float model has the bias alone.
        """
        return self._buffers.get("bias_correction")

    def correct_bias(self, shift: Tensor) -> None:
        """Add to the correction of the bias.

        Args:
            shift: (O,) values to add.
        """
        old = 0.0 if self.bias_correction is None else self.bias_correction
        self._buffers["bias_correction"] = (old + shift).detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load as torch does; a saved correction of the bias is loaded, too."""
        saved = state_dict.get(f"{prefix}bias_correction")
        if saved is None and self.bias_correction is not None:
            del self._buffers["bias_correction"]
        elif saved is not None and self.bias_correction is None:
            self._buffers["bias_correction"] = torch.zeros_like(saved)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _attach(
        self,
        weights: str | Format,
        activations: str | Format | None,
        *,
        observer: str,
        weight_observer: str,
        name: str,
    ) -> None:
        """Make the quantizers and fit that of the weight."""
        weight = self.effective_weight()
        fmt = parse_format(weights, "weights")
        if self.is_convolution and fmt.granularity == "group":
            raise UnsupportedError(
                f"{name}: a convolution's weight cannot be quantized per group; use '-channel'"
            )
        self.weight_quant = WeightQuant(fmt, weight.shape, observer=weight_observer, name=f"{name}.weight")
        self.weight_quant.to(weight.device)
        self.input_quant = None
        if activations is not None:
            act = parse_format(activations, "activations")
            if self.is_convolution and act.is_dynamic:
                raise UnsupportedError(
                    f"{name}: a convolution's input cannot be dynamic ({act}); use a static format"
                )
            self.input_quant = ActQuant(act, observer=observer, name=f"{name}.input").to(weight.device)
        self.weight_quant.fit(weight)

    def effective_weight(self) -> Tensor:
        """The weight that is quantized; live batch norm is folded into it."""
        return self.weight  # type: ignore[return-value]

    def effective_bias(self) -> Tensor | None:
        """The bias that goes with `effective_weight`, corrected while the weight is quantized."""
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        if bias is None or self.bias_correction is None or self.weight_quant.mode in ("float", "copy"):
            return bias
        return bias + self.bias_correction

    def quantized_weights(self) -> list[tuple[str, Tensor, WeightQuant]]:
        """(name, weight, quantizer) of every weight of this layer, submodules excluded."""
        return [("weight", self.effective_weight(), self.weight_quant)]

    def integer_forward(self, x: Codes) -> Accumulator | Tensor:
        """Compute the layer on codes; see `gradq.quant.integer`."""
        raise NotImplementedError

    def _quantized_input(self, x: Tensor) -> Tensor:
        return x if self.input_quant is None else self.input_quant(x)

    def _matmul(
        self,
        x: Tensor,
        quantizer: ActQuant | None,
        weight: Tensor,
        weight_quant: WeightQuant,
        bias: Tensor | None,
    ) -> Tensor:
        """``x Wᵀ + b`` through the quantizers, in float or (in integer mode) on codes."""
        if quantizer is None:
            return functional.linear(x, weight_quant(weight), bias)
        if not self.integer:
            return functional.linear(quantizer(x), weight_quant(weight), bias)
        out = integer_linear(quantize_activation(x, quantizer), weight, weight_quant, bias)
        return out.dequantize() if isinstance(out, Accumulator) else out

    def _run_integer(self, x: Tensor) -> Tensor:
        assert self.input_quant is not None
        out = self.integer_forward(quantize_activation(x, self.input_quant))
        return out.dequantize() if isinstance(out, Accumulator) else out


def share_parameters(new: nn.Module, old: nn.Module) -> None:
    """Give a layer the very parameters of another one, and its training mode.

    Args:
        new: layer that gets them.
        old: layer that has them.
    """
    for key, parameter in old._parameters.items():
        new._parameters[key] = parameter
    new.training = old.training


class QuantLinear(QuantLayer, nn.Linear):
    """`nn.Linear` with a quantized weight and input.

    Args:
        in_features: number of inputs, I.
        out_features: number of outputs, O.
        bias: whether the layer has a bias.
        weights: format of the weight.
        activations: format of the input; None if the input arrives quantized, or stays in float.
        observer: rule by which calibration chooses the range of the input.
        weight_observer: rule by which the range of the weight is chosen.
        name: name of the layer, for errors.
        device: device of the parameters, as in torch.
        dtype: dtype of the parameters, as in torch.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weights: str | Format = "int8",
        activations: str | Format | None = "int8",
        observer: str = "mse",
        weight_observer: str = "mse",
        name: str = "linear",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self._attach(weights, activations, observer=observer, weight_observer=weight_observer, name=name)

    @classmethod
    def from_float(
        cls, layer: nn.Linear, weights: str | Format, activations: str | Format | None, **kw: str
    ) -> QuantLinear:
        """A quantized layer that holds the very parameters of a float one."""
        new = cls.__new__(cls)
        nn.Linear.__init__(new, layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        share_parameters(new, layer)
        new._attach(weights, activations, **_with_defaults(kw))
        return new

    def integer_forward(self, x: Codes) -> Accumulator | Tensor:
        """The layer on codes (B, …, I)."""
        return integer_linear(x, self.weight, self.weight_quant, self.effective_bias())

    def forward(self, x: Tensor) -> Tensor:
        """(B, …, I) → (B, …, O)."""
        return self._matmul(x, self.input_quant, self.weight, self.weight_quant, self.effective_bias())


def _with_defaults(kw: dict[str, str]) -> dict[str, str]:
    return {"observer": "mse", "weight_observer": "mse", "name": "layer"} | kw


class _QuantConv(QuantLayer):
    """The base class of quantized convolutions; batch norm that is not folded yet is live in it.

    With live batch norm the quantized weight is the folded one, ``w·γ/σ`` with the running σ. The output is
    divided by ``γ/σ`` again and then goes through the batch norm, which so keeps statistics of the unscaled
    output (Krishnamoorthi 2018, arXiv:1806.08342, §3.2.2; as in Jacob et al. 2018).
    """

    is_convolution = True
    torch_class: ClassVar[type[nn.Module]]
    bn: nn.Module | None
    bn_frozen: bool = False

    def _attach(self, weights: str | Format, activations: str | Format | None, **kw: str) -> None:
        self.bn = None
        super()._attach(weights, activations, **kw)

    def _bn_scale(self) -> Tensor:
        """The factors γ/σ, (O,), with the running σ; 1 where γ is 0, so that one can divide by them."""
        bn: Any = self.bn
        sigma = torch.sqrt(bn.running_var + bn.eps)
        scale = (bn.weight if bn.weight is not None else torch.ones_like(sigma)) / sigma
        return torch.where(scale.abs() < 1e-12, torch.ones_like(scale), scale)

    def effective_weight(self) -> Tensor:
        """(O, I / groups, *kernel), batch norm folded in."""
        weight: Tensor = self.weight  # type: ignore[assignment]
        if self.bn is None:
            return weight
        return weight * self._bn_scale().reshape(-1, *(1,) * (weight.ndim - 1))

    def attach_batch_norm(self, bn: nn.Module) -> None:
        """Make batch norm part of the layer, live."""
        self.bn = bn
        self.weight_quant.fit(self.effective_weight())

    def freeze_batch_norm(self) -> None:
        """Keep the statistics of live batch norm as they are, in training too."""
        self.bn_frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Any:
        """Set the mode, as in torch; batch norm with frozen statistics stays in evaluation."""
        super().train(mode)
        if self.bn is not None and self.bn_frozen:
            self.bn.eval()
        return self

    def integer_forward(self, x: Codes) -> Accumulator | Tensor:
        """The layer on codes (B, I, *spatial)."""
        if self.bn is not None:
            raise UnsupportedError(
                f"{self.weight_quant.name}: batch norm is live; call quant.finalize(model) first"
            )
        bias = self.effective_bias()
        return integer_conv(x, self.weight, self.weight_quant, bias, self._conv_forward)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, *spatial) → (B, O, *spatial)."""
        if self.integer and self.input_quant is not None:
            return self._run_integer(x)
        x = self._quantized_input(x)
        weight = self.weight_quant(self.effective_weight())
        out: Tensor
        if self.bn is None:
            out = self._conv_forward(x, weight, self.effective_bias())  # type: ignore[operator]
            return out
        raw = self._conv_forward(x, weight, None)  # type: ignore[operator]
        channel = (1, -1) + (1,) * (weight.ndim - 2)
        raw = raw / self._bn_scale().reshape(channel)
        if self.bias is not None:
            raw = raw + self.bias.reshape(channel)  # type: ignore[operator]
        out = self.bn(raw)
        return out

    @classmethod
    def from_float(
        cls: type[T], layer: Any, weights: str | Format, activations: str | Format | None, **kw: str
    ) -> T:
        """A quantized layer that holds the very parameters of a float one."""
        new = cls.__new__(cls)
        cls.torch_class.__init__(  # type: ignore[attr-defined]
            new,
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=layer.bias is not None,
            padding_mode=layer.padding_mode,
            device="meta",
        )
        share_parameters(new, layer)
        new._attach(weights, activations, **_with_defaults(kw))
        return new


def _conv_init(self: Any, base: Any, args: tuple[Any, ...], kw: dict[str, Any]) -> None:
    own = {
        "weights": "int8",
        "activations": "int8",
        "observer": "mse",
        "weight_observer": "mse",
        "name": "conv",
    }
    own |= {key: kw.pop(key) for key in list(kw) if key in own}
    base.__init__(self, *args, **kw)
    self._attach(own.pop("weights"), own.pop("activations"), **own)


class QuantConv1d(_QuantConv, nn.Conv1d):
    """`nn.Conv1d` with a quantized weight and input; the extra keywords are those of `QuantLinear`."""

    torch_class = nn.Conv1d

    def __init__(self, *args: Any, **kw: Any) -> None:
        _conv_init(self, nn.Conv1d, args, kw)


class QuantConv2d(_QuantConv, nn.Conv2d):
    """`nn.Conv2d` with a quantized weight and input; the extra keywords are those of `QuantLinear`."""

    torch_class = nn.Conv2d

    def __init__(self, *args: Any, **kw: Any) -> None:
        _conv_init(self, nn.Conv2d, args, kw)


class QuantConv3d(_QuantConv, nn.Conv3d):
    """`nn.Conv3d` with a quantized weight and input; the extra keywords are those of `QuantLinear`."""

    torch_class = nn.Conv3d

    def __init__(self, *args: Any, **kw: Any) -> None:
        _conv_init(self, nn.Conv3d, args, kw)


QUANTIZED: dict[type[nn.Module], Any] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
}


class QuantEmbedding(QuantLayer, nn.Embedding):
    """`nn.Embedding` with a quantized table, by default with a scale for each row.

    Args:
        num_embeddings: number of rows.
        embedding_dim: number of columns.
        weights: format of the table.
        weight_observer: rule by which the range of the table is chosen.
        name: name of the layer, for errors.
        **kw: further arguments of `nn.Embedding`.
    """

    is_embedding = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        weights: str | Format = "int8",
        weight_observer: str = "mse",
        name: str = "embedding",
        **kw: Any,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kw)
        self._attach(weights, None, observer="mse", weight_observer=weight_observer, name=name)

    @classmethod
    def from_float(
        cls, layer: nn.Embedding, weights: str | Format, activations: str | Format | None = None, **kw: str
    ) -> QuantEmbedding:
        """A quantized table that holds the very parameters of a float one; `activations` is ignored."""
        if layer.max_norm is not None or layer.sparse:
            raise UnsupportedError(
                f"{kw.get('name', 'embedding')}: nn.Embedding with max_norm or sparse=True cannot be "
                "quantized; "
                "leave it in float with Config(skip=...)"
            )
        new = cls.__new__(cls)
        nn.Embedding.__init__(
            new, layer.num_embeddings, layer.embedding_dim, padding_idx=layer.padding_idx, device="meta",
            scale_grad_by_freq=layer.scale_grad_by_freq,
        )  # fmt: skip
        share_parameters(new, layer)
        new._attach(weights, None, **_with_defaults(kw))
        return new

    def effective_bias(self) -> Tensor | None:
        """None: a table has no bias."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """Integer indices of any shape → (…, embedding_dim)."""
        table = self.weight_quant(self.weight)
        return functional.embedding(x, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
