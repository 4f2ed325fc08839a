"""Attention and transformer layers whose projections are quantized; attention itself stays in float.

In INT8 runtimes it is faster *and* more accurate to quantize the inputs and weights of the projections alone
than the products of attention, softmax, GELU and layer norms as well.

Shapes: B batch, L target length, S source length, E embedding, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradq.errors import UnsupportedError
from gradq.quant.fake import ActQuant, WeightQuant
from gradq.quant.formats import Format, parse_format
from gradq.quant.modules import QuantLayer, QuantLinear, share_parameters

__all__ = ["QuantMultiheadAttention", "QuantTransformerEncoder", "QuantTransformerEncoderLayer"]


class QuantMultiheadAttention(QuantLayer, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with quantized projections.

    Args:
        embed_dim: embedding dimension, E.
        num_heads: number of heads, H.
        num_inputs: number of distinct tensors among query, key and value: 1 if they are one tensor, 2 if key
            and value are, 3 otherwise. Each distinct tensor has one quantizer.
        weights: format of the weights of the projections.
        activations: format of the inputs of the projections; None leaves them in float.
        observer: rule by which calibration chooses the ranges of the inputs.
        weight_observer: rule by which the ranges of the weights are chosen.
        name: name of the layer, for errors.
        **kw: further arguments of `nn.MultiheadAttention`.

    Raises:
        UnsupportedError: a layer with ``kdim``, ``vdim``, ``add_bias_kv`` or ``add_zero_attn``; named.
    """

    key_quant: ActQuant | None
    value_quant: ActQuant | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_inputs: int = 1,
        weights: str | Format = "int8",
        activations: str | Format | None = "int8",
        observer: str = "mse",
        weight_observer: str = "mse",
        name: str = "attention",
        **kw: Any,
    ) -> None:
        nn.MultiheadAttention.__init__(self, embed_dim, num_heads, **kw)
        self._attach_attention(
            weights, activations, num_inputs, observer=observer, weight_observer=weight_observer, name=name
        )

    @classmethod
    def from_float(
        cls,
        layer: nn.MultiheadAttention,
        weights: str | Format,
        activations: str | Format | None,
        *,
        num_inputs: int = 1,
        **kw: str,
    ) -> QuantMultiheadAttention:
        """A quantized layer that holds the very parameters of a float one."""
        new = cls.__new__(cls)
        nn.MultiheadAttention.__init__(
            new,
            layer.embed_dim,
            layer.num_heads,
            dropout=layer.dropout,
            bias=layer.in_proj_bias is not None,
            add_bias_kv=layer.bias_k is not None,
            add_zero_attn=layer.add_zero_attn,
            kdim=layer.kdim,
            vdim=layer.vdim,
            batch_first=layer.batch_first,
            device="meta",
        )
        share_parameters(new, layer)
        new.out_proj = layer.out_proj
        new._attach_attention(weights, activations, num_inputs, **kw)
        return new

    def _attach_attention(
        self,
        weights: str | Format,
        activations: str | Format | None,
        num_inputs: int,
        *,
        observer: str = "mse",
        weight_observer: str = "mse",
        name: str = "attention",
    ) -> None:
        if self.in_proj_weight is None or self.bias_k is not None or self.add_zero_attn:
            raise UnsupportedError(
                f"{name}: nn.MultiheadAttention with kdim, vdim, add_bias_kv or add_zero_attn cannot be "
                "quantized; "
                f"leave it in float with Config(skip=({name!r},))"
            )
        fmt = parse_format(weights, "weights")
        device = self.in_proj_weight.device
        self.num_inputs = num_inputs
        self.weight_quant = WeightQuant(
            fmt, self.in_proj_weight.shape, observer=weight_observer, name=f"{name}.in_proj_weight"
        ).to(device)
        self.weight_quant.fit(self.in_proj_weight)
        names = ("input_quant", "key_quant", "value_quant")[:num_inputs]
        for attribute in ("input_quant", "key_quant", "value_quant"):
            quantizer = None
            if attribute in names and activations is not None:
                quantizer = ActQuant(activations, observer=observer, name=f"{name}.{attribute}").to(device)
            setattr(self, attribute, quantizer)
        self.out_proj = QuantLinear.from_float(
            self.out_proj, fmt, activations, observer=observer, weight_observer=weight_observer,
            name=f"{name}.out_proj",
        )  # type: ignore[assignment]  # fmt: skip

    def effective_weight(self) -> Tensor:
        """The weight of the three projections, (3E, E)."""
        return self.in_proj_weight

    def effective_bias(self) -> Tensor | None:
        """The bias of the three projections, (3E,), or None."""
        return self.in_proj_bias

    def quantized_weights(self) -> list[tuple[str, Tensor, WeightQuant]]:
        """Name, weight and quantizer of the input projections; the output projection is another layer."""
        return [("in_proj_weight", self.in_proj_weight, self.weight_quant)]

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three projections (…, E); each distinct input is quantized once."""
        E, W, b = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        if self.num_inputs == 1:
            q, k, v = self._matmul(query, self.input_quant, W, self.weight_quant, b).chunk(3, -1)
            return q, k, v
        shared = self.num_inputs == 2
        quantizers = (self.input_quant, self.key_quant, self.key_quant if shared else self.value_quant)
        out: list[Tensor] = []
        if self.integer:
            for i, (x, quantizer) in enumerate(zip((query, key, value), quantizers, strict=True)):
                full = self._matmul(x, quantizer, W, self.weight_quant, b)
                out.append(full[..., i * E : (i + 1) * E])
            return out[0], out[1], out[2]
        inputs = [query if self.input_quant is None else self.input_quant(query)]
        inputs.append(key if self.key_quant is None else self.key_quant(key))
        if shared:
            inputs.append(inputs[1])
        else:
            inputs.append(value if self.value_quant is None else self.value_quant(value))
        biases = (None, None, None) if b is None else b.chunk(3)
        for x, w, c in zip(inputs, self.weight_quant(W).chunk(3), biases, strict=True):
            out.append(functional.linear(x, w, c))
        return out[0], out[1], out[2]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `nn.MultiheadAttention` does: query (L, B, E), or (B, L, E) with ``batch_first``.

        Returns:
            The output in the shape of the query, and the attention weights (B, L, S) or (B, H, L, S), or None
            if `need_weights` is False.
        """
        if query.ndim != 3:
            raise UnsupportedError(
                f"{self.weight_quant.name}: the query has {query.ndim} dimensions; add a batch axis (3 "
                "dimensions)"
            )
        q, k, v = self._project(query, key, value)
        if not self.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        B, L, E = q.shape
        S, H = k.shape[1], self.num_heads
        q, k, v = (t.reshape(B, -1, H, E // H).transpose(1, 2) for t in (q, k, v))
        mask = _merge_masks(attn_mask, key_padding_mask, B, H, L, S, q.dtype)
        if mask is None and is_causal:
            mask = torch.full((L, S), float("-inf"), device=q.device, dtype=q.dtype).triu(1)
        rate = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * (E // H) ** -0.5) @ k.transpose(-2, -1)
            weights = functional.softmax(scores if mask is None else scores + mask, dim=-1)
            if rate > 0.0:
                weights = functional.dropout(weights, rate)
            out = weights @ v
        else:
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        out = self.out_proj(out.transpose(1, 2).reshape(B, L, E))
        if not self.batch_first:
            out = out.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return out, weights


def _merge_masks(
    attn_mask: Tensor | None, padding: Tensor | None, B: int, H: int, L: int, S: int, dtype: torch.dtype
) -> Tensor | None:
    """Both masks as one additive mask that broadcasts to (B, H, L, S); None if there is none."""

    def additive(mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            return mask.to(dtype)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))

    out = None
    if attn_mask is not None:
        out = additive(attn_mask)
        out = out.reshape(B, H, L, S) if out.ndim == 3 else out
    if padding is not None:
        extra = additive(padding).reshape(B, 1, 1, S)
        out = extra if out is None else out + extra
    return out


class QuantTransformerEncoderLayer(nn.TransformerEncoderLayer):
    """The torch layer without its fused fast path, which would run on the float weights."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Compute what `nn.TransformerEncoderLayer` computes."""
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))  # type: ignore[no-any-return]


class QuantTransformerEncoder(nn.TransformerEncoder):
    """The torch container without nested tensors and without its fast path."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Compute what `nn.TransformerEncoder` computes."""
        out = src
        for layer in self.layers:
            out = layer(
                out, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=bool(is_causal)
            )
        return out if self.norm is None else self.norm(out)
