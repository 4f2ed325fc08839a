"""Collectives: how encoded gradients become their mean over ranks. One file each, one contract."""

from __future__ import annotations

from gradq.collectives.all_gather import AllGather
from gradq.collectives.base import Collective, Scratch, Segment, Setting, Step
from gradq.collectives.channels import open_channels
from gradq.collectives.direct import Direct
from gradq.collectives.executor import Executor
from gradq.collectives.hierarchical import Hierarchical, ranks_per_node
from gradq.collectives.reduce_scatter import ReduceScatter, ShardSegment
from gradq.collectives.two_phase import TwoPhase
from gradq.errors import ConfigError

__all__ = [
    "COLLECTIVES",
    "AllGather",
    "Collective",
    "Executor",
    "Hierarchical",
    "ReduceScatter",
    "Scratch",
    "Segment",
    "Setting",
    "ShardSegment",
    "Step",
    "choose",
    "open_channels",
    "ranks_per_node",
]

COLLECTIVES: dict[str, type[Collective]] = {
    "direct": Direct,
    "two_phase": TwoPhase,
    "hierarchical": Hierarchical,
}

_SMALL_BYTES = 64 * 1024


def choose(name: str, world_size: int, payload_bytes: int) -> type[Collective]:
    """The collective for a run.

    The choice is one for the whole model and never per bucket, so that results do not depend on how DDP
    groups parameters into buckets.

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
