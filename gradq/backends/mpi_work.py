"""What torch waits for: an operation under way, and several as one."""

# torch declares most operations as several overloads; we have the one that torch itself calls.
# mypy: disable-error-code="override, assignment, no-untyped-call"

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from gradq.errors import PeerError

__all__ = ["MPIWork", "all_values"]


class MPIWork(dist.Work):
    """An operation under way; unlike the work that torch makes of a future, it raises when it failed.

    Args:
        done: the future of the tensors that are written, or of the error.
        status: MPI's status of a receive from any rank.

    Attributes:
        done: the argument.
    """

    def __init__(self, done: Future[Any], status: Any = None) -> None:
        super().__init__()
        self.done, self._status = done, status
        self._future = done.then(_value)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Return when it is done.

        Raises:
            PeerError: it failed, or is not done after the timeout (0: the group's own).
        """
        deadline = time.monotonic() + timeout.total_seconds()
        while timeout > timedelta(0) and not self.done.done():
            if time.monotonic() > deadline:
                raise PeerError(f"an MPI operation is not done after {timeout.total_seconds():g} s")
            time.sleep(1e-3)
        self.done.wait()
        _value(self.done)
        return True

    synchronize = wait

    def is_completed(self) -> bool:
        """Whether it is done."""
        return self.done.done()

    def is_success(self) -> bool:
        """Whether it is done without an error."""
        return self.done.done() and not isinstance(self.done.value(), BaseException)

    def exception(self) -> BaseException | None:
        """The error, if it has failed."""
        outcome = self.done.value() if self.done.done() else None
        return outcome if isinstance(outcome, BaseException) else None

    def result(self) -> list[Tensor]:
        """The tensors that were written."""
        return _value(self.done)

    def get_future(self) -> Future[list[Tensor]]:
        """The future that DDP waits for: the tensors, or the error, which it raises."""
        return self._future

    def _source_rank(self) -> int:
        return int(self._status.Get_source())


def _value(done: Future[Any]) -> list[Tensor]:
    outcome = done.value()
    if isinstance(outcome, BaseException):
        raise outcome
    return list(outcome)


def all_values(done: Future[list[Future[Any]]]) -> list[Tensor] | BaseException:
    """The tensors of several futures, or the first error."""
    outcomes = [future.value() for future in done.value()]
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    return errors[0] if errors else [tensor for outcome in outcomes for tensor in outcome]
