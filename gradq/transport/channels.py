"""Channels: how messages reach the peers. Here: point to point over a torch process group.

Every receive is posted before any send: on Gloo that gives the ideal time on every run, where its own
all-to-all takes one to two times as long, and it needs neither equal sizes nor padding.

On Gloo all channels share one process group, and tags keep their messages apart. It is made outside torch's
registry, over a prefix of the store that nobody used before: so it goes when it is closed, may be made again
over the same ranks, and `destroy_process_group()` does not concern it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from gradq import wire
from gradq.errors import PeerError, UnsupportedError
from gradq.metrics import Event, Metrics
from gradq.transport.contract import Channel
from gradq.transport.handshake import gather, meeting, reason

__all__ = ["Links", "PeerChannel", "backend_of", "open_peer_channels", "registered"]

_BACKENDS = ("gloo", "mpi4py")  # what can post a receive before the send, and tell messages apart by tags
_TAGS = 1 << 15  # MPI allows at least as many
_FAILURE = "failure"  # the store's key for why a rank gave up
_STORE_S = 2.0


class Links:
    """A process group of gradq's own, until it is closed.

    Args:
        group: a process group with `send` and `recv` that nobody else uses.
        store: the store in which ranks leave word why they give up; None if there is none.
        destroy: a function that is called on closing.
    """

    def __init__(
        self, group: Any, store: Store | None = None, destroy: Callable[[], None] = lambda: None
    ) -> None:
        self.group: Any = group
        self._store, self._destroy = store, destroy
        self._channels: list[PeerChannel] = []

    def serve(self, channel: PeerChannel) -> None:
        """Close a channel too when this closes."""
        self._channels.append(channel)

    def close(self) -> None:
        """Let the group go; its connections close with the last exchange under way. Idempotent."""
        if self.group is not None:
            self.group = None
            for channel in self._channels:
                channel.close()
            _open.discard(self)
            self._destroy()

    def give_up(self, rank: int, error: BaseException) -> None:
        """Leave word for the peers, and close: they then fail at once and not at the timeout."""
        store, text = self._store, f"rank {rank} gave up: {reason(error)}"
        if store is not None and not isinstance(error, PeerError):
            _within(_STORE_S, lambda: store.set(_FAILURE, text))
        self.close()

    def word(self) -> str:
        """Why a peer gave up, if it left word; else nothing."""
        store, found = self._store, list[str]()

        def look(store: Store) -> None:
            if store.check([_FAILURE]):
                found.append(store.get(_FAILURE).decode(errors="replace"))

        if store is not None:
            _within(_STORE_S, lambda: look(store))
        return "".join(found)


def _within(seconds: float, action: Callable[[], object]) -> None:
    """Try an action that may fail or never return, because the store's host may be gone or stopped."""

    def attempt() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=attempt, name="gradq-store", daemon=True)
    thread.start()
    thread.join(seconds)


_open: set[Links] = set()  # the only owner of their groups


def _leave_to_parent() -> None:
    """In a forked child: the threads of these groups stay behind, so nothing may ever wait for them."""
    for links in _open:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(links.group))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


@dataclass
class _Exchange:
    """Receives and sends under way: verb, peer and torch's work of each."""

    works: list[tuple[str, int, dist.Work]]
    receive: Sequence[Tensor]
    header: wire.Header
    metrics: Metrics
    links: Links
    posted: float = field(default_factory=time.perf_counter)

    def wait(self) -> None:
        """Wait for all, check every header.

        Raises:
            PeerError: a peer gave up, died, stalled past the group's timeout, or the link broke.
            WireError: a message is not the one expected.
        """
        header = self.header
        while self.works:
            verb, peer, work = self.works.pop(0)
            try:
                work.wait()
            except RuntimeError as error:
                del work
                self.works.clear()  # they keep the connections open
                raise PeerError(
                    f"rank {header.sender}: {verb} rank {peer} failed in step {header.step}, bucket "
                    f"{header.bucket}, phase {header.phase}: {self.links.word() or _backend_words(error)}"
                ) from error
        elapsed_ms = 1e3 * (time.perf_counter() - self.posted)
        self.metrics.record(Event("exchange_ms", elapsed_ms, header.step, header.bucket, header.phase))
        for peer, message in enumerate(self.receive):
            if peer != header.sender and message.numel():
                received = message[: wire.HEADER_BYTES].numpy().tobytes()
                replace(header, sender=peer).check(received)


def _backend_words(error: RuntimeError) -> str:
    """The backend's message, with the likely causes of a timeout."""
    if "timed out" not in str(error).lower():
        return str(error)
    return (
        "it did not answer within the timeout. It may be slow, stopped, or elsewhere: a step that only some "
        f"ranks make, or a call such as set_spec or gathered_state_dict on some ranks only. {error}"
    )


class PeerChannel:
    """The messages of one stage.

    Args:
        links: a process group of gradq's own.
        metrics: receiver of the exchange times.
        index: number of this channel among those that share the group.
        count: how many channels share the group.
    """

    def __init__(self, links: Links, metrics: Metrics, index: int = 0, count: int = 1) -> None:
        self._links, self._group = links, links.group
        self._metrics = metrics
        self._next, self._stride = index, count
        links.serve(self)

    def close(self) -> None:
        """Let the group go."""
        self._group = None

    def post(self, send: Sequence[Tensor], receive: Sequence[Tensor], header: wire.Header) -> _Exchange:
        """See `gradq.transport.contract.Channel.post`."""
        packed = torch.frombuffer(bytearray(header.pack()), dtype=torch.uint8)
        peers = [(header.sender + i) % len(send) for i in range(1, len(send))]
        works: list[tuple[str, int, dist.Work]] = []
        tag = self._next % _TAGS  # its own, so a message can only meet the receive meant for it
        self._next += self._stride
        group = self._group
        if group is None:
            raise PeerError(f"rank {header.sender}: its connections are closed")
        try:
            for peer in reversed(peers):
                if receive[peer].numel():
                    works.append(("receiving from", peer, group.recv([receive[peer]], peer, tag)))
            for peer in peers:
                if send[peer].numel():
                    send[peer][: wire.HEADER_BYTES] = packed
                    works.append(("sending to", peer, group.send([send[peer]], peer, tag)))
        except RuntimeError as error:
            raise PeerError(
                f"rank {header.sender}: cannot reach rank {peer} in step {header.step}, "
                f"bucket {header.bucket}, phase {header.phase}: {self._links.word() or error}"
            ) from error
        return _Exchange(works, receive, header, self._metrics, self._links)


def open_peer_channels(
    group: dist.ProcessGroup, count: int, metrics: Metrics, timeout: timedelta | None
) -> tuple[Sequence[Channel], Callable[[BaseException | None], None]]:
    """As `connect.open_channels`, for messages in this machine's memory.

    Raises:
        UnsupportedError: the group does not move CPU tensors over Gloo or MPI.
    """
    with meeting(group):
        backend = backend_of(group, "cpu")
        if backend not in _BACKENDS:
            raise UnsupportedError(
                f"the process group moves CPU tensors by {backend!r}; gradq needs Gloo or MPI: "
                'dist.init_process_group("gloo") or "cpu:gloo,cuda:nccl", or gradq.backends.mpi.init()'
            )
        if timeout is None:
            timeout = getattr(group._get_backend(torch.device("cpu")).options, "_timeout", None)
    if backend == "gloo":
        links = [_gloo(group, timeout)]
        channels = [PeerChannel(links[0], metrics, index, count) for index in range(count)]
    else:
        links = [registered(group, timeout, backend) for _ in range(count)]
        channels = [PeerChannel(each, metrics) for each in links]
    dist.barrier(group)  # a rank that fails right after this must not break a peer's connecting
    _open.update(links)
    rank = group.rank()

    def close(error: BaseException | None = None) -> None:
        for each in links:
            each.close() if error is None else each.give_up(rank, error)

    return channels, close


def _gloo(group: dist.ProcessGroup, timeout: timedelta | None) -> Links:
    """A Gloo group of its own, over the network device of the group given."""
    from torch.distributed.distributed_c10d import _get_process_group_store

    name = gather(uuid.uuid4().hex, group)[0]
    store = PrefixStore(f"gradq/{name}", _get_process_group_store(group))
    theirs = group._get_backend(torch.device("cpu")).options
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = getattr(theirs, "_devices", None) or [dist.ProcessGroupGloo.create_default_device()]
    options._threads = 1  # point-to-point messages use none
    if timeout is not None:
        options._timeout = timeout
    return Links(dist.ProcessGroupGloo(store, group.rank(), group.size(), options), store)


def registered(group: dist.ProcessGroup, timeout: timedelta | None, backend: str) -> Links:
    """A process group of gradq's own of a backend that torch must make.

    torch names a locally synchronized group after its ranks. Destroyed and made again it would find the old
    one's addresses in the store and hang, so those of a subgroup live until destroy_process_group().
    """
    whole_world = group.size() == dist.get_world_size()
    own = dist.new_group(
        dist.get_process_group_ranks(group),
        timeout=timeout,
        backend=backend,
        use_local_synchronization=not whole_world,
    )

    def destroy() -> None:
        if whole_world and dist.is_initialized():
            dist.destroy_process_group(own)

    return Links(own, None, destroy)


def backend_of(group: dist.ProcessGroup, kind: str) -> str:
    """The backend that moves a kind of device's tensors; "nothing" if there is none."""
    config = dist.get_backend_config(group)  # "cpu:gloo,cuda:nccl"
    return dict(entry.split(":", 1) for entry in config.split(",") if ":" in entry).get(kind, "nothing")
