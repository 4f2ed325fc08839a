"""Channels: how messages reach the peers. Here: point to point over a torch process group.

Every receive is posted before any send: on Gloo that gives the ideal time on every run, where its own
all-to-all takes one to two times as long, and it needs neither equal sizes nor padding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from gradq import wire
from gradq.collectives.base import Channel
from gradq.errors import PeerError, UnsupportedError
from gradq.metrics import Event, Metrics

__all__ = ["PeerChannel", "open_channels"]


_BACKENDS = ("gloo", "mpi4py")  # what can post a receive before the send, and tell messages apart by tags
_TAGS = 1 << 15  # MPI allows at least as many


class _Exchange:
    """Receives and sends under way."""

    def __init__(
        self,
        works: list[tuple[str, int, dist.Work]],
        receive: Sequence[Tensor],
        header: wire.Header,
        metrics: Metrics,
    ) -> None:
        self._works = works
        self._receive = receive
        self._header = header
        self._metrics = metrics
        self._posted = time.perf_counter()

    def wait(self) -> None:
        """Wait for all, check every header.

        Raises:
            PeerError: a peer died, stalled past the group's timeout, or the link broke.
            WireError: a message is not the one expected.
        """
        header = self._header
        for verb, peer, work in self._works:
            try:
                work.wait()
            except RuntimeError as error:
                raise PeerError(
                    f"rank {header.sender}: {verb} rank {peer} failed in step {header.step}, bucket "
                    f"{header.bucket}, phase {header.phase}: {error}"
                ) from error
        elapsed_ms = 1e3 * (time.perf_counter() - self._posted)
        self._metrics.record(Event("exchange_ms", elapsed_ms, header.step, header.bucket, header.phase))
        for peer, message in enumerate(self._receive):
            if peer != header.sender and message.numel():
                received = message[: wire.HEADER_BYTES].numpy().tobytes()
                replace(header, sender=peer).check(received)


class PeerChannel:
    """A process group used by one thread only.

    Args:
        group: a group of gradq's own; no one else may use it.
        metrics: takes the exchange times.
    """

    def __init__(self, group: dist.ProcessGroup, metrics: Metrics) -> None:
        self._group = group
        self._metrics = metrics
        self._posted = 0

    def post(self, send: Sequence[Tensor], receive: Sequence[Tensor], header: wire.Header) -> _Exchange:
        """See `gradq.collectives.base.Channel.post`."""
        packed = torch.frombuffer(bytearray(header.pack()), dtype=torch.uint8)
        peers = [(header.sender + i) % len(send) for i in range(1, len(send))]
        works: list[tuple[str, int, dist.Work]] = []
        tag = self._posted % _TAGS  # its own, so a message can only meet the receive meant for it
        self._posted += 1
        try:
            for peer in reversed(peers):
                if receive[peer].numel():
                    works.append(("receiving from", peer, self._group.recv([receive[peer]], peer, tag)))
            for peer in peers:
                if send[peer].numel():
                    send[peer][: wire.HEADER_BYTES] = packed
                    works.append(("sending to", peer, self._group.send([send[peer]], peer, tag)))
        except RuntimeError as error:
            raise PeerError(
                f"rank {header.sender}: cannot reach rank {peer} in step {header.step}, "
                f"bucket {header.bucket}, phase {header.phase}: {error}"
            ) from error
        return _Exchange(works, receive, header, self._metrics)


def open_channels(
    group: dist.ProcessGroup,
    count: int,
    metrics: Metrics,
    timeout: timedelta | None = None,
    device: torch.device | None = None,
) -> tuple[Sequence[Channel], Callable[[], None]]:
    """Make process groups over the ranks of a group, one a channel. All its ranks must call this together.

    Args:
        group: whose ranks take part.
        count: number of channels.
        metrics: takes the exchange times.
        timeout: of every exchange; the group's own by default.
        device: of the messages; the CPU by default.

    Returns:
        The channels, and a function that gives their process groups back.

    Raises:
        UnsupportedError: the group does not move CPU tensors over Gloo or MPI.
    """
    if group.size() == 1:
        return [], lambda: None
    if device is not None and device.type != "cpu":
        from gradq.collectives.streams import open_stream_channels

        return open_stream_channels(group, count, metrics, timeout, device)
    backend = _cpu_backend(group)
    if timeout is None:
        timeout = getattr(group._get_backend(torch.device("cpu")).options, "_timeout", None)
    ranks = dist.get_process_group_ranks(group)
    # torch names a locally synchronized group after its ranks. Destroyed and made again it would find the old
    # one's addresses in the store and hang, so those of a subgroup live until destroy_process_group().
    whole_world = group.size() == dist.get_world_size()
    groups = [
        dist.new_group(ranks, timeout=timeout, backend=backend, use_local_synchronization=not whole_world)
        for _ in range(count)
    ]
    dist.barrier(group)  # a rank that fails right after this must not break a peer's connecting

    def close() -> None:
        if dist.is_initialized() and whole_world:
            for own in groups:
                dist.destroy_process_group(own)

    return [PeerChannel(own, metrics) for own in groups], close


def _cpu_backend(group: dist.ProcessGroup) -> str:
    config = dist.get_backend_config(group)  # "cpu:gloo,cuda:nccl"
    backend = next((e.removeprefix("cpu:") for e in config.split(",") if e.startswith("cpu:")), "nothing")
    if backend not in _BACKENDS:
        raise UnsupportedError(
            f"the process group moves CPU tensors by {backend!r}; gradq needs Gloo or MPI: "
            'dist.init_process_group("gloo") or "cpu:gloo,cuda:nccl", or gradq.backends.mpi.init()'
        )
    return backend
