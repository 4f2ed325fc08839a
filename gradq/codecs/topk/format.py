"""Top-k: sizes and operations that the kernels share; `gradq.codecs.topk.reference` says what they write."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from gradq.kernels.loader import backend_for

__all__ = ["SCALE_BYTES", "Block", "TopK", "TopKKernels", "payload_bytes", "topk_kernels"]

SCALE_BYTES = 2  # bf16
_MODULES = {"reference": "gradq.codecs.topk.reference", "numba": "gradq.codecs.topk.cpu"}


@dataclass(frozen=True)
class TopK:
    """How much is kept.

    Attributes:
        percent: of the elements of a block, rounded up.
        num_bits: of a kept element's code.
        block_size: elements that share a scale and are chosen from.
    """

    percent: float
    num_bits: int
    block_size: int

    def block(self, length: int) -> Block:
        """The shape of a block of some elements."""
        kept = max(1, math.ceil(length * self.percent / 100 - 1e-6))
        low_bits = (length // kept).bit_length() - 1
        return Block(length, kept, self.num_bits, low_bits)


@dataclass(frozen=True)
class Block:
    """What a block of `length` elements looks like on the wire.

    Attributes:
        length: elements.
        kept: how many of them are sent.
        num_bits: of a code.
        low_bits: of an index that are sent as they are; the others are sent in unary.
    """

    length: int
    kept: int
    num_bits: int
    low_bits: int

    @property
    def padded(self) -> int:
        """Codes, with those that fill the last bytes."""
        return -(-self.kept // 8) * 8

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes."""
        return self.padded * self.num_bits // 8

    @property
    def high_bytes(self) -> int:
        """Bytes of the indices' high parts: a one for each, and a zero for each step."""
        return -(-(self.kept + ((self.length - 1) >> self.low_bits)) // 8)

    @property
    def low_bytes(self) -> int:
        """Bytes of the indices' low parts."""
        return -(-self.kept * self.low_bits // 8)

    @property
    def nbytes(self) -> int:
        """Bytes without the scale."""
        return self.code_bytes + self.high_bytes + self.low_bytes


class TopKKernels(Protocol):
    """The operations."""

    def topk_encode(
        self,
        x: Tensor,
        payload: Tensor,
        *,
        topk: TopK,
        residual: Tensor | None,
        new_residual: Tensor | None,
        loss_scale: float,
    ) -> None:
        """Encode x + loss_scale * residual and write what was lost, / loss_scale, to new_residual."""

    def topk_decode(self, payload: Tensor, out: Tensor, *, topk: TopK) -> None:
        """Decode a payload of `topk_encode` into out."""

    def topk_decode_mean(self, payloads: Tensor, out: Tensor, *, topk: TopK) -> None:
        """Mean over the W decoded payloads into out."""


def topk_kernels(device: torch.device) -> TopKKernels:
    """The kernels that serve a device.

    Raises:
        KernelError: as `ops.backend_for`; there are none for CUDA.
    """
    return cast(TopKKernels, backend_for(device, _MODULES, "the codec topk"))


def payload_bytes(numel: int, topk: TopK) -> int:
    """Scales, then blocks; the last may be shorter and keeps fewer."""
    whole, rest = divmod(numel, topk.block_size)
    nbytes = whole * (SCALE_BYTES + topk.block(topk.block_size).nbytes)
    return nbytes + (SCALE_BYTES + topk.block(rest).nbytes if rest else 0)
