"""Entries of a state: rows [W, ...], one a rank, of which this rank uses some; tensors and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradq.errors import CheckpointError
from gradq.sync.base import Sync

__all__ = ["Rows", "check_tensor", "integer", "mapping", "own_row"]


class Rows:
    """Which rows of a state this rank uses: its own if as many ranks saved it, else all.

    Args:
        sync: the sync that is loaded into.
        saved_world_size: the number of ranks that saved.
        ranks: the entry "rank" of the state: a row-sharded DTensor [W, 1], a plain tensor [W, 1] of all
            ranks' rows, or [1, 1] of this rank's.

    Attributes:
        same: whether as many ranks saved as load.
        ranks: the ranks of the rows that `take` gives.

    Raises:
        CheckpointError: the rows are of another rank, or of another number of ranks than saved.
    """

    def __init__(self, sync: Sync, saved_world_size: int, ranks: object) -> None:
        self._group, self._own = sync.group, sync.rank
        self._saved = saved_world_size
        self.same = saved_world_size == sync.world_size
        self.ranks = [sync.rank] if self.same else list(range(saved_world_size))
        self._first: list[int] = list(range(saved_world_size))  # the rank of each row of a plain tensor
        found = check_tensor(self._rows(ranks, "rank"), "rank").reshape(-1)
        if found.dtype != torch.int64 or found.numel() not in (1, saved_world_size):
            raise CheckpointError(
                f"'rank' must be {saved_world_size} integers, got {tuple(found.shape)} of {found.dtype}"
            )
        if found.numel() == 1 and saved_world_size > 1:
            if int(found) != sync.rank or not self.same:
                raise CheckpointError(
                    f"rank {sync.rank} was given the residuals of rank {int(found)} of {saved_world_size}: "
                    "this state has one rank's rows only. Save with torch.distributed.checkpoint on all "
                    "ranks, or let rank 0 save what handle.gathered_state_dict() gives"
                )
            self._first = [sync.rank]
        elif found.tolist() != self._first:
            raise CheckpointError(f"'rank' must be 0 to {saved_world_size - 1}, got {found.tolist()[:8]}")

    def take(
        self, value: object, what: str, numel: int | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The rows [len(ranks), n] that this rank uses.

        Args:
            value: an entry of the state.
            what: the name of the entry.
            numel: the number n of elements in a row.
            dtype: the dtype of the entry; any real floating one if None.

        Raises:
            CheckpointError: it is something else.
        """
        rows = check_tensor(self._rows(value, what), what, (None, numel), dtype)
        held = 1 if self.is_sharded(value) else len(self._first)
        if rows.shape[0] != held:
            raise CheckpointError(f"{what} must have {held} rows, one a rank, got {tuple(rows.shape)}")
        if self.same and rows.shape[0] > 1:
            rows = rows[self._own : self._own + 1]
        return rows

    @staticmethod
    def is_sharded(value: object) -> bool:
        """Whether it is a DTensor."""
        from torch.distributed.tensor import DTensor  # DTensor takes 0.6 s to import

        return isinstance(value, DTensor)

    def _rows(self, value: object, what: str) -> Tensor:
        """The local rows of a DTensor, or a plain tensor; raise CheckpointError for anything else."""
        from torch.distributed.tensor import DTensor, Shard

        if not isinstance(value, Tensor):
            raise CheckpointError(f"{what} must be a tensor, got {type(value).__name__}")
        if not isinstance(value, DTensor):
            return value
        ranks = dist.get_process_group_ranks(self._group)
        mesh = value.device_mesh.mesh.flatten().tolist()
        if not self.same:
            raise CheckpointError(
                f"{what} is a DTensor, but {self._saved} ranks saved and {len(ranks)} load: use "
                "gradq.load_checkpoint(handle, folder), or full tensors"
            )
        if mesh != ranks or value.device_mesh.ndim != 1:
            raise CheckpointError(
                f"{what} is spread over the ranks {mesh}, this run's gradients over {ranks}"
            )
        if tuple(value.placements) != (Shard(0),) or value.dim() < 1 or value.shape[0] != len(ranks):
            raise CheckpointError(
                f"{what} must be row-sharded [{len(ranks)}, n], got {tuple(value.shape)}, {value.placements}"
            )
        return value.to_local()


def check_tensor(
    value: object, what: str, shape: Sequence[int | None] | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The value, on the CPU, if it is a plain dense tensor.

    Args:
        value: an entry of a state.
        what: the name of the entry.
        shape: the shape that it must have; None for any size, or any shape.
        dtype: the dtype that it must have. None: any without a shape, a floating one with.

    Raises:
        CheckpointError: it is something else.
    """
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{what} must be a tensor, got {type(value).__name__}")
    if Rows.is_sharded(value):
        raise CheckpointError(f"{what} must be a plain tensor, got a DTensor")
    if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
        raise CheckpointError(
            f"{what} must be a dense tensor with values, got {value.layout} on {value.device}"
        )
    if shape is not None:
        fits = len(shape) == value.dim() and all(
            want is None or want == size for want, size in zip(shape, value.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise CheckpointError(f"{what} must have the shape ({wanted}), got {tuple(value.shape)}")
    if dtype is not None and value.dtype != dtype:
        raise CheckpointError(f"{what} must be {dtype}, got {value.dtype}")
    if dtype is None and shape is not None and not value.is_floating_point():
        raise CheckpointError(f"{what} must have real floating-point numbers, got {value.dtype}")
    return value.detach().cpu()


def mapping(value: object, what: str) -> Mapping[str, Any]:
    """The value if it is a mapping with strings for keys.

    Raises:
        CheckpointError: it is not.
    """
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"{what} must be a dictionary from handle.state_dict() or handle.gathered_state_dict(), got "
            f"{type(value).__name__}; every rank loads it"
        )
    if odd := [key for key in value if not isinstance(key, str)]:
        raise CheckpointError(f"{what} has the key {odd[0]!r}, which is not a string")
    return value


def integer(state: Mapping[str, Any], name: str, least: int, below: int) -> int:
    """An entry that is one integer of a range, as a number or a tensor.

    Raises:
        CheckpointError: it is missing, or something else.
    """
    if name not in state:
        raise CheckpointError(f"the saved state has no {name!r}; it is incomplete or of something else")
    value = state[name]
    if isinstance(value, Tensor):
        whole = not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
        check_tensor(value, name)
        if not whole or value.numel() != 1:
            raise CheckpointError(f"{name!r} must be one integer, got {tuple(value.shape)} of {value.dtype}")
        value = int(value)
    if type(value) is not int:
        raise CheckpointError(f"{name!r} must be one integer, got {value!r}")
    if not least <= value < below:
        raise CheckpointError(f"{name!r} is {value}, and must be in [{least}, {below})")
    return value


def own_row(rows: Tensor, sync: Sync, same: bool) -> Tensor:
    """This rank's part of rows [W, ...]; without a row of its own the mean, or of integers the first."""
    from torch.distributed.tensor import DTensor

    if isinstance(rows, DTensor):
        return rows.to_local()[0]
    if same:
        return rows[sync.rank]
    return rows.mean(0) if rows.is_floating_point() else rows[0]
