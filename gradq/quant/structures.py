"""Modules of a graph for what is no tensor: containers in and out, fixed inputs, fixed shapes."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from gradq.errors import ConfigError

__all__ = ["Fixed", "FixedShape", "Flatten", "Rebuild", "Structure"]


class Structure:
    """A container's structure as `torch.utils._pytree` has it; copies and pickles without torch's warnings.

    Args:
        spec: torch's.
    """

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def __deepcopy__(self, memo: dict[int, Any]) -> Structure:
        """Itself: it does not change."""
        return self

    def __reduce__(self) -> Any:
        """Pickled apart."""
        return _load_structure, (pickle.dumps(self.spec),)


def _load_structure(data: bytes) -> Structure:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own classes
        return Structure(pickle.loads(data))


class Flatten(nn.Module):
    """The tensors in a structured input, as a list.

    Args:
        name: the input's, for errors.
        structure: its own.
    """

    def __init__(self, name: str, structure: Structure) -> None:
        super().__init__()
        self.name, self.structure = name, structure

    def forward(self, value: Any) -> list[Any]:
        """Any container of this structure → its leaves."""
        leaves, spec = torch.utils._pytree.tree_flatten(_plain(value))
        if spec != self.structure.spec:
            raise ConfigError(
                f"the model was prepared with {self.name} of the structure {self.structure.spec}, "
                f"and got {spec}"
            )
        return leaves


def _plain(value: Any) -> Any:
    """Containers that fx made immutable as they were."""
    if isinstance(value, (immutable_dict, immutable_list)):
        pairs = value.items() if isinstance(value, immutable_dict) else enumerate(value)
        items = {key: _plain(item) for key, item in pairs}
        return items if isinstance(value, immutable_dict) else list(items.values())
    return tuple(_plain(item) for item in value) if type(value) is tuple else value


class Rebuild(nn.Module):
    """Outputs in the container that the model returns.

    Args:
        structure: the container's.
    """

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure = structure

    def forward(self, *leaves: Any) -> Any:
        """Leaves → the container."""
        return torch.utils._pytree.tree_unflatten(list(leaves), self.structure.spec)


class Fixed(nn.Module):
    """An input that is no tensor: the graph was made for its value.

    Args:
        name: the input's.
        value: the value it must have.
    """

    def __init__(self, name: str, value: Any) -> None:
        super().__init__()
        self.name, self.value = name, value

    def forward(self, value: Any) -> Any:
        """The value.

        Raises:
            ConfigError: another one than the graph was made for.
        """
        if value is not self.value and value != self.value:
            raise ConfigError(
                f"the model was prepared with {self.name}={self.value!r} and got {value!r}; prepare it with "
                "that value in example_inputs"
            )
        return value


class FixedShape(nn.Module):
    """Checks the axes of an input for which the graph was made.

    Args:
        name: the input's.
        ndim: number of its axes.
        fixed: axis → length.
    """

    def __init__(self, name: str, ndim: int, fixed: dict[int, int]) -> None:
        super().__init__()
        self.name, self.ndim, self.fixed = name, ndim, fixed

    def forward(self, x: Tensor) -> None:
        """Nothing.

        Raises:
            ConfigError: another shape.
        """
        if x.ndim != self.ndim or any(x.shape[i] != n for i, n in self.fixed.items()):
            wanted = [self.fixed.get(i, "any") for i in range(self.ndim)]
            raise ConfigError(
                f"{self.name} has shape {list(x.shape)}; the model was prepared for {wanted}: "
                "prepare it with an example of the shape that is used"
            )
