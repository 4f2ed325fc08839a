"""The integer reference: a prepared model in integer arithmetic, the truth every exporter is tested against.

It runs the prepared graph, but between quantizers it carries integer codes, and between a layer and its
output quantizer 32-bit accumulators; floats appear only where the INT8 runtime would have them. The float
simulation (fake quantization) differs from it by one code in a small share of elements; the reference does
not.

On codes run convolutions, linear layers, ReLU and its like, additions and subtractions, max and global
average pooling, moving of elements, and the projections of attention and of recurrent cells. Everything else
(softmax, layer norm, GELU, layers left in float, weights in groups) runs in float, on dequantized values.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from gradq.errors import UnsupportedError
from gradq.quant.batches import unwrap
from gradq.quant.fake import ActQuant, float8_names
from gradq.quant.integer import Accumulator, Codes, PendingSum, quantize_activation
from gradq.quant.modules import QuantLayer
from gradq.quant.operators import (
    ADDS,
    CLIPS,
    SUBTRACTIONS,
    global_mean,
    matches,
    moves,
    op_name,
    pads_with_zeros,
    weight_layer,
)
from gradq.quant.prepare import finalize

__all__ = ["IntegerReference", "integer_reference"]

Pending = (Accumulator, PendingSum)


def integer_reference(model: nn.Module) -> IntegerReference:
    """Make a calibrated model that computes in integers.

    Args:
        model: model from `prepare` (possibly inside DDP), or one with quantized layers placed by hand; it is
            not changed.

    Returns:
        A callable that takes the model's arguments and returns its outputs in fp32, without gradients.

    Raises:
        CalibrationError: a quantizer has no range; named.
        UnsupportedError: a quantizer whose format has no integers (``fp8``); named.
    """
    names = float8_names(model)
    if names:
        raise UnsupportedError(
            f"{names[0]} is fp8, which has no integer arithmetic; compare with the simulation, model(x)"
        )
    return IntegerReference(model)


class IntegerReference:
    """A snapshot of a model that computes in integers; see `integer_reference`.

    Args:
        model: calibrated model; it is copied, and live batch norm is folded in the copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = finalize(copy.deepcopy(unwrap(model))).eval()
        for module in self.model.modules():
            if isinstance(module, ActQuant) and not module.format.is_dynamic:
                _ = module.scale  # an uncalibrated quantizer raises its error here
            if isinstance(module, QuantLayer):
                module.integer = True

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs, computed in integers."""
        if not isinstance(self.model, fx.GraphModule):
            return self.model(*args, **kwargs)
        names = [str(n.target) for n in self.model.graph.nodes if n.op == "placeholder"]
        unknown = set(kwargs) - set(names)
        if unknown or len(args) + len(kwargs) > len(names):
            raise UnsupportedError(
                f"the prepared model takes {names}; got {len(args)} arguments and {sorted(kwargs)}"
            )
        return _Executor(self.model).run(*args, *(kwargs[n] for n in names[len(args) :] if n in kwargs))

    @torch.no_grad()
    def codes(self, *args: Any) -> dict[str, Tensor]:
        """Name → int32 codes of every activation quantizer, which show where an exporter starts to differ."""
        if not isinstance(self.model, fx.GraphModule):
            raise UnsupportedError("codes() needs a model from gradq.quant.prepare")
        executor = _Executor(self.model)
        executor.run(*args)
        return executor.seen


class _Executor(fx.Interpreter):
    """Carries `Codes` and pending accumulators along the graph's edges."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.traced = traced
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "get_attr"):
            return super().run_node(n)
        if n.op == "output":
            return fx.node.map_aggregate(self.map_nodes_to_values(n.args[0], n), _to_float)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        first = args[0] if args else None
        if n.op == "call_module":
            module = self.fetch_attr(str(n.target))
            if isinstance(module, ActQuant):
                return self._quantize(str(n.target), module, first)
            layer = weight_layer(n, self.traced)
            if layer is not None and isinstance(first, Codes) and layer.input_quant is None:
                return layer.integer_forward(first)
        if matches(n, self.traced, CLIPS) and isinstance(first, Pending):
            return _clip(self.traced, n, first)
        if matches(n, self.traced, ADDS) and len(args) == 2 and not kwargs and _addable(args[0], args[1]):
            return PendingSum(args[0], args[1])
        if matches(n, self.traced, SUBTRACTIONS) and not kwargs and _addable(*args):
            return PendingSum(args[0], replace(args[1], scale=-args[1].scale))
        keep = global_mean(n, self.traced)
        if keep is not None and isinstance(first, Codes) and first.codes.ndim == 4:
            return _mean(first, keep)
        if isinstance(first, Codes) and self._moves(n):
            return self._move(n, args, kwargs)
        args, kwargs = fx.node.map_aggregate((args, kwargs), _to_float)
        return getattr(self, n.op)(n.target, args, kwargs)

    def _quantize(self, name: str, quantizer: ActQuant, value: Any) -> Codes:
        if isinstance(value, Pending) and not quantizer.format.is_dynamic:
            out = value.requantize(quantizer)
        elif isinstance(value, Codes) and torch.equal(value.scale, quantizer.scale):
            out = value
        else:
            out = quantize_activation(_to_float(value), quantizer)
        self.seen[name] = out.codes
        return out

    def _moves(self, n: fx.Node) -> bool:
        return moves(n, self.traced) or n.target is operator.getitem

    def _move(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        """Run a moving operation on the codes, in fp64 because pooling has no int32."""
        codes: Codes = args[0]
        if codes.scale.numel() != 1:
            args = (codes.dequantize(), *args[1:])
            return getattr(self, n.op)(n.target, args, kwargs)
        shift = codes.zero_point if pads_with_zeros(n, self.traced) else torch.zeros_like(codes.zero_point)
        args = ((codes.codes - shift).double(), *args[1:])
        out = getattr(self, n.op)(n.target, args, kwargs)

        def to_codes(t: Any) -> Any:
            return replace(codes, codes=t.to(torch.int32) + shift) if isinstance(t, Tensor) else t

        return fx.node.map_aggregate(out, to_codes)


def _to_float(value: Any) -> Any:
    if isinstance(value, (Codes, *Pending)):
        return value.dequantize()
    return value


def _mean(codes: Codes, keep: bool) -> Accumulator:
    """The mean over both axes of images, as a sum that is not requantized yet."""
    total = (codes.codes - codes.zero_point).double().sum((2, 3), keepdim=keep)
    return Accumulator(total, codes.scale, divisor=codes.codes.shape[2] * codes.codes.shape[3])


def _addable(a: Any, b: Any) -> bool:
    return isinstance(a, Codes) and isinstance(b, Codes) and a.scale.numel() == 1 and b.scale.numel() == 1


def _clip(traced: fx.GraphModule, n: fx.Node, value: Accumulator | PendingSum) -> Accumulator | PendingSum:
    """Bound a value that is not requantized yet by a ReLU or its like."""
    low, high = 0.0, None
    if n.op == "call_module":
        module: Any = traced.get_submodule(str(n.target))
        if isinstance(module, nn.Hardtanh):  # ReLU6 is one
            low, high = float(module.min_val), float(module.max_val)
    elif op_name(n) == "relu6":
        high = 6.0
    elif op_name(n) == "hardtanh":
        low = float(n.kwargs.get("min_val", n.args[1] if len(n.args) > 1 else -1.0))  # type: ignore[arg-type]
        high = float(n.kwargs.get("max_val", n.args[2] if len(n.args) > 2 else 1.0))  # type: ignore[arg-type]
    old_low = value.low if value.low is not None else low
    old_high = value.high if value.high is not None else high
    return replace(
        value,
        low=max(low, old_low),
        high=None if high is None and old_high is None else min(x for x in (high, old_high) if x is not None),
    )
