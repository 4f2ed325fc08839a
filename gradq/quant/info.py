"""What `prepare` did to a model, and the float model as it was given: the truth for every comparison."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from gradq.errors import ConfigError, UnsupportedError
from gradq.quant.config import Config
from gradq.quant.folding import FoldRecord

__all__ = ["FloatModel", "PrepareInfo", "copy_model", "float_model", "prepare_info"]


class FloatModel:
    """The user's model as it was given to `prepare`: nothing that happens to the quantized one changes it.

    It is no part of the quantized module: it is not in its ``state_dict``, DDP does not see it, ``.to`` does
    not move it, and copies of the quantized model share it.

    Args:
        model: copied to the CPU, in evaluation.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy_model(model, torch.device("cpu")).eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> FloatModel:
        """Itself: it does not change."""
        return self


@dataclass
class PrepareInfo:
    """What `prepare` did; kept in ``qmodel.meta["gradq_quant"]``.

    Attributes:
        config: as given.
        float_islands: (name, reason) of layers with weights that stay in float.
        activations: names of the activation quantizers, in the graph's order.
        folded: which batch norms went into which layers.
        live: which batch norms are still live (``batch_norm="train"``).
        convolved: names of the batch norms that are depthwise convolutions now.
        origin: the float model's copy, for `restore`; it shares every parameter that was not folded.
        example_inputs: positional and keyword arguments it was prepared with, for exporters.
        float_model: the model as given, or None if `prepare` was told not to keep it.
        plain_weights: (module, parameter) of weights that the user's model computes (weight norm, pruning, …)
            and the quantized model holds as plain parameters.
        transposed: layer → parameter of the user's model that its weight is the transpose of.
    """

    config: Config
    float_islands: list[tuple[str, str]] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    folded: list[FoldRecord] = field(default_factory=list)
    live: list[FoldRecord] = field(default_factory=list)
    convolved: list[str] = field(default_factory=list)
    origin: nn.Module | None = None
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    float_model: FloatModel | None = None
    plain_weights: list[tuple[str, str]] = field(default_factory=list)
    transposed: dict[str, str] = field(default_factory=dict)


def prepare_info(model: nn.Module) -> PrepareInfo:
    """What `prepare` did to a model.

    Raises:
        UnsupportedError: the model was not made by `prepare`.
    """
    model = getattr(model, "module", model) if not isinstance(model, fx.GraphModule) else model
    info = getattr(model, "meta", {}).get("gradq_quant") if isinstance(model, fx.GraphModule) else None
    if not isinstance(info, PrepareInfo):
        raise UnsupportedError(
            f"{type(model).__name__} was not made by gradq.quant.prepare; this function needs its graph"
        )
    return info


def float_model(model: nn.Module) -> nn.Module:
    """The untouched float model behind a prepared one, in evaluation on the CPU.

    Raises:
        UnsupportedError: the model was not made by `prepare`.
        ConfigError: `prepare` was told not to keep it.
    """
    kept = prepare_info(model).float_model
    if kept is None:
        raise ConfigError(
            "the float model was not kept (prepare(..., keep_float=False)); pass float_model=model, "
            "or prepare "
            "again with keep_float=True"
        )
    return kept.model


def copy_model(
    model: nn.Module, device: torch.device | None = None, memo: dict[int, Any] | None = None
) -> nn.Module:
    """A deep copy, tensors that hooks computed included (``copy.deepcopy`` refuses those).

    Args:
        model: untouched.
        device: where the copy's tensors go; where they are if None.
        memo: as `copy.deepcopy` takes it: what the copy is to share.
    """
    memo = {} if memo is None else memo

    def put(tensor: Tensor) -> Tensor:
        plain = tensor.detach()
        return plain.to(device, copy=True) if device is not None else plain.clone()

    for module in model.modules():
        for value in module.__dict__.values():  # computed by a hook, such as the weight of weight norm
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = put(value)
    if device is not None:
        for tensor in (*model.parameters(), *model.buffers()):
            if type(tensor) in (Tensor, nn.Parameter) and id(tensor) not in memo:
                new = put(tensor)
                is_parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
    return copy.deepcopy(model, memo)
