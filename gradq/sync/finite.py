"""Whether a step may enter the residuals: its mean is finite, and no outlier.

What a rank fails to send of a gradient is proportional to the gradient. So one batch a million times too
large, which the trainer skips or clips, would leave a residual that spoils many steps to come. A step whose
norm is more than `LIMIT` times the largest of the last `WINDOW` steps therefore leaves no residual. That is
far above what training does by itself (a loss spike is ten to fifty times), and where the level really moves
by more, little is lost: one step's correction. A second outlier in a row must be `LIMIT` times larger still
to count as one, so that a new level is accepted after few steps. Where losses of two such levels take turns,
those of the higher one leave no residual, and what compression loses of them is lost: a log line says to
bring them to one scale. The very first step has nothing to be compared with; a trainer that skips it must say
so (`discard_step`).

The norm is that of the mean over ranks, which is the same on all ranks bit for bit; so is the decision.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

__all__ = ["LIMIT", "WINDOW", "StepCheck"]

LIMIT = 64.0
WINDOW = 16

_log = logging.getLogger("gradq")
_FP16_MAX = 65504.0


class StepCheck:
    """Looks at the means of one step after another.

    On CUDA nothing is asked of the device: the verdict is a tensor.

    Args:
        device: the device of the means.
        logs: whether this rank logs outliers, which all ranks see alike.

    Attributes:
        state: fp64 [WINDOW + 1]: the norms of the last accepted steps, unscaled, oldest first, 0 where there
            was none; and how many times `LIMIT` the next outlier must be.
    """

    def __init__(self, device: torch.device, *, logs: bool = True) -> None:
        self._device = device
        self._logs = logs
        self.start(None)
        self._square: float | Tensor = 0.0
        self._outliers = 0

    def start(self, state: Tensor | None) -> None:
        """Continue from a saved state; None starts anew."""
        nothing = [0.0] * WINDOW + [1.0]
        self.state = torch.tensor(nothing if state is None else state.tolist(), dtype=torch.float64)
        self.state = self._before = self.state.to(self._device)

    def begin(self) -> None:
        """Start a step."""
        self._square = 0.0

    def add(self, mean: Tensor, narrow: torch.dtype) -> None:
        """Take some of the step's mean.

        Args:
            mean: [n], fp32 or fp64; another dtype is converted.
            narrow: the dtype that it is cast to: what is finite in fp32 may be Inf in fp16.
        """
        wide = mean if mean.dtype in (torch.float32, torch.float64) else mean.float()
        if wide.is_cuda:
            square = torch.linalg.vector_norm(wide, dtype=torch.float64).square()
            if narrow == torch.float16:
                square = torch.where((wide.abs() > _FP16_MAX).any(), torch.inf, square)
            self._square = self._square + square
            return
        own = float(torch.dot(wide, wide))
        if own > _FP16_MAX**2 and narrow == torch.float16 and bool((wide.abs() > _FP16_MAX).any()):
            own = float("inf")
        elif not own < float("inf") and bool(torch.isfinite(wide).all()):  # the square overflowed
            own = float(torch.linalg.vector_norm(wide, dtype=torch.float64).square())
        self._square = self._square + own

    def verdict(self, loss_scale: float, step: int) -> bool | Tensor:
        """End a step: whether its residuals may be committed.

        Returns:
            On the CPU a bool; on CUDA a tensor of one bool.
        """
        window, patience = self.state[:-1], self.state[-1:]
        square = torch.as_tensor(self._square, dtype=torch.float64, device=self.state.device)
        norm = (square.sqrt() / loss_scale).reshape(1)
        largest = window.max().reshape(1)
        finite = torch.isfinite(norm)
        usual = (largest == 0) | (norm <= LIMIT * patience * largest)
        verdict = finite & usual
        moved = torch.cat([window[1:], norm, torch.ones_like(norm)])
        wary = torch.cat([window, torch.where(finite, LIMIT * patience, patience)])
        after = torch.where(verdict, torch.where(norm > 0, moved, self.state), wary)
        self._before, self.state = self.state, after
        if verdict.is_cuda:
            return verdict
        if bool(finite) and not bool(verdict):
            self._say(step, float(norm), float(norm / largest))
        return bool(verdict)

    def _say(self, step: int, norm: float, ratio: float) -> None:
        """One log line for the first outlier, and for every one after twice as many."""
        self._outliers += 1
        if self._logs and self._outliers & (self._outliers - 1) == 0:
            _log.warning(
                "step %d: the norm of the mean gradient, %.3g, is %.0f times the largest of the last steps; "
                "what compression lost of it is not carried over%s",
                step,
                norm,
                ratio,
                self._advice(),
            )

    def _advice(self) -> str:
        if self._outliers == 1:
            return ""
        return (
            f" (outlier {self._outliers}; if losses of different scales take turns, bring them to one scale, "
            "or use feedback=False)"
        )

    def revert(self) -> None:
        """Forget the last step."""
        self.state = self._before
