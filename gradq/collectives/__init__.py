"""Collectives: how encoded gradients become their mean over ranks. One file each, one contract."""

from __future__ import annotations

from gradq.collectives.base import Collective, Segment, Setting, Step
from gradq.collectives.channels import open_channels
from gradq.collectives.direct import Direct
from gradq.collectives.executor import Executor
from gradq.collectives.joined import Joined
from gradq.collectives.two_phase import TwoPhase
from gradq.errors import ConfigError

__all__ = [
    "COLLECTIVES",
    "Collective",
    "Executor",
    "Joined",
    "Segment",
    "Setting",
    "Step",
    "choose",
    "open_channels",
]

COLLECTIVES: dict[str, type[Collective]] = {"direct": Direct, "two_phase": TwoPhase}

_SMALL_BYTES = 64 * 1024


def choose(name: str, world_size: int, payload_bytes: int) -> type[Collective]:
    """The collective for a run, or for one parameter.

    The choice is made for the whole model or for a parameter and never per bucket, so that results do not
    depend on how DDP groups parameters into buckets.

    Args:
        name: "auto", or a key of `COLLECTIVES`.
        world_size: number of ranks.
        payload_bytes: encoded size of the whole model's gradients.

    Returns:
        For "auto": `Direct` at two ranks or where everything a rank sends is at most 64 KiB (latency decides
        there), else `TwoPhase`.

    Raises:
        ConfigError: unknown name.
    """
    if name == "auto":
        direct = world_size <= 2 or (world_size - 1) * payload_bytes <= _SMALL_BYTES
        return Direct if direct else TwoPhase
    if name not in COLLECTIVES:
        raise ConfigError(f"collective={name!r}: choose from auto, {', '.join(COLLECTIVES)}")
    return COLLECTIVES[name]
