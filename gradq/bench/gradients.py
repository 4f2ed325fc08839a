"""Gradients to measure codecs on: a user's file, a user's function, or drawn from a distribution.

Gradients are a list over ranks of tensors by name; every tensor is encoded by itself, as a parameter is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradq.bench.models import load_function
from gradq.errors import ConfigError
from gradq.saved import load_saved

__all__ = ["Gradients", "check", "correlated", "from_file", "from_function", "synthetic"]

Gradients = list[dict[str, Tensor]]  # of every rank, by name


def synthetic(numel: int) -> dict[str, Tensor]:
    """Numbers of three distributions: normal, Laplace, and Student's with 3 degrees of freedom.

    Args:
        numel: the number of elements of each.

    Returns:
        fp32 [numel] by name; the same ones every time.
    """
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(5, numel, generator=generator)
    uniform = torch.rand(2, numel, generator=generator).clamp_min(1e-12)
    return {
        "gaussian": normal[0],
        "laplace": uniform[0].log() - uniform[1].log(),
        "student-t": normal[1] / (normal[2:5].square().sum(0) / 3).sqrt(),
    }


def correlated(numel: int, num_ranks: int) -> Gradients:
    """Normal numbers of which ranks share half: each has its own noise on a common signal of equal energy."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(numel, generator=generator)
    return [
        {"gaussian": (common + torch.randn(numel, generator=generator)) / 2**0.5} for _ in range(num_ranks)
    ]


def from_file(path: Path) -> Gradients:
    """Gradients that a user saved.

    Args:
        path: a file of `torch.save` (.pt, .pth): a dict of tensors by name, a list of tensors, or a list
            of such dicts, one for each rank. Or a file of `numpy.savez` (.npz): arrays by name. It is loaded
            without running code.

    Raises:
        ConfigError: no such file, or it holds something else, or what `check` refuses.
    """
    loaded = load_saved(path, "save a dict of tensors with torch.save, or arrays with numpy.savez")
    return check(loaded, str(path))


def from_function(spec: str, num_ranks: int) -> Gradients:
    """What a user's function returns.

    Args:
        spec: "path.py:function". The function takes the number of ranks and returns a list of as many dicts
            of tensors by name.
        num_ranks: the argument of that function.

    Raises:
        ConfigError: no such file or function, it fails, or what `check` refuses.
    """
    return check(load_function(spec)(num_ranks), spec)


def check(loaded: Any, where: str) -> Gradients:
    """Gradients from what was loaded, flat and in fp32.

    Args:
        loaded: a tensor, tensors by name or in a list, or a list of dicts of tensors, one a rank.
        where: name of the source, for error messages.

    Raises:
        ConfigError: it is something else, is empty, all zeros, or not of floats; holds NaN or Inf; or ranks
            differ in names or sizes.
    """
    if isinstance(loaded, Tensor):
        loaded = {"tensor": loaded}
    if isinstance(loaded, Sequence) and loaded and all(isinstance(item, Mapping) for item in loaded):
        ranks = [_tensors(item.items(), f"{where}, rank {rank}") for rank, item in enumerate(loaded)]
    elif isinstance(loaded, Mapping):
        ranks = [_tensors(loaded.items(), where)]
    elif isinstance(loaded, Sequence) and not isinstance(loaded, str):
        ranks = [_tensors(((str(index), item) for index, item in enumerate(loaded)), where)]
    else:
        raise ConfigError(f"{where} holds a {type(loaded).__name__}, not a dict of tensors by name")
    sizes = [{name: tensor.numel() for name, tensor in rank.items()} for rank in ranks]
    for rank, own in enumerate(sizes):
        if own != sizes[0]:
            odd = sorted(set(own.items()) ^ set(sizes[0].items()))[0][0]
            raise ConfigError(f"{where}: ranks 0 and {rank} differ in {odd!r}")
    return ranks


def _tensors(items: Iterable[tuple[Any, Any]], where: str) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in items:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ConfigError(f"{where}: {name!r} is {kind}; gradients are floating tensors")
        flat = tensor.detach().to("cpu", torch.float32).flatten()
        if not bool(flat.isfinite().all()):
            raise ConfigError(f"{where}: {name!r} holds NaN or Inf; there is no error to measure")
        if flat.numel():
            tensors[str(name)] = flat.contiguous()
    if not any(bool(tensor.any()) for tensor in tensors.values()):
        raise ConfigError(f"{where} holds no gradient but zeros")
    return tensors
