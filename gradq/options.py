"""SyncConfig: what stays the same for a run."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from gradq.errors import ConfigError

__all__ = ["SyncConfig", "Timeout", "as_timedelta", "scale_of"]

Timeout = timedelta | float | None  # of an exchange; a number is in seconds

_SEEDS = (-(1 << 63), 1 << 64)
_LONGEST_S = 1e9


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """What stays the same for a run.

    Attributes:
        seed: of the random rounding; an integer of 64 bits.
        collective: "auto", "direct", "two_phase" or "hierarchical".
        local_world_size: ranks a node for "hierarchical", else 1.
        residual_dtype: "fp32" or "bf16".
        timeout: limit for one exchange; None takes the process group's. See `as_timedelta`.
        loss_scale: asked at the start of every step.
        piece_numel: on the CPU a bucket travels in parts of as many elements for each rank; see
            `collectives.parts`.

    Raises:
        ConfigError: a seed or collective of the wrong kind.
    """

    seed: int = 0
    collective: str = "auto"
    local_world_size: int = 1
    residual_dtype: str = "fp32"
    timeout: timedelta | None = None
    loss_scale: Callable[[], float] = lambda: 1.0
    piece_numel: int = 1 << 19

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", _as_seed(self.seed))
        if not isinstance(self.collective, str):
            raise ConfigError(
                f"collective={self.collective!r:.200}: it is a name, such as 'auto', 'direct' or 'two_phase'"
            )


def as_timedelta(timeout: Timeout) -> timedelta | None:
    """The limit for one exchange.

    Args:
        timeout: a timedelta, a number of seconds, or None for the process group's own.

    Raises:
        ConfigError: it is not positive, not finite, or something else.
    """
    if timeout is None:
        return None
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise ConfigError(f"timeout={timeout!r:.200}: it is a number of seconds or a datetime.timedelta")
    if not 0 < seconds <= _LONGEST_S or not math.isfinite(seconds):
        raise ConfigError(
            f"timeout={timeout!r:.200}: it must be positive and finite, in seconds; None takes the process "
            "group's"
        )
    return timedelta(seconds=seconds)


def scale_of(grad_scaler: object) -> Callable[[], float]:
    """A function that asks a `torch.amp.GradScaler`, or None, by how much gradients are too large.

    The function raises ConfigError where the scale cannot be divided by.

    Raises:
        ConfigError: it is no GradScaler.
    """
    if grad_scaler is None:
        return lambda: 1.0
    get_scale = getattr(grad_scaler, "get_scale", None)
    if not callable(get_scale):
        raise ConfigError(
            f"grad_scaler={grad_scaler!r:.200}: it takes the torch.amp.GradScaler in use, or None"
        )

    def scale() -> float:
        value = float(get_scale())
        if not 0 < value < math.inf:
            raise ConfigError(
                f"the GradScaler's scale is {value}: gradients scaled by it are lost. It halves after every "
                "step that is not finite, so look for NaN or Inf in the loss"
            )
        return value

    return scale


def _as_seed(seed: object) -> int:
    """The seed as a Python integer, so that all ranks compare the same thing."""
    try:
        if isinstance(seed, bool):
            raise TypeError
        number = operator.index(seed)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):  # RuntimeError: a tensor of several elements
        raise ConfigError(f"seed={seed!r:.200}: it is an integer, the same on all ranks") from None
    if not _SEEDS[0] <= number < _SEEDS[1]:
        raise ConfigError(f"seed={seed!r:.40}: it has at most 64 bits, from -2**63 to 2**64 - 1")
    return number
