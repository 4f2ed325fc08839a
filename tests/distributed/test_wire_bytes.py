"""How many bytes really leave a rank, counted where they are handed to the process group."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from gradq.options import SyncConfig
from gradq.policy import FixedPolicy, ParameterInfo, Spec
from gradq.sync.gradient_sync import GradientSync
from gradq.testing import Exchange, Network, run_ranks


def gpt_shapes(
    width: int = 256, layers: int = 6, vocabulary: int = 256, context: int = 1024
) -> list[tuple[int, ...]]:
    """The parameters of a GPT of 5.1 million parameters."""
    block = [
        (width,),
        (width,),
        (3 * width, width),
        (3 * width,),
        (width, width),
        (width,),
        (width,),
        (width,),
    ]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(vocabulary, width), (context, width), *(block * layers), (width,), (width,), (vocabulary, width)]


class Counting:
    """A process group that counts what is sent through it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.sent = group, 0

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> dist.Work:
        self.sent += sum(tensor.nbytes for tensor in tensors)
        return self.group.send(tensors, peer, tag)

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> dist.Work:
        return self.group.recv(tensors, peer, tag)


class CountingNetwork(Network):
    """Counts what is sent through it, by rank."""

    def __init__(self, world_size: int) -> None:
        super().__init__(world_size)
        self.sent = [0] * world_size

    def post(self, exchange: Exchange, channel: int, number: int) -> Exchange:
        own = exchange.header.sender
        self.sent[own] += sum(message.nbytes for peer, message in enumerate(exchange.send) if peer != own)
        return super().post(exchange, channel, number)


def one_step(rank: int, spec: str) -> tuple[int, int, int, int]:
    counters = []

    def count(sync: GradientSync) -> None:
        for channel in sync.channels:
            channel._group = Counting(channel._group)
            counters.append(channel._group)

    rest = one_step_of(dist.group.WORLD, spec, count)
    return sum(counter.sent for counter in counters), *rest


def one_step_of(
    group: dist.ProcessGroup, spec: str, prepare: Callable[[GradientSync], None] = lambda sync: None
) -> tuple[int, int, int]:
    """Bytes that stats count, bytes of a dense all-reduce, and elements."""
    infos = [
        ParameterInfo(name=f"p{index}", shape=shape, dtype=torch.float32, index=index)
        for index, shape in enumerate(gpt_shapes())
    ]
    numel = sum(info.numel for info in infos)
    sync = GradientSync(infos, FixedPolicy(spec=Spec.parse(spec)), spec, group, SyncConfig())
    prepare(sync)
    flat = torch.randn(numel, generator=torch.Generator().manual_seed(group.rank()))
    sync.average_buckets([(flat, [info.name for info in infos])])[0].wait()
    stats = sync.stats()
    sync.close()
    return stats.wire_bytes, stats.dense_bytes, numel


BYTES = [("int8", 0.26), ("int4+int4", 0.135), ("int4", 0.20), ("bf16", 0.501)]


@pytest.mark.parametrize(("world_size", "spec", "most"), [(2, *BYTES[2]), (4, *BYTES[1])])
def test_bytes_on_the_wire_relative_to_fp32(world_size: int, spec: str, most: float) -> None:
    """All specs are in test_collectives.py."""
    check_bytes(spec, most, world_size, run_ranks(one_step, world_size, spec))


def check_bytes(spec: str, most: float, world_size: int, results: list) -> None:
    for sent, wire_bytes, dense_bytes, numel in results:
        assert numel > 5_000_000
        assert sent == wire_bytes, "stats do not count what was sent"
        assert dense_bytes == 2 * (world_size - 1) * 4 * numel // world_size
    total = sum(sent for sent, _, _, _ in results) / sum(dense for _, _, dense, _ in results)
    assert total <= most
    assert max(sent / dense for sent, _, dense, _ in results) <= most, "the load is uneven"
    assert total > 0.9 * {"int8": 0.25, "int4+int4": 0.125, "int4": 0.125, "bf16": 0.5}[spec]
