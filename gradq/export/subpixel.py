"""A transposed convolution as a convolution that computes every phase of its output as channels of their own.

With stride s and kernel k output position ``s·q + r`` is ``Σ_j x[q − j]·w[r + s·j]``: for each phase r a
convolution with ⌈k / s⌉ taps. ONNX Runtime has an integer convolution and no integer transposed convolution;
the phases are put side by side by moving codes.

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
        stride: s.
        kernel: k of each axis.
        padding: of each axis, as torch has it.
        output_padding: likewise.
    """

    stride: int
    kernel: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]

    @property
    def phases(self) -> int:
        """s^d."""
        return int(self.stride ** len(self.kernel))

    @property
    def taps(self) -> tuple[int, ...]:
        """K of each axis: ⌈k / s⌉, or more where ``output_padding`` asks for more outputs."""
        return tuple(
            -(-max(k, k - p + more) // self.stride)
            for k, p, more in zip(self.kernel, self.padding, self.output_padding, strict=True)
        )

    @property
    def cuts(self) -> list[tuple[int, int]]:
        """How much of each axis is cut off at its begin and end."""
        return [
            (p, self.stride * (taps - 1) + self.stride + p - k - more)
            for taps, k, p, more in zip(
                self.taps, self.kernel, self.padding, self.output_padding, strict=True
            )
        ]

    def rearrange(self, codes: Array, zero_point: Array) -> Array:
        """The weight of the convolution.

        Args:
            codes: (O, I, *kernel).
            zero_point: (1,) or (O,): what stands where a phase has no tap.

        Returns:
            (O·s^d, I, *taps), the phases of an output behind one another.
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
        """(O,) of the outputs to (O·s^d,) of the phases; a single value stays one."""
        return values if len(values) == 1 else np.repeat(values, self.phases)
