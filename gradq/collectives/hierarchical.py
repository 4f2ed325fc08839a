"""Hierarchical: exact inside a node, compressed between nodes.

The L ranks of a node share every parameter out among themselves. Each sums its shard for the node in fp32,
averages it with the ranks of the other nodes that own the same shard (compressed: `Direct` at two nodes, else
`TwoPhase`), and hands the mean to its node. So a node sends what one rank would: 1/L of the flat form. What
travels inside the node is exact and counted apart ("intra_node_bytes").

Reference:
    The two levels of hierarchical all-reduce, as in Goyal et al., "Accurate, large minibatch SGD", 2017.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradq import wire
from gradq.collectives.base import Collective, Segment, Setting, Step
from gradq.collectives.direct import Direct
from gradq.collectives.message_layout import MessageLayout
from gradq.collectives.two_phase import TwoPhase
from gradq.errors import ConfigError
from gradq.transport.contract import Channel, Pending

__all__ = ["Hierarchical", "ranks_per_node"]


def ranks_per_node(asked: int | None, rank: int, world_size: int) -> int:
    """How many ranks every node has.

    Args:
        asked: what the user says; None takes LOCAL_WORLD_SIZE, which torchrun sets.
        rank: this rank in the group.
        world_size: number of ranks in the group.

    Raises:
        ConfigError: it is not known, nodes are unequal, or ranks are not numbered node by node.
    """
    text = os.environ.get("LOCAL_WORLD_SIZE") if asked is None else str(asked)
    if text is None:
        raise ConfigError(
            'collective="hierarchical" must know how many ranks a node has: start with torchrun, set '
            "LOCAL_WORLD_SIZE, or pass local_world_size="
        )
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"local_world_size={text}: it must be a positive number of ranks")
    local_world_size = int(text)
    if world_size % local_world_size:
        raise ConfigError(
            f"local_world_size={local_world_size} does not divide the {world_size} ranks: "
            'collective="hierarchical" needs as many ranks on every node; use "two_phase" here'
        )
    local_rank = os.environ.get("LOCAL_RANK")
    if asked is None and local_rank is not None and int(local_rank) != rank % local_world_size:
        raise ConfigError(
            f"rank {rank} is local rank {local_rank} of {local_world_size}: "
            'collective="hierarchical" needs ranks numbered node by node, as torchrun does (Slurm: '
            "--distribution=block)"
        )
    return local_world_size


class _Among:
    """A channel between some of its ranks, who call each other by their position among them."""

    def __init__(self, channel: Channel, ranks: Sequence[int], world_size: int) -> None:
        self._channel, self._ranks, self._world_size = channel, tuple(ranks), world_size
        self._nothing = torch.empty(0, dtype=torch.uint8)

    def post(self, send: Sequence[Tensor], receive: Sequence[Tensor], header: wire.Header) -> Pending:
        """See `gradq.transport.contract.Channel.post`; nothing is exchanged with the others."""
        everyone_send = [self._nothing] * self._world_size
        everyone_receive = [self._nothing] * self._world_size
        for position, rank in enumerate(self._ranks):
            everyone_send[rank], everyone_receive[rank] = send[position], receive[position]
        header = replace(header, sender=self._ranks[header.sender])
        return self._channel.post(everyone_send, everyone_receive, header)


class Hierarchical(Collective):
    """Sum inside the node, compressed average over nodes, all-gather inside the node.

    Ranks are numbered node by node: rank = node * local_world_size + local rank, as torchrun does.

    The local residuals are those of the shards this rank owns for its node, in units of a node's sum.
    """

    num_channels = 4

    def __init__(self, segments: Sequence[Segment], dtype: torch.dtype, setting: Setting) -> None:
        super().__init__(segments, dtype, setting)
        local_world_size, world_size = setting.local_world_size, setting.world_size
        node, local_rank = divmod(setting.rank, local_world_size)
        num_nodes = world_size // local_world_size
        mates = range(node * local_world_size, (node + 1) * local_world_size)
        peers = range(local_rank, world_size, local_world_size)
        channels = list(setting.channels)
        first = 1 if local_world_size > 1 else 0  # a stage that does not exist takes no channel
        self._inner: Collective | None = None
        between = 0
        if num_nodes > 1:
            form: type[Collective] = Direct if num_nodes == 2 else TwoPhase
            between = form.num_channels
            self._inner = form(
                self._own_segments(local_rank),
                dtype,
                replace(
                    setting,
                    rank=node,
                    world_size=num_nodes,
                    channels=[_Among(c, peers, world_size) for c in channels[first : first + between]],
                ),
            )
        inside = [channels[index] for index in (0, first + between) if index < len(channels)]
        self._inside = replace(
            setting,
            rank=local_rank,
            world_size=local_world_size,
            channels=[_Among(channel, mates, world_size) for channel in inside],
            byte_kinds=("wire_bytes", "intra_node_bytes"),
        )
        self._local_rank, self._local_world_size = local_rank, local_world_size

        layouts = [MessageLayout(segments, local_world_size, owner) for owner in range(local_world_size)]
        # by local owner: where each of its shards stands in flat; in a message one follows another
        self._shards = [[slot.flat for slot in layout.slots] for layout in layouts]
        own_bytes = [wire.HEADER_BYTES + layout.numel * dtype.itemsize for layout in layouts]
        self._gathered_LN = self.buffer(local_world_size, own_bytes[local_rank])  # one shard, from all mates
        self._messages = [
            self._gathered_LN[local_rank] if owner == local_rank else self.buffer(own_bytes[owner])
            for owner in range(local_world_size)
        ]  # the shards of all, from this rank; later the means, from all

    @classmethod
    def has_phase2(cls, world_size: int, local_world_size: int) -> bool:
        """Between two nodes there is one phase."""
        return world_size // local_world_size > 2

    @classmethod
    def shard_of(
        cls, segment: Segment, world_size: int, local_world_size: int, owner: int
    ) -> tuple[int, int]:
        """The elements that a rank owns among the nodes, out of those that it sums for its node."""
        node, local_rank = divmod(owner, local_world_size)
        first, last = segment.shard(local_world_size, local_rank)
        own = replace(segment, numel=last - first)
        start, stop = own.shard(world_size // local_world_size, node)
        return first + start, first + stop

    def _own_segments(self, local_rank: int) -> list[Segment]:
        """The shards of this rank as segments of a flat tensor of their own."""
        own, position = [], 0
        for segment in self.segments:
            start, stop = segment.shard(self.setting.local_world_size, local_rank)
            if start < stop:
                own.append(
                    replace(segment, start=position, numel=stop - start, offset=start, whole=segment.numel)
                )
                position += stop - start
        return own

    def _body(self, message: Tensor) -> Tensor:
        """The elements in a message, after the header."""
        return message[wire.HEADER_BYTES :].view(self.dtype)

    def average(self, flat: Tensor, step: Step) -> Iterator[Pending]:
        """See `Collective.average`.

        1. Inside the node: send every shard, exact, to the rank that owns it.
        2. Sum the own shards in the order of local ranks.
        3. Average them over nodes, compressed (`Direct` or `TwoPhase`); divide by the ranks a node.
        4. Inside the node: hand the own means to all, exact.
        """
        mates = self._local_world_size
        for shards, message in zip(self._shards, self._messages, strict=True):
            for there, shard in zip(self._split(message, shards), shards, strict=True):
                there.copy_(flat[shard])
        if mates > 1:
            yield self.exchange(self._inside, 1, self._messages, list(self._gathered_LN), step)
        total = self._body(self._gathered_LN[0])
        for row in self._gathered_LN[1:]:
            total += self._body(row)
        if self._inner is not None:
            yield from self._inner.average(total, step)
        total /= mates
        own = self._messages[self._local_rank]
        self._body(own).copy_(total)
        if mates > 1:
            yield self.exchange(self._inside, 2, [own] * mates, self._messages, step)
        for shards, message in zip(self._shards, self._messages, strict=True):
            for there, shard in zip(self._split(message, shards), shards, strict=True):
                flat[shard] = there

    def _split(self, message: Tensor, shards: Sequence[slice]) -> Sequence[Tensor]:
        return torch.split(self._body(message), [shard.stop - shard.start for shard in shards])
