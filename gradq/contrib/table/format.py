"""Levels in a table: what the kernels of the table codecs share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from gradq.kernels.loader import backend_for

__all__ = [
    "MULTIPLIERS",
    "SCALE_BYTES",
    "Table",
    "TableKernels",
    "payload_bytes",
    "small_float",
    "table_kernels",
]

SCALE_BYTES = {"bf16": 2, "e8m0": 1, "e6m2": 1}
MULTIPLIERS = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25)  # of absmax, tried by the rule "mse"
_MODULES = {"reference": "gradq.contrib.table.reference", "numba": "gradq.contrib.table.cpu"}


@dataclass(frozen=True)
class Table:
    """Levels and how a block is scaled to them.

    Attributes:
        levels: ascending, exact in fp32; the largest is the positive one a block's absmax is scaled to.
        num_bits: of a code, its index.
        block_size: elements that share a scale, a multiple of 8.
        scale_format: "bf16", "e8m0" (a power of two) or "e6m2".
        rule: "absmax", "l1", "l2" or "mse".
        stochastic: round to one of the two neighbours at random, or to the nearest.
    """

    levels: tuple[float, ...]
    num_bits: int
    block_size: int
    scale_format: str
    rule: str
    stochastic: bool


class TableKernels(Protocol):
    """The operations; `gradq.contrib.table.reference` documents the format they write."""

    def table_encode(
        self,
        x: Tensor,
        payload: Tensor,
        *,
        table: Table,
        key: int,
        shift: int,
        first_block: int,
        residual: Tensor | None,
        new_residual: Tensor | None,
        loss_scale: float,
    ) -> None:
        """Encode x + loss_scale * residual and write what was lost, / loss_scale, to new_residual."""

    def table_decode(self, payload: Tensor, out: Tensor, *, table: Table) -> None:
        """Decode a payload of `table_encode` into out."""

    def table_decode_mean(self, payloads: Tensor, out: Tensor, *, table: Table) -> None:
        """Mean over the W decoded payloads into out."""


def table_kernels(device: torch.device, codec: str) -> TableKernels:
    """The kernels that serve a device.

    Args:
        device: of the tensors.
        codec: its name, for error messages.

    Raises:
        KernelError: no backend for the device, or its package is missing.
    """
    return cast(TableKernels, backend_for(device, _MODULES, f"the codec {codec!r}"))


def small_float(number: int, mantissa_bits: int) -> float:
    """What a number stands for as a float without sign and bias: subnormals first, in steps of 1."""
    steps = 1 << mantissa_bits
    if number < steps:
        return float(number)
    return float((steps + number % steps) << (number // steps - 1))


def payload_bytes(numel: int, table: Table) -> int:
    """Scales, then codes; the last block is padded to a multiple of 8 elements."""
    num_blocks = -(-numel // table.block_size)
    padded = -(-numel // 8) * 8
    return num_blocks * SCALE_BYTES[table.scale_format] + padded * table.num_bits // 8
