"""SyncConfig: what stays the same for a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

__all__ = ["SyncConfig"]


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """What stays the same for a run.

    Attributes:
        seed: of the dither.
        collective: "auto", "direct", "two_phase" or "hierarchical".
        local_world_size: ranks a node for "hierarchical", else 1.
        residual_dtype: "fp32" or "bf16".
        timeout: of an exchange; None takes the process group's.
        loss_scale: asked at the start of every step.
        piece_numel: on the CPU a bucket travels in parts of as many elements for each rank; see
            `collectives.parts`.
    """

    seed: int = 0
    collective: str = "auto"
    local_world_size: int = 1
    residual_dtype: str = "fp32"
    timeout: timedelta | None = None
    loss_scale: Callable[[], float] = lambda: 1.0
    piece_numel: int = 1 << 19
