"""The interfaces by which FSDP2 calls another reduction or gathering than its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["AllGatherComm", "ReduceScatterComm"]


class _Comm:
    """What both interfaces have: memory for the input or the output."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An empty tensor."""
        return torch.empty(*size, dtype=dtype, device=device)


class ReduceScatterComm(_Comm):
    """FSDP's interface of a reduction.

    Args:
        reduce: a function of output, input, operation and group.
    """

    def __init__(self, reduce: Callable[[Tensor, Tensor, Any, dist.ProcessGroup], None]) -> None:
        self._reduce = reduce

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        self._reduce(output_tensor, input_tensor, op, group)


class AllGatherComm(_Comm):
    """FSDP's interface of a gathering.

    Args:
        gather: a function that fills all rows of the output but this rank's own.
    """

    def __init__(self, gather: Callable[[Tensor], None]) -> None:
        self._gather = gather

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        numel = input_tensor.numel()
        row = output_tensor[group.rank() * numel : (group.rank() + 1) * numel]
        if row.data_ptr() != input_tensor.data_ptr():
            row.copy_(input_tensor)
        self._gather(output_tensor)
