"""A transposed convolution written as a convolution that computes each phase of the output as channels.

With stride s and kernel k output position ``s·q + r`` is ``Σ_j x[q − j]·w[r + s·j]``: for each phase r a
convolution with ⌈k / s⌉ taps. ONNX Runtime has an integer convolution but no integer transposed
convolution. Afterwards the codes are moved so that the phases stand side by side.

Shapes: O outputs, I inputs a group, d axes, K taps an axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Subpixel"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Subpixel:
    """Geometry of a transposed convolution with the same stride along every axis and no dilation.

    Attributes:
        stride: s, the same along every axis.
        kernel: k of each axis.
        padding: padding of each axis, as torch counts it.
        output_padding: additional output size of each axis, as torch counts it.
    """

    stride: int
    kernel: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]

    @property
    def phases(self) -> int:
        """Number of phases, s^d."""
        return int(self.stride ** len(self.kernel))

    @property
    def taps(self) -> tuple[int, ...]:
        """K of each axis: ⌈k / s⌉, and more where ``output_padding`` makes the output larger."""
        return tuple(
            -(-max(k, k - p + more) // self.stride)
            for k, p, more in zip(self.kernel, self.padding, self.output_padding, strict=True)
        )

    @property
    def cuts(self) -> list[tuple[int, int]]:
        """Number of outputs that are cut off at the begin and at the end of each axis."""
        return [
            (p, self.stride * (taps - 1) + self.stride + p - k - more)
            for taps, k, p, more in zip(
                self.taps, self.kernel, self.padding, self.output_padding, strict=True
            )
        ]

    def rearrange(self, codes: Array, zero_point: Array) -> Array:
        """Rearrange the weight of the transposed convolution into that of the convolution.

        Args:
            codes: (O, I, *kernel) codes of the weight.
            zero_point: (1,) or (O,) code of zero, which stands where a phase has no tap.

        Returns:
            (O·s^d, I, *taps) codes; the phases of one output follow one another.
        """
        s, d = self.stride, len(self.kernel)
        wide = np.empty((*codes.shape[:2], *(s * t for t in self.taps)), codes.dtype)
        wide[...] = zero_point.reshape(-1, *(1,) * (d + 1))
        wide[tuple(slice(n) for n in codes.shape)] = codes
        split = wide.reshape(*codes.shape[:2], *(n for t in self.taps for n in (t, s)))
        taps = [2 + 2 * i for i in range(d)]
        split = np.flip(split, tuple(taps))
        order = (0, *(t + 1 for t in taps), 1, *taps)
        return np.ascontiguousarray(split.transpose(order).reshape(-1, codes.shape[1], *self.taps))

    def repeat(self, values: Array) -> Array:
        """Values of the outputs (O,) to values of the phases (O·s^d,); a single value stays single."""
        return values if len(values) == 1 else np.repeat(values, self.phases)
