"""A network between ranks of one process: messages lie in mailboxes and are delivered one at a time.

A message is copied when it is delivered and not when it is posted, as late as the order allows, so a
collective that touches its buffers before the exchange is over gives wrong results here. The order is that
of posting, or drawn from a seed. Messages can be lost or come late.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gradq import wire
from gradq.errors import PeerError, WireError
from gradq.metrics import Event, Metrics
from gradq.transport.contract import Channel, Pending
from gradq.transport.handshake import reason

__all__ = ["Exchange", "Network", "Route"]

_DROP, _LATE = "drop", "late"


class Route(NamedTuple):
    """The way of one message; number counts the exchanges of its channel, from 0."""

    channel: int
    number: int
    sender: int
    receiver: int

    def peer(self, rank: int) -> int:
        """The rank at the other end."""
        return self.sender if self.receiver == rank else self.receiver


class _NotYetError(Exception):
    """An exchange is not over; only in `Network.drive`, which sees to the others meanwhile."""


@dataclass
class Exchange:
    """The messages that one rank has posted at once: a `Pending`.

    Attributes:
        network: what delivers them.
        header: header of this rank.
        send: the message to every rank.
        receive: the buffer for the message of every rank.
        metrics: receiver of the time.
        open: the routes of messages that have not been delivered.
        error: why this exchange cannot end well.
    """

    network: Network
    header: wire.Header
    send: Sequence[Tensor]
    receive: Sequence[Tensor]
    metrics: Metrics
    open: set[Route] = field(default_factory=set)
    error: Exception | None = None
    posted: float = field(default_factory=time.perf_counter)
    _checked: bool = False

    def wait(self) -> None:
        """Return when everything has arrived, and been taken.

        Raises:
            PeerError: a message was lost, a peer is gone, or the time is up.
            WireError: a message is not the one expected.
        """
        self.network.finish(self)
        if self._checked:
            return
        for peer, message in enumerate(self.receive):
            if peer != self.header.sender and message.numel():
                replace(self.header, sender=peer).check(message[: wire.HEADER_BYTES].numpy().tobytes())
        self._checked = True
        elapsed_ms, header = 1e3 * (time.perf_counter() - self.posted), self.header
        self.metrics.record(Event("exchange_ms", elapsed_ms, header.step, header.bucket, header.phase))

    def fail(self, route: Route, why: str) -> None:
        """Note that this exchange can never end: one of its messages is lost, or was not sent."""
        own = self.header.sender
        verb = "receiving from" if route.receiver == own else "sending to"
        self.error = self.error or PeerError(
            f"rank {own}: {verb} rank {route.peer(own)} failed in step {self.header.step}, bucket "
            f"{self.header.bucket}, phase {self.header.phase}: {why}"
        )


class Network:
    """Carries the messages of all ranks.

    Args:
        world_size: number of ranks.
        shuffle: a seed, to deliver messages and to advance ranks in an order drawn from it; None for the
            order in which they come.
        fault: a function that is called with the route of a message that is about to be delivered. What it
            returns decides: "drop" loses the message, "late" delivers the one before it on the same route in
            its place (nothing, if it is the first), and None delivers it.
        timeout: limit for one exchange in `finish`, in seconds; `drive` knows at once that a message will
            never come.
    """

    def __init__(
        self,
        world_size: int,
        *,
        shuffle: int | None = None,
        fault: Callable[[Route], str | None] | None = None,
        timeout: float = 60.0,
    ) -> None:
        self.world_size, self.timeout = world_size, timeout
        self._draw = None if shuffle is None else random.Random(shuffle)
        self._fault = fault
        self._changed = threading.Condition()
        self._half: dict[Route, Exchange] = {}  # one of the two ranks has posted
        self._ready: list[tuple[Route, Exchange, Exchange]] = []  # both have: sender's, receiver's
        self._before: dict[tuple[int, int, int], Tensor] = {}  # the last message by channel, sender, receiver
        self._gone: dict[tuple[int, int], str] = {}  # by channel and rank: why
        self._driven = False
        self._num_channels = 0

    def channels(self, count: int) -> list[list[Channel]]:
        """New channels, by rank, `count` for each."""
        first, self._num_channels = self._num_channels, self._num_channels + count
        indices = range(first, first + count)
        return [[self.channel(rank, k, Metrics()) for k in indices] for rank in range(self.world_size)]

    def channel(self, rank: int, index: int, metrics: Metrics) -> Channel:
        """One rank's end of a channel."""
        return _MailChannel(self, rank, index, metrics)

    def drive(self, jobs: Sequence[Iterator[Pending]]) -> None:
        """Run one job a rank to its end, on this thread: the stages of a collective, or of several.

        Raises:
            PeerError: every job waits for messages that nobody sends, or a message was lost.
            WireError: a message is not the one expected.
        """
        waiting: dict[int, Pending] = {}
        running = list(range(len(jobs)))
        self._driven = True
        try:
            with torch.no_grad():
                while running:
                    if self._advance(jobs, running, waiting):
                        continue
                    with self._changed:
                        if not self._deliver():
                            raise PeerError(f"nobody sends what these wait for: {self._missing()}")
        finally:
            self._driven = False

    def _advance(
        self, jobs: Sequence[Iterator[Pending]], running: list[int], waiting: dict[int, Pending]
    ) -> bool:
        """Run a stage of one job that can; whether there was one."""
        order = list(running)
        if self._draw is not None:
            self._draw.shuffle(order)
        for rank in order:
            try:
                if rank in waiting:
                    waiting[rank].wait()
            except _NotYetError:
                continue
            waiting.pop(rank, None)
            pending = next(jobs[rank], None)
            if pending is None:
                running.remove(rank)
            else:
                waiting[rank] = pending
            return True
        return False

    def _missing(self) -> str:
        return "; ".join(
            f"rank {exchange.header.sender} on channel {route.channel}, exchange {route.number}, for rank "
            f"{route.peer(exchange.header.sender)}"
            for route, exchange in self._half.items()
        )

    # --- what channels call -----------------------------------------------------------------------------

    def post(self, exchange: Exchange, channel: int, number: int) -> Exchange:
        """Take one rank's messages of an exchange."""
        own = exchange.header.sender
        packed = torch.frombuffer(bytearray(exchange.header.pack()), dtype=torch.uint8)
        for peer, message in enumerate(exchange.send):
            if peer != own and message.numel():
                message[: wire.HEADER_BYTES] = packed
        with self._changed:
            for peer in range(self.world_size):
                if peer == own:
                    continue
                for route, message in (
                    (Route(channel, number, own, peer), exchange.send[peer]),
                    (Route(channel, number, peer, own), exchange.receive[peer]),
                ):
                    if message.numel():
                        exchange.open.add(route)
                    self._match(route, exchange)
            self._changed.notify_all()
        return exchange

    def _match(self, route: Route, exchange: Exchange) -> None:
        """Put the two halves of a message together."""
        other = self._half.pop(route, None)
        if other is None:
            self._half[route] = exchange
            where = (route.channel, route.peer(exchange.header.sender))
            if where in self._gone and route in exchange.open:
                exchange.fail(route, self._gone[where])
            return
        sends = route.sender == exchange.header.sender
        sender, receiver = (exchange, other) if sends else (other, exchange)
        sent, taken = sender.send[route.receiver].numel(), receiver.receive[route.sender].numel()
        if sent != taken:
            text = (
                f"rank {route.sender} sends {sent} bytes to rank {route.receiver}, which expects {taken} "
                f"(step {receiver.header.step}, bucket {receiver.header.bucket}, "
                f"phase {receiver.header.phase})"
            )
            sender.error, receiver.error = WireError(text), WireError(text)
        elif sent:
            self._ready.append((route, sender, receiver))

    def _deliver(self) -> bool:
        """Deliver one message; whether there was one."""
        if not self._ready:
            return False
        chosen = 0 if self._draw is None else self._draw.randrange(len(self._ready))
        route, sender, receiver = self._ready.pop(chosen)
        message, buffer = sender.send[route.receiver], receiver.receive[route.sender]
        fault = self._fault(route) if self._fault is not None else None
        key = (route.channel, route.sender, route.receiver)
        before = self._before.get(key)
        if self._fault is not None:
            self._before[key] = message.clone()
        sender.open.discard(route)
        if fault == _DROP:
            receiver.fail(route, "the message was lost")
        else:
            arrives = message if fault != _LATE else before
            if arrives is not None and arrives.numel() == buffer.numel():
                buffer.copy_(arrives)
            receiver.open.discard(route)
        self._changed.notify_all()
        return True

    def finish(self, exchange: Exchange) -> None:
        """Return when an exchange is over; deliver messages, anybody's, until it is.

        Raises:
            PeerError, WireError: it cannot end, or the time is up.
        """
        deadline = time.monotonic() + self.timeout
        with self._changed:
            while exchange.error is None and exchange.open:
                if self._driven:
                    raise _NotYetError
                if self._deliver():
                    continue
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    exchange.fail(min(exchange.open), f"the time is up ({self.timeout:g} s)")
            if exchange.error is not None:
                raise exchange.error

    def leave(self, rank: int, channels: Sequence[int], error: BaseException | None = None) -> None:
        """Close a rank's ends of some channels: peers that wait for a message from it get an error."""
        why = "its connections are closed" if error is None else f"rank {rank} gave up: {reason(error)}"
        with self._changed:
            for channel in channels:
                self._gone.setdefault((channel, rank), why)
            for route, exchange in self._half.items():
                is_from = route.peer(exchange.header.sender) == rank and route.channel in channels
                if is_from and route in exchange.open:
                    exchange.fail(route, why)
            self._changed.notify_all()


class _MailChannel:
    """One rank's end of a channel."""

    def __init__(self, network: Network, rank: int, index: int, metrics: Metrics) -> None:
        self._network, self._rank, self._index, self._metrics = network, rank, index, metrics
        self._number = 0

    def post(self, send: Sequence[Tensor], receive: Sequence[Tensor], header: wire.Header) -> Exchange:
        """See `gradq.transport.contract.Channel.post`."""
        assert header.sender == self._rank, f"rank {header.sender} posts on a channel of rank {self._rank}"
        exchange = Exchange(self._network, header, list(send), list(receive), self._metrics)
        self._number += 1
        return self._network.post(exchange, self._index, self._number - 1)
