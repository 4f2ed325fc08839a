"""What local steps average together: fragments of a model, and flat buckets in them.

A fragment is averaged at its own step of the cycle. It has a bucket for each work dtype: its parameters one
after another in a flat tensor on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradq.errors import ConfigError
from gradq.policy import ParameterInfo

__all__ = ["WORK_DTYPES", "Bucket", "Fragment", "cut", "fragments_of", "infos"]

WORK_DTYPES = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}


@dataclass
class Bucket:
    """Parameters of one work dtype in one fragment.

    Attributes:
        index: the place among all buckets.
        parameters: the parameters by name.
        anchor: the values that the ranks started from, flat [n], on the CPU; equal on all ranks.
        momentum: the momentum of the outer step, flat [n]; None without one.
    """

    index: int
    parameters: dict[str, Tensor]
    anchor: Tensor
    momentum: Tensor | None

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of flat [n] that belong to each parameter, in its shape."""
        parts = torch.split(flat, [parameter.numel() for parameter in self.parameters.values()])
        return {
            name: part.view(parameter.shape)
            for (name, parameter), part in zip(self.parameters.items(), parts, strict=True)
        }

    def state(self) -> dict[str, Tensor]:
        """Anchor and momentum of each parameter, as "anchor.<name>" and "momentum.<name>"; views."""
        flats = {"anchor": self.anchor} | ({} if self.momentum is None else {"momentum": self.momentum})
        return {f"{kind}.{name}": v for kind, flat in flats.items() for name, v in self.views(flat).items()}

    def read(self, flat: Tensor) -> None:
        """Copy the parameters into flat [n]."""
        for name, view in self.views(flat).items():
            view.copy_(self.parameters[name])

    def write(self, flat: Tensor) -> None:
        """Copy flat [n] into the parameters."""
        for name, view in self.views(flat).items():
            self.parameters[name].copy_(view)


@dataclass
class Fragment:
    """What is averaged together.

    Attributes:
        offset: the fragment is averaged at the steps that equal this modulo `every`.
        buckets: one a work dtype.
    """

    offset: int
    buckets: list[Bucket]


def cut(numels: Sequence[int], count: int) -> list[int]:
    """Which of count fragments each parameter belongs to: in order, about equally many elements each.

    Raises:
        ConfigError: there are fewer parameters than fragments.
    """
    if count > len(numels):
        raise ConfigError(f"fragments={count}: the model has only {len(numels)} parameters to share out")
    owners: list[int] = []
    total, done = max(sum(numels), 1), 0
    for index, numel in enumerate(numels):
        middle = int((done + numel / 2) / total * count)
        least = max(count - (len(numels) - index), 0)  # a parameter is left for each fragment to come
        most = owners[-1] + 1 if owners else 0  # no fragment is skipped
        owners.append(min(max(middle, least), most, count - 1))
        done += numel
    return owners


def fragments_of(parameters: dict[str, Tensor], count: int, every: int, has_momentum: bool) -> list[Fragment]:
    """Cut a model; anchors and momentum are zeros.

    Args:
        parameters: the parameters by name, of dtypes in `WORK_DTYPES`.
        count: the number of fragments.
        every: steps between two averages of a fragment.
        has_momentum: whether the outer step keeps momentum.

    Raises:
        ConfigError: there are fewer parameters than fragments.
    """
    owners = cut([parameter.numel() for parameter in parameters.values()], count)
    fragments, index = [], 0
    for fragment in range(count):
        mine = [item for item, owner in zip(parameters.items(), owners, strict=True) if owner == fragment]
        buckets = []
        for dtype in (torch.float32, torch.float64):
            members = {name: p for name, p in mine if WORK_DTYPES[p.dtype] == dtype}
            if members:
                anchor = torch.zeros(sum(p.numel() for p in members.values()), dtype=dtype)
                momentum = torch.zeros_like(anchor) if has_momentum else None
                buckets.append(Bucket(index, members, anchor, momentum))
                index += 1
        fragments.append(Fragment((fragment + 1) * every // count % every, buckets))
    return fragments


def infos(parameters: dict[str, Tensor]) -> list[ParameterInfo]:
    """What a policy is to know of the pseudo-gradients, which have the work dtype."""
    return [
        ParameterInfo(name=name, shape=tuple(p.shape), dtype=WORK_DTYPES[p.dtype], index=index)
        for index, (name, p) in enumerate(parameters.items())
    ]
