"""Weights that a model computes before each call (weight norm, spectral norm, pruning) as plain parameters.

Both mechanisms of torch are handled: ``torch.nn.utils.parametrize`` and the older hooks. The weight is
quantized as it is in evaluation; `put_back` gives a trained weight back to the mechanism.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["computed_weights", "plain_copy", "put_back"]


def computed_weights(model: nn.Module) -> list[tuple[str, str]]:
    """Names of module and parameter of every weight that is computed before each call."""
    found = []
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            found += [(name, key) for key in module.parametrizations]
        found += [(name, key) for key, _ in _hooks(module).values()]
    return found


def _hooks(module: nn.Module) -> dict[int, tuple[str, Any]]:
    """Key of a hook of the older mechanism → name of its parameter, and the hook."""
    out: dict[int, tuple[str, Any]] = {}
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            out[key] = hook.name, hook
        elif isinstance(hook, prune.BasePruningMethod):
            out[key] = hook._tensor_name, hook
    return out


@torch.no_grad()
def plain_copy(model: nn.Module) -> nn.Module:
    """A copy that shares every parameter but the computed ones, which become parameters of their own.

    Args:
        model: model to copy; it is not changed.
    """
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        memo |= {id(v): v for v in module.__dict__.values() if isinstance(v, Tensor)}
    out = copy.deepcopy(model, memo)
    for module in list(out.modules()):
        if parametrize.is_parametrized(module):
            _make_plain(module)
        for hook_key, (key, hook) in _hooks(module).items():
            computed = _computed(module, hook).detach().clone()
            del module._forward_pre_hooks[hook_key]
            for suffix in ("g", "v", "u", "orig", "mask"):
                module._parameters.pop(f"{key}_{suffix}", None)
                module._buffers.pop(f"{key}_{suffix}", None)
            module.__dict__.pop(key, None)
            module._parameters[key] = nn.Parameter(computed)
        if "bias" in module._parameters:  # as in torch's layers, the weight comes before the bias
            module._parameters["bias"] = module._parameters.pop("bias")
    return out


def _make_plain(module: nn.Module) -> None:
    """Replace parametrizations by their results, in place.

    torch's own function is not used: it removes the property from the class that copies of the module share.
    """
    mode = module.training
    module.eval()  # in training spectral norm would take another step
    keys: Any = module.parametrizations
    values = {key: getattr(module, key).detach().clone() for key in keys}
    kind = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    module.__class__ = kind
    module.train(mode)
    for key, value in values.items():
        module._parameters[key] = nn.Parameter(value)


def _computed(module: nn.Module, hook: Any) -> Tensor:
    value: Tensor
    if isinstance(hook, SpectralNorm):
        value = hook.compute_weight(module, do_power_iteration=False)
    elif isinstance(hook, WeightNorm):
        value = hook.compute_weight(module)
    else:
        value = hook.apply_mask(module)
    return value


@torch.no_grad()
def put_back(module: nn.Module, key: str, value: Tensor) -> None:
    """Give a trained weight to the mechanism that computes it, in place.

    A weight that was not trained leaves the module bit for bit as it was. A mechanism that cannot take the
    weight (pruned elements that were trained, a spectral norm that is not 1 any more) is removed, and the
    weight becomes a plain parameter.

    Args:
        module: module that computes the weight.
        key: name of the parameter.
        value: trained weight.
    """
    if torch.equal(_value(module, key), value):
        return
    if parametrize.is_parametrized(module, key):
        with contextlib.suppress(
            NotImplementedError, RuntimeError
        ):  # without an inverse the mechanism is removed
            setattr(module, key, value)
        if not _close(_value(module, key), value):
            _make_plain(module)
            module._parameters[key].copy_(value)  # type: ignore[union-attr]
        return
    hook_key, hook = next((k, hook) for k, (name, hook) in _hooks(module).items() if name == key)
    if isinstance(hook, WeightNorm):
        module._parameters[f"{key}_g"].copy_(torch.norm_except_dim(value, 2, hook.dim))  # type: ignore[union-attr]
        module._parameters[f"{key}_v"].copy_(value)  # type: ignore[union-attr]
    else:
        module._parameters[f"{key}_orig"].copy_(value)  # type: ignore[union-attr]
    if _close(_computed(module, hook), value):
        module.__dict__[key] = _computed(module, hook)
        return
    del module._forward_pre_hooks[hook_key]
    for suffix in ("g", "v", "u", "orig", "mask"):
        module._parameters.pop(f"{key}_{suffix}", None)
        module._buffers.pop(f"{key}_{suffix}", None)
    module.__dict__.pop(key, None)
    module._parameters[key] = nn.Parameter(value.clone())


def _value(module: nn.Module, key: str) -> Tensor:
    """The weight as the module computes it in evaluation."""
    for name, hook in _hooks(module).values():
        if name == key:
            return _computed(module, hook)
    mode = module.training
    module.eval()
    value: Tensor = getattr(module, key)
    module.train(mode)
    return value


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())
