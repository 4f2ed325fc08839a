"""The ordered worker: drives collectives through their stages, one FIFO thread a stage.

Stage k of every job runs on thread k, in the order the jobs were submitted. So a channel (one stage's own)
sees the same order of exchanges on all ranks, whatever the timing, and phase 2 of one bucket overlaps phase 1
of the next and the backward pass. The executor knows neither codecs nor transports.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.futures import Future

from gradq.errors import ConfigError, UnsupportedError
from gradq.transport.contract import Pending

__all__ = ["Executor", "Failure", "end"]

_PATIENCE_S = 1.0  # how long `stop` waits for a thread


class Failure:
    """The first thing that went wrong, for good; safe between threads.

    Attributes:
        tell: a function that is called once with the error, from the thread that met it, so that the other
            ranks hear of it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self.tell: Callable[[BaseException], None] = lambda error: None

    @property
    def error(self) -> BaseException | None:
        """What went wrong first, None if nothing did."""
        return self._error

    def set(self, error: BaseException) -> BaseException:
        """Note an error; returns the first one."""
        with self._lock:
            before = self._error
            if before is None:
                self._error = error
        if before is not None:
            return before
        self.tell(error)
        return error


@dataclass
class _Job:
    stages: Iterator[Pending]
    done: Future[Tensor | BaseException]
    result: Tensor
    pending: Pending | None = None


class Executor:
    """Runs submitted collectives in order.

    After a failure every job under way and every later one fails with the same cause: the ranks are no longer
    in step, and only a new process group can mend that.
    """

    def __init__(self, name: str = "gradq") -> None:
        self._name = name
        self._stages: list[queue.SimpleQueue[_Job | None]] = []
        self._threads: list[threading.Thread] = []
        self.failed = Failure()
        self._closed = False

    @property
    def failure(self) -> BaseException | None:
        """What stopped the executor, None while it works."""
        return self.failed.error

    def submit(self, stages: Iterator[Pending], result: Tensor) -> Future[Tensor]:
        """Run stages to the end; the future then holds result, or raises what a stage raised.

        The cause is raised from a callback of the future: `Future.set_exception` would mangle it on its way
        through DDP.

        Raises:
            ConfigError: the executor is closed.
            UnsupportedError: the result is not in this machine's memory: threads know nothing of streams.
        """
        if self._closed:
            raise ConfigError("this executor is closed")
        if not result.is_cpu:
            raise UnsupportedError(
                f"a gradient on {result.device} came to a GradientSync made for CPU tensors; give it device="
            )
        done: Future[Tensor | BaseException] = Future()
        self._stage(0).put(_Job(stages, done, result))
        return done.then(_value)

    def after(self, last: Future[Tensor], action: Callable[[], None]) -> Future[Tensor]:
        """Run an action as soon as a job is done, on the thread that ends it.

        Args:
            last: what `submit` returned for the job.
            action: the action.

        Returns:
            A future of the job's result, done after the action.
        """

        def then(done: Future[Tensor]) -> Tensor:
            if self.failure is not None:
                raise self.failure
            try:
                action()
            except BaseException as error:  # carried to the training loop, whatever it is
                raise self.failed.set(error) from None
            return done.value()

        return last.then(then)

    def close(self) -> None:
        """Finish what is queued and end the threads. Idempotent."""
        self._end(None)

    def stop(self) -> None:
        """As `close`, but do not wait for a thread that waits for a peer: it ends when that does."""
        self._end(_PATIENCE_S)

    def _end(self, patience_s: float | None) -> None:
        self._closed = True
        if self._stages:
            self._stages[0].put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():  # the garbage collector runs on any thread
                thread.join(patience_s)
        self._threads.clear()

    def _stage(self, index: int) -> queue.SimpleQueue[_Job | None]:
        """The queue of a stage; its thread starts with the first job."""
        if index == len(self._stages):
            self._stages.append(queue.SimpleQueue())
            thread = threading.Thread(
                target=self._run, args=(index,), name=f"{self._name}-stage-{index}", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        return self._stages[index]

    def _run(self, index: int) -> None:
        inbox = self._stages[index]
        with torch.no_grad():  # grad mode is thread-local
            while True:
                job = inbox.get()
                if job is None:
                    break
                self._advance(job, index)
                del job  # while this waits for the next job, it must not keep the last one alive
        if index + 1 < len(self._stages):
            self._stages[index + 1].put(None)

    def _advance(self, job: _Job, index: int) -> None:
        """One stage of one job: wait, compute, and hand over or finish."""
        try:
            if self.failure is not None:
                raise self.failure
            if job.pending is not None:
                job.pending.wait()
            job.pending = next(job.stages, None)
        except BaseException as error:  # carried to the training loop, whatever it is
            job.done.set_result(self.failed.set(error))
            return
        if job.pending is None:
            job.done.set_result(job.result)
        else:
            self._stage(index + 1).put(job)


def end(
    process: int, stop: Callable[[], None], close_channels: Callable[[BaseException | None], None]
) -> None:
    """Give back the threads and connections, which only one process has: a forked child leaves them alone."""
    if os.getpid() == process:
        stop()
        close_channels(None)


def _value(done: Future[Tensor | BaseException]) -> Tensor:
    outcome = done.value()
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
