"""Collectives: how encoded gradients become their mean over ranks. One file each, one contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from gradq.collectives import dense
from gradq.collectives.all_gather import AllGather
from gradq.collectives.base import Collective, Segment, Setting, Step, Transfer
from gradq.collectives.composite import Composite, compose
from gradq.collectives.direct import Direct
from gradq.collectives.hierarchical import Hierarchical, ranks_per_node
from gradq.collectives.low_rank.collective import LowRank, LowRankSegment
from gradq.collectives.reduce_scatter import ReduceScatter, Scratch, ShardSegment
from gradq.collectives.two_phase import TwoPhase
from gradq.errors import ConfigError

__all__ = [
    "COLLECTIVES",
    "AllGather",
    "Collective",
    "Composite",
    "Direct",
    "Entry",
    "Hierarchical",
    "LowRank",
    "LowRankSegment",
    "ReduceScatter",
    "Scratch",
    "Segment",
    "Setting",
    "ShardSegment",
    "Step",
    "Transfer",
    "TwoPhase",
    "choose",
    "compose",
    "dense",
    "num_channels",
    "ranks_per_node",
]


class Entry(NamedTuple):
    """A collective by name.

    Attributes:
        of: the collective for a number of ranks.
        for_models: whether it can carry a whole model; the others are for single parameters only.
    """

    of: Callable[[int], type[Collective]]
    for_models: bool = True


def _sparse(world_size: int) -> type[Collective]:
    """The exchange for top-k gradients; docs/codecs.md has the losses that decided."""
    return Direct if world_size <= 4 else TwoPhase


COLLECTIVES: dict[str, Entry] = {
    "direct": Entry(lambda _: Direct),
    "two_phase": Entry(lambda _: TwoPhase),
    "hierarchical": Entry(lambda _: Hierarchical),
    "low_rank": Entry(lambda _: LowRank, for_models=False),
    "sparse": Entry(_sparse, for_models=False),
}

_SMALL_BYTES = 64 * 1024


def choose(
    name: str, world_size: int, payload_bytes: int = 0, *, plain: type[Collective] | None = None
) -> type[Collective]:
    """The collective for a run; given that, as plain, the one for a parameter.

    The choice is made for the whole model or for a parameter and never per bucket, so that results do not
    depend on how DDP groups parameters into buckets.

    Args:
        name: "auto", or a key of `COLLECTIVES`.
        world_size: number of ranks.
        payload_bytes: encoded size of the whole model's gradients.
        plain: the collective of the model.

    Returns:
        For "auto": plain, if given; `Direct` at two ranks or where everything a rank sends is at most 64 KiB
        (latency decides there), else `TwoPhase`.

    Raises:
        ConfigError: unknown name, or one for single parameters only; "hierarchical" for a parameter of a
            model that is averaged otherwise: then nobody has said how many ranks a node has.
    """
    if name == "auto":
        direct = world_size <= 2 or (world_size - 1) * payload_bytes <= _SMALL_BYTES
        return plain or (Direct if direct else TwoPhase)
    entry = COLLECTIVES.get(name)
    if entry is None or (plain is None and not entry.for_models):
        known = [known for known, entry in COLLECTIVES.items() if entry.for_models]
        raise ConfigError(f"collective={name!r}: choose from auto, {', '.join(known)}")
    if name == "hierarchical" and plain not in (None, Hierarchical):
        raise ConfigError(
            'Assignment(collective="hierarchical") is for models that are averaged by it: pass '
            'collective="hierarchical" to gradq.compress too, and give the others "direct" or "two_phase"'
        )
    return entry.of(world_size)


def num_channels(plain: type[Collective]) -> int:
    """The channels that a run needs: for its own collective, and for two phases, which any plan may use."""
    return max(plain.num_channels, TwoPhase.num_channels)
