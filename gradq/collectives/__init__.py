"""Collectives: how encoded gradients become their mean over ranks. One file each, one contract."""

from __future__ import annotations

from collections.abc import Callable

from gradq.collectives import dense
from gradq.collectives.all_gather import AllGather
from gradq.collectives.base import Collective, Scratch, Segment, Setting, Step
from gradq.collectives.direct import Direct
from gradq.collectives.hierarchical import Hierarchical, ranks_per_node
from gradq.collectives.joined import Joined
from gradq.collectives.low_rank.collective import LowRank, basis_numel
from gradq.collectives.reduce_scatter import ReduceScatter, ShardSegment
from gradq.collectives.sparse import sparse
from gradq.collectives.two_phase import TwoPhase
from gradq.errors import ConfigError

__all__ = [
    "COLLECTIVES",
    "PER_PARAMETER",
    "AllGather",
    "Collective",
    "Hierarchical",
    "Joined",
    "LowRank",
    "ReduceScatter",
    "Scratch",
    "Segment",
    "Setting",
    "ShardSegment",
    "Step",
    "basis_numel",
    "choose",
    "dense",
    "ranks_per_node",
]

# for a whole model or for single parameters
COLLECTIVES: dict[str, type[Collective]] = {
    "direct": Direct,
    "two_phase": TwoPhase,
    "hierarchical": Hierarchical,
}
# only for single parameters; by number of ranks
PER_PARAMETER: dict[str, Callable[[int], type[Collective]]] = {
    "low_rank": lambda _: LowRank,
    "sparse": sparse,
}

_SMALL_BYTES = 64 * 1024


def choose(
    name: str, world_size: int, payload_bytes: int = 0, *, plain: type[Collective] | None = None
) -> type[Collective]:
    """The collective for a run; given that, as plain, the one for a parameter.

    The choice is made for the whole model or for a parameter and never per bucket, so that results do not
    depend on how DDP groups parameters into buckets.

    Args:
        name: "auto", or a key of `COLLECTIVES`; for a parameter also one of `PER_PARAMETER`.
        world_size: number of ranks.
        payload_bytes: encoded size of the whole model's gradients.
        plain: the collective of the model.

    Returns:
        For "auto": plain, if given; `Direct` at two ranks or where everything a rank sends is at most 64 KiB
        (latency decides there), else `TwoPhase`.

    Raises:
        ConfigError: unknown name.
    """
    if name == "auto":
        direct = world_size <= 2 or (world_size - 1) * payload_bytes <= _SMALL_BYTES
        return plain or (Direct if direct else TwoPhase)
    if plain is not None and name in PER_PARAMETER:
        return PER_PARAMETER[name](world_size)
    if name not in COLLECTIVES:
        raise ConfigError(f"collective={name!r}: choose from auto, {', '.join(COLLECTIVES)}")
    return COLLECTIVES[name]
