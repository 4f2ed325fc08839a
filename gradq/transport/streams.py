"""CUDA tensors: collectives enqueued on a side stream, by the calling thread, to the end.

On NCCL nothing waits on the host: a stage is enqueued, `Pending.wait` makes the side stream wait for the
exchange, the next stage follows. `average` returns as soon as everything stands in the queue, and the future
is tied to the side stream: who waits for it makes their own stream wait. There is no thread, so nothing can
enter the queue in another order on another rank.

Over Gloo messages go through pinned host memory (`StagedChannel`). That has to wait, twice a stage, on the
calling thread: right, but not overlapped with the backward pass.

The same code runs on CPU tensors over Gloo, which is how it is tested. Neither way was run with CUDA tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from gradq import wire
from gradq.errors import ConfigError, PeerError, UnsupportedError, WireError
from gradq.metrics import Event, Metrics
from gradq.transport.channels import Links, PeerChannel, backend_of, registered
from gradq.transport.contract import Channel, Pending
from gradq.transport.executor import Failure

__all__ = ["StagedChannel", "StreamChannel", "StreamExecutor", "done", "open_stream_channels"]


def done(result: Tensor) -> Future[Tensor]:
    """A completed future of a tensor; on CUDA it stands for what the current stream has enqueued."""
    future: Future[Tensor] = Future(devices=[result.device]) if result.is_cuda else Future()
    future.set_result(result)
    return future


class StreamExecutor:
    """Drives collectives to the end on the calling thread; the counterpart of `Executor`.

    Args:
        device: device of the gradients.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = cast(Any, torch.cuda.Stream)(device) if device.type == "cuda" else None
        self._closed = False
        self.failed = Failure()

    @property
    def failure(self) -> BaseException | None:
        """What stopped the executor, None while it works."""
        return self.failed.error

    def submit(self, stages: Iterator[Pending], result: Tensor) -> Future[Tensor]:
        """Enqueue stages; the future holds result, or raises what a stage raised.

        Raises:
            ConfigError: the executor is closed.
        """
        if self._closed:
            raise ConfigError("this executor is closed")
        with self._side(), torch.no_grad():
            if self.failure is None:
                try:
                    for pending in stages:
                        pending.wait()
                except BaseException as error:  # carried to the training loop, whatever it is
                    self.failed.set(error)
            future = done(result)
        return future.then(self._outcome) if self.failure is not None else future

    def after(self, last: Future[Tensor], action: Callable[[], None]) -> Future[Tensor]:
        """See `Executor.after`; the action is enqueued behind the job."""

        def stages() -> Iterator[Pending]:
            action()
            yield from ()

        return last if self.failure is not None else self.submit(stages(), last.value())

    def close(self) -> None:
        """Wait for what is enqueued. Idempotent."""
        self._closed = True
        if self._stream is not None:
            self._stream.synchronize()

    def stop(self) -> None:
        """As `close`, but wait for nothing."""
        self._closed = True

    def _side(self) -> AbstractContextManager[object]:
        """The side stream, after everything that the current stream has been given."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return torch.cuda.stream(self._stream)

    def _outcome(self, future: Future[Tensor]) -> Tensor:
        """Raised here and not by set_exception, which DDP would mangle; see `Executor.submit`."""
        assert self.failure is not None
        raise self.failure


@dataclass
class _Works:
    """Exchanges under way on a stream."""

    works: Sequence[dist.Work]
    header: wire.Header
    metrics: Metrics
    posted: float = field(default_factory=time.perf_counter)

    def wait(self) -> None:
        """On NCCL the current stream waits, elsewhere the host.

        Raises:
            PeerError: the exchange failed; NCCL reports a lost peer through its watchdog instead.
        """
        header = self.header
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as error:
            raise PeerError(
                f"rank {header.sender}: an exchange failed in step {header.step}, bucket {header.bucket}, "
                f"phase {header.phase}: {error}"
            ) from error
        elapsed_ms = 1e3 * (time.perf_counter() - self.posted)
        self.metrics.record(Event("exchange_ms", elapsed_ms, header.step, header.bucket, header.phase))


class StreamChannel:
    """Grouped point-to-point messages on a process group of gradq's own.

    A header would have to be written and read by the host, every time. Messages of one communicator cannot
    overtake each other, so it is enough to compare layouts when one is new: once, by an all-gather of its
    digest. The headers stay empty.

    Args:
        group: a process group that nobody else uses.
        metrics: receiver of the exchange times; on NCCL, of the times to enqueue them.
        device: device of the messages.
    """

    def __init__(self, group: dist.ProcessGroup, metrics: Metrics, device: torch.device) -> None:
        self._group, self._metrics, self._device = group, metrics, device
        self._ranks = dist.get_process_group_ranks(group)
        self._agreed: set[tuple[int, int, int]] = set()

    def post(self, send: Sequence[Tensor], receive: Sequence[Tensor], header: wire.Header) -> _Works:
        """See `gradq.transport.contract.Channel.post`.

        Raises:
            WireError: the layout is new, and another rank has another.
            PeerError: a peer cannot be reached.
        """
        self._agree(header)
        peers = [(header.sender + i) % len(send) for i in range(1, len(send))]
        operations = [
            dist.P2POp(dist.irecv, receive[peer], self._ranks[peer], self._group)
            for peer in reversed(peers)
            if receive[peer].numel()
        ]
        operations += [
            dist.P2POp(dist.isend, send[peer], self._ranks[peer], self._group)
            for peer in peers
            if send[peer].numel()
        ]
        try:
            works = dist.batch_isend_irecv(operations) if operations else []
        except RuntimeError as error:
            raise PeerError(
                f"rank {header.sender}: cannot reach its peers in step {header.step}, bucket "
                f"{header.bucket}, phase {header.phase}: {error}"
            ) from error
        return _Works(works, header, self._metrics)

    def _agree(self, header: wire.Header) -> None:
        key = (header.bucket, header.phase, header.layout)
        if key in self._agreed:
            return
        ours = torch.tensor([header.step, *key], device=self._device)
        everyone = [torch.empty_like(ours) for _ in self._ranks]
        dist.all_gather(everyone, ours, group=self._group)
        for rank, theirs in enumerate(row.tolist() for row in everyone):
            names = ("step", "bucket", "phase", "layout digest")
            for name, got, want in zip(names, theirs, ours.tolist(), strict=True):
                if got != want:
                    raise WireError(
                        f"bucket {header.bucket}, phase {header.phase}, step {header.step}: the {name} of "
                        f"rank {rank} is {got}, that of rank {header.sender} is {want}; the ranks are out of "
                        "step"
                    )
        self._agreed.add(key)


@dataclass
class _Staged:
    """An exchange of host copies; what arrives is copied back.

    Attributes:
        arrived: pairs (message on the device, its host copy).
        used: the host buffers of this exchange, which go to `free` afterwards.
    """

    pending: Pending
    arrived: Sequence[tuple[Tensor, Tensor]]
    used: list[Tensor]
    free: list[Tensor]

    def wait(self) -> None:
        """Wait for the messages, check their headers, enqueue the copies back to the device."""
        self.pending.wait()
        for message, copy in self.arrived:
            message.copy_(copy, non_blocking=True)
        self.free += self.used


class StagedChannel:
    """A `PeerChannel` for CUDA tensors, through pinned host memory, which is kept.

    A buffer is free again once its exchange was waited for. The copies back from it may still be under way
    then, but `post` waits for the stream before anything is received again.

    Args:
        group: a Gloo group of gradq's own.
        metrics: receiver of the exchange times.
    """

    def __init__(self, group: dist.ProcessGroup, metrics: Metrics) -> None:
        self._channel = PeerChannel(Links(group), metrics)
        self._free: list[Tensor] = []

    def post(self, send: Sequence[Tensor], receive: Sequence[Tensor], header: wire.Header) -> _Staged:
        """See `gradq.transport.contract.Channel.post`."""
        used: list[Tensor] = []
        copies: dict[int, Tensor] = {}  # a message to several peers is copied once
        send_host = [torch.empty(0, dtype=torch.uint8) for _ in send]
        receive_host = list(send_host)
        arrived = []
        for peer in range(len(send)):
            if peer == header.sender:
                continue
            at = send[peer].data_ptr()
            if at not in copies:
                copies[at] = self._take(send[peer], used)
                copies[at].copy_(send[peer], non_blocking=True)
            send_host[peer] = copies[at]
            receive_host[peer] = self._take(receive[peer], used)
            arrived.append((receive[peer], receive_host[peer]))
        if send[header.sender].is_cuda:
            torch.cuda.current_stream(send[header.sender].device).synchronize()
        return _Staged(self._channel.post(send_host, receive_host, header), arrived, used, self._free)

    def _take(self, like: Tensor, used: list[Tensor]) -> Tensor:
        """The start of a host buffer, as long as a message; the buffer goes to used."""
        fits = [k for k, buffer in enumerate(self._free) if buffer.numel() >= like.numel()]
        if fits:
            buffer = self._free.pop(min(fits, key=lambda k: self._free[k].numel()))
        else:
            buffer = torch.empty(like.numel(), dtype=torch.uint8, pin_memory=like.is_cuda)
        used.append(buffer)
        return buffer[: like.numel()]


def open_stream_channels(
    group: dist.ProcessGroup, count: int, metrics: Metrics, timeout: timedelta | None, device: torch.device
) -> tuple[list[Channel], Callable[[BaseException | None], None]]:
    """As `connect.open_channels`, for tensors of a device. One process group serves all channels.

    Raises:
        UnsupportedError: the group moves the device's tensors by something else than NCCL or Gloo.
    """
    backend = backend_of(group, device.type)
    if backend not in ("nccl", "gloo"):
        raise UnsupportedError(
            f"the process group moves {device.type} tensors by {backend!r}; gradq needs NCCL or Gloo: "
            'dist.init_process_group("nccl") or "cpu:gloo,cuda:nccl"'
        )
    if timeout is None:
        timeout = getattr(group._get_backend(device).options, "_timeout", None)
    links = registered(group, timeout, backend)
    dist.barrier(group)  # see `channels.open_peer_channels`

    def close(error: BaseException | None = None) -> None:
        if error is None:  # else exchanges may be under way on the device; its watchdog tells the others
            links.close()

    own = links.group
    channel: Channel = (
        StreamChannel(own, metrics, device) if backend == "nccl" else StagedChannel(own, metrics)
    )
    return [channel] * count, close
