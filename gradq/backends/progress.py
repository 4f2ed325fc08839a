"""Progress: one thread that watches all nonblocking MPI operations of a process.

A blocking MPI call spins on a core until the slowest rank arrives, and cannot be told when to stop. So every
operation is posted nonblocking by the thread that asks for it, and this one polls: at once while something
moves, then at longer and longer intervals, up to half a millisecond. That leaves the cores to the training,
and an operation that is not done in time ends with an error instead of a hang. There is no queue: a receive
that waits for its sender holds nothing up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.futures import Future

from gradq.errors import PeerError

__all__ = ["Operation", "Progress"]

_EAGER_POLLS = 20
_SHORTEST_SLEEP_S = 20e-6
_LONGEST_SLEEP_S = 500e-6


@dataclass(eq=False)
class Operation:
    """MPI requests under way that end together.

    Attributes:
        requests: the requests that MPI gave.
        finish: a function that is called when all are done; it returns the tensors that were written.
        name: the name in error messages, such as "allreduce".
        timeout_s: the time until it fails, in seconds.
        fail: a function that is called with the error if it does.
        keep: the buffers that MPI reads and writes.
        statuses: one for each request, filled when all are done; None where nobody asks.
    """

    requests: list[Any]
    finish: Callable[[], list[Tensor]]
    name: str
    timeout_s: float
    fail: Callable[[PeerError], None]
    keep: list[Any]
    statuses: list[Any] | None = None
    done: Future[Any] = field(default_factory=Future)
    posted: float = field(default_factory=time.monotonic)


class Progress:
    """Watches operations until they end; its thread starts with the first.

    Args:
        test_all: the function `MPI.Request.Testall`.
    """

    def __init__(self, test_all: Callable[..., bool]) -> None:
        self._test_all = test_all
        self._changed = threading.Condition()
        self._posted: list[Operation] = []
        self._thread: threading.Thread | None = None
        self._closed = False
        self.stuck: list[Operation] = []

    def watch(self, operation: Operation) -> None:
        """Complete the operation's future when MPI is done."""
        with self._changed:
            self._posted.append(operation)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="gradq-mpi", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """End the thread; operations under way are left alone. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        active: list[Operation] = []
        polls, sleep_s = 0, 0.0
        while True:
            with self._changed:
                while not (self._posted or active or self._closed):
                    self._changed.wait()
                if self._closed:
                    return
                if self._posted:
                    active += self._posted
                    self._posted.clear()
                    polls = 0
            still = [operation for operation in active if not self._poll(operation)]
            polls = 0 if len(still) < len(active) else polls + 1
            active = still
            if active:
                longer_s = min(max(1.2 * sleep_s, _SHORTEST_SLEEP_S), _LONGEST_SLEEP_S)
                sleep_s = 0.0 if polls < _EAGER_POLLS else longer_s
                time.sleep(sleep_s)

    def _poll(self, operation: Operation) -> bool:
        """Whether the operation has ended."""
        outcome: list[Tensor] | BaseException
        try:
            if not self._test_all(operation.requests, operation.statuses):
                waited_s = time.monotonic() - operation.posted
                if waited_s < operation.timeout_s:
                    return False
                self.stuck.append(operation)  # MPI may still write into its buffers
                raise PeerError(
                    f"{operation.name} is not done after {waited_s:.1f} s: a peer stalled or died"
                )
            outcome = operation.finish()
        except PeerError as error:
            outcome = error
        except Exception as error:  # MPI's own
            outcome = PeerError(f"{operation.name} failed: {error}")
            outcome.__cause__ = error
        if isinstance(outcome, PeerError):
            operation.fail(outcome)
        operation.done.set_result(outcome)
        return True
