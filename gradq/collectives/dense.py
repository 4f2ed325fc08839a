"""Dense: the plain all-reduce of the spec "none", for all that DDP averages without a hook."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

__all__ = ["all_reduce", "nbytes"]


def all_reduce(flat: Tensor, group: dist.ProcessGroup) -> Future[Tensor]:
    """Replace flat, which may be sparse, by its mean over a group; a future of it."""
    future = dist.all_reduce(flat.div_(group.size()), group=group, async_op=True).get_future()
    averaged: Future[Tensor] = future.then(lambda done: done.value()[0])
    return averaged


def nbytes(flat: Tensor) -> int:
    """Bytes of a gradient; of a sparse one, of its entries and their indices."""
    if not flat.is_sparse:
        return flat.nbytes
    return flat._indices().nbytes + flat._values().nbytes
