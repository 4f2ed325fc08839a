"""A model's inputs under the names they have in a file; tensors in containers are named by their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["leaf_names", "named_leaves"]


def leaf_names(name: str, value: Any) -> list[str]:
    """Names of the tensors (and arrays) in an input, in order.

    Args:
        name: name of the input.
        value: the input, a tensor or a container of tensors; numbers and None have no name.
    """
    return [leaf for leaf, _ in _leaves(name, value)]


def named_leaves(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Every tensor and array of the inputs, by its name in a file."""
    return dict(pair for name, value in inputs.items() for pair in _leaves(name, value))


def _leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    found = []
    for path, leaf in torch.utils._pytree.tree_flatten_with_path(value)[0]:
        if isinstance(leaf, Tensor) or hasattr(leaf, "__array_interface__"):
            keys = [str(getattr(p, "key", getattr(p, "idx", getattr(p, "name", p)))) for p in path]
            found.append((".".join([name, *keys]), leaf))
    return found
