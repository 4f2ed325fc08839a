"""Tables of at most 16 levels on the int8 grid: non-uniform weights that run at INT8 speed.

A weight is ``scale·table[index]`` with an int8 table, so a runtime stores 4-bit indices, looks them up once
at load and multiplies in INT8. Sources: NF4 (Dettmers et al. 2023, arXiv:2305.14314, rounded to int8); powers
of two (Miyashita et al. 2016, arXiv:1603.01025); fitted tables by Lloyd's algorithm (Lloyd 1982).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradq.errors import ConfigError
from gradq.quant.ops import nearest_code

__all__ = ["fit_codebook", "fixed_table"]

# NF4: the 16 quantiles of N(0, 1), scaled to ±1, times 127, rounded.
_NF4 = (-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127)


def fixed_table(kind: str, bits: int) -> Tensor:
    """The sorted int8 table of ``nf4`` or ``pot2`` … ``pot4``; for ``codebook`` the table a fit starts from.

    Args:
        kind: ``nf``, ``pot`` or ``codebook``.
        bits: table index width.

    Returns:
        (2**bits,) int8.

    Raises:
        ConfigError: no such table.
    """
    if kind == "nf" and bits == 4:
        return torch.tensor(_NF4, dtype=torch.int8)
    if kind == "pot" and 2 <= bits <= 4:
        half = 1 << (bits - 1)
        positive = [64 >> k for k in range(half - 1)]
        negative = [-(128 >> k) for k in range(half)]
        return torch.tensor(sorted([*negative, 0, *positive]), dtype=torch.int8)
    if kind == "codebook" and 2 <= bits <= 4:
        if bits == 4:
            return torch.tensor(_NF4, dtype=torch.int8)
        probabilities = (torch.arange(1 << bits, dtype=torch.float64) + 0.5) / (1 << bits)
        levels: Tensor = torch.special.ndtri(probabilities)
        return (levels / levels.abs().max() * 127).round().to(torch.int8)
    raise ConfigError(f"no table {kind}{bits}; legal: nf4, pot2 to pot4, codebook2 to codebook4")


def fit_codebook(v: Tensor, start: Tensor, *, iterations: int = 20) -> Tensor:
    """Fit a table to values by Lloyd's algorithm and round it to the int8 grid.

    Args:
        v: values in units of the scale (inside about ±127), any shape.
        start: (K,) int8 table to start from.
        iterations: Lloyd steps.

    Returns:
        (K,) int8, sorted, distinct, with 0 among the entries (so that zero padding and pruned weights stay
        exact).
    """
    flat = v.detach().reshape(-1).to(torch.float64)
    levels = start.to(torch.float64)
    for _ in range(iterations):
        index = nearest_code(flat, levels)
        count = torch.bincount(index, minlength=levels.numel())
        total = torch.bincount(index, weights=flat, minlength=levels.numel())
        mean = total / count.clamp(min=1)
        moved = torch.where(count > 0, mean, levels)
        empty = (count == 0).nonzero().flatten()
        if empty.numel() and flat.numel():
            # an unused level splits a cell with a large error: it goes one standard deviation above its mean
            error = torch.bincount(index, weights=(flat - mean[index]).square(), minlength=levels.numel())
            worst = error.topk(empty.numel()).indices
            split = mean[worst] + (error[worst] / count[worst].clamp(min=1)).sqrt()
            moved[empty] = torch.where(error[worst] > 0, split, moved[empty])
        levels = moved.sort().values
    levels[levels.abs().argmin()] = 0.0
    return _distinct(levels.round().clamp(-128, 127))


def _distinct(levels: Tensor) -> Tensor:
    """Make sorted rounded levels distinct: entries that fell together move to the nearest free code."""
    taken: set[int] = set()
    for level in sorted((int(x) for x in levels.tolist()), key=abs):
        for offset in range(256):
            free = [c for c in (level + offset, level - offset) if -128 <= c <= 127 and c not in taken]
            if free:
                taken.add(free[0])
                break
    return torch.tensor(sorted(taken), dtype=torch.int8)
