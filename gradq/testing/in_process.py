"""Ranks as threads of one process: GradientSync and all below it, over a `Network` instead of sockets.

A rank's group is a process group that torch's own functions take (object collectives, `all_reduce`,
`broadcast`, `barrier`); nothing is registered with torch, and `dist.init_process_group` is not needed. What
needs more of torch (DistributedDataParallel, FSDP2, checkpoints) runs in `run_ranks`.
"""

# torch declares most operations as several overloads; we have the one that torch itself calls.
# mypy: disable-error-code="override, no-untyped-call, call-arg, attr-defined"

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future
from torch.futures import Future

from gradq.errors import PeerError, UnsupportedError
from gradq.metrics import Metrics
from gradq.testing.network import Network
from gradq.testing.ranks import RankError
from gradq.transport.contract import Channel
from gradq.transport.handshake import reason

__all__ = ["InProcessGroup", "run_in_process"]


def run_in_process(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    network: Network | None = None,
    timeout: float = 60.0,
) -> list[Any]:
    """Run function(group, *args) in world_size threads of this process; `group.rank()` tells them apart.

    Args:
        function: a function that may construct a `GradientSync`, and anything below it, with the group.
        world_size: number of ranks.
        *args: further arguments; every rank gets the same objects.
        network: what carries the messages; a plain `Network` by default.
        timeout: limit for the whole run, in seconds; then the ranks that still run are given up.

    Returns:
        What each rank returned, by rank.

    Raises:
        RankError: a rank raised (the first of them is the cause), or the time was up.
    """
    network = network or Network(world_size, timeout=timeout)
    hall = _Hall(world_size, timeout)
    results: list[Any] = [None] * world_size
    failures: list[tuple[int, BaseException]] = []

    def rank_main(rank: int) -> None:
        try:
            results[rank] = function(InProcessGroup(hall, network, rank), *args)
        except BaseException as error:  # carried to the caller, whatever it is
            failures.append((rank, error))
            hall.leave(rank, error)
            network.leave(rank, range(hall.num_channels), error)
        else:
            hall.leave(rank)

    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    threads = [
        threading.Thread(target=rank_main, args=(rank,), name=f"gradq-rank-{rank}", daemon=True)
        for rank in range(world_size)
    ]
    deadline = time.monotonic() + timeout
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
    finally:
        torch.set_num_threads(threads_before)
    if failures:
        rank, error = failures[0]
        text = "".join(traceback.format_exception(error))
        raise RankError(f"rank {rank}:\n{text}") from error
    late = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    if late:
        raise RankError(f"ranks {late} did not finish within {timeout:g} s")
    return results


class _Hall:
    """Where the ranks of one run meet for a collective operation."""

    def __init__(self, world_size: int, timeout: float) -> None:
        self.world_size, self.num_channels = world_size, 0
        self._timeout = timeout
        self._changed = threading.Condition()
        self._meetings: dict[int, dict[int, tuple[str, Any]]] = {}
        self._gone: dict[int, str] = {}

    def meet(self, rank: int, number: int, what: str, value: Any) -> list[Any]:
        """All ranks' values, by rank, of the number-th operation.

        Raises:
            PeerError: a rank is gone, is in another operation, or does not come in time.
        """
        deadline = time.monotonic() + self._timeout
        with self._changed:
            here = self._meetings.setdefault(number, {})
            here[rank] = (what, value)
            self._changed.notify_all()
            while len(here) < self.world_size:
                for peer, why in self._gone.items():
                    if peer not in here:
                        raise PeerError(f"rank {rank}: {what} without rank {peer}, which {why}")
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    absent = [peer for peer in range(self.world_size) if peer not in here]
                    raise PeerError(f"rank {rank}: {what} without ranks {absent} after {self._timeout:g} s")
        for peer, (theirs, _) in sorted(here.items()):
            if theirs != what:
                raise PeerError(f"rank {rank} is in {what}, and rank {peer} in {theirs}")
        return [here[peer][1] for peer in range(self.world_size)]

    def leave(self, rank: int, error: BaseException | None = None) -> None:
        """Note that a rank comes to no more operations."""
        with self._changed:
            self._gone[rank] = "has returned" if error is None else f"gave up: {reason(error)}"
            self._changed.notify_all()

    def take_channels(self, first: int, count: int) -> None:
        """Note that channels up to this one are in use."""
        with self._changed:
            self.num_channels = max(self.num_channels, first + count)


class InProcessGroup(dist.ProcessGroup):
    """The process group of one rank; made by `run_in_process`."""

    def __init__(self, hall: _Hall, network: Network, rank: int) -> None:
        super().__init__(rank, hall.world_size)
        self._hall, self._network, self._me = hall, network, rank
        self._operations = self._num_channels = 0

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        """What torch calls it."""
        return "in-process"

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def open_channels(
        self, count: int, metrics: Metrics, timeout: timedelta | None
    ) -> tuple[Sequence[Channel], Callable[[BaseException | None], None]]:
        """See `gradq.transport.connect.open_channels`, which calls it. The network has the timeout."""
        first, self._num_channels = self._num_channels, self._num_channels + count
        self._hall.take_channels(first, count)
        indices = range(first, first + count)

        def close(error: BaseException | None = None) -> None:
            self._network.leave(self._me, indices, error)

        return [self._network.channel(self._me, index, metrics) for index in indices], close

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        """Give every rank all ranks' tensors."""
        for out, value in zip(outputs[0], self._meet("allgather", inputs[0].clone()), strict=True):
            out.copy_(value)
        return _done(outputs[0])

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        """Sum tensors over the ranks, in rank order, in place."""
        if opts is not None and opts.reduceOp != dist.ReduceOp.SUM:
            raise UnsupportedError(f"ranks in one process only sum, they do not reduce by {opts.reduceOp}")
        everyone = self._meet("allreduce", [tensor.clone() for tensor in tensors])
        for number, tensor in enumerate(tensors):
            tensor.copy_(everyone[0][number])
            for theirs in everyone[1:]:
                tensor.add_(theirs[number])
        return _done(tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        """Copy the root's tensors to all."""
        everyone = self._meet("broadcast", [tensor.clone() for tensor in tensors])
        for tensor, value in zip(tensors, everyone[opts.rootRank], strict=True):
            tensor.copy_(value)
        return _done(tensors)

    def barrier(self, opts: Any = None) -> dist.Work:
        """Return when all ranks are here."""
        self._meet("barrier", None)
        return _done([])

    def _meet(self, what: str, value: Any) -> list[Any]:
        self._operations += 1
        return self._hall.meet(self._me, self._operations - 1, what, value)


def _done(tensors: list[Tensor]) -> dist.Work:
    future: Future[list[Tensor]] = Future()
    future.set_result(tensors)
    work: dist.Work = _create_work_from_future(future)
    return work
