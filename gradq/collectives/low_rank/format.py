"""Low rank: what the kernels of the collective `low_rank` share.

Shapes: a matrix is m by n, row by row; r vectors, the rows of a basis or a factor, have m elements on the
left and n on the right. A matrix is approximated by left.T @ right, left [r, m] and right [r, n].

This is not left to BLAS: its sums depend on the processor, on the number of threads and on where in memory an
array starts, and here every rank must get the same bits, in every bucket layout, before and after a resume.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from gradq.kernels.loader import Backends

__all__ = ["ATTEMPTS", "BACKENDS", "INDEPENDENT", "LANES", "LowRankKernels", "vector_seed"]

LANES = 16  # partial sums of an inner product
INDEPENDENT = 1e-10  # of its energy a vector must keep when it is made orthogonal, or it is replaced
ATTEMPTS = 4  # the vector itself, then random ones

_MASK32 = 0xFFFFFFFF


class LowRankKernels(Protocol):
    """The operations; `gradq.collectives.low_rank.reference` says what they compute, in which order."""

    def orthonormalize(self, factor: Tensor, basis: Tensor, *, key: int) -> None:
        """An orthonormal basis of the rows of factor, fp32 [r, length]; never NaN, whatever factor holds."""

    def project(
        self,
        x: Tensor,
        residual: Tensor | None,
        value: Tensor,
        basis: Tensor,
        factor: Tensor,
        *,
        left: bool,
        loss_scale: float,
    ) -> None:
        """Project x + loss_scale * residual on a basis.

        Args:
            x: fp32 [m * n].
            residual: fp32 [m * n] or None.
            value: fp32 [m * n], written with the sum; must not overlap x or residual.
            basis: fp32 [r, m] if left, else [r, n].
            factor: fp32 [r, n] if left, else [r, m], written.
            left: the side of the basis.
            loss_scale: see `rng.EncodeContext`.
        """

    def reconstruct(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Write left.T @ right, of [r, m] and [r, n], to out [m * n]."""

    def remove(self, left: Tensor, right: Tensor, value: Tensor, *, loss_scale: float) -> None:
        """Replace value [m * n] by (value - left.T @ right) / loss_scale."""


BACKENDS: Backends[LowRankKernels] = Backends(
    "gradq.collectives.low_rank", "the collective low_rank (powersgd)"
)


def vector_seed(key: int, row: int, attempt: int) -> int:
    """The 32-bit number that a random vector is made from.

    Args:
        key: 64-bit, from `rng.dither_key`.
        row: the number of the basis's row.
        attempt: 1, 2, ...
    """
    return (key ^ (key >> 32) ^ (row * 0x9E3779B9) ^ (attempt * 0x85EBCA6B)) & _MASK32
