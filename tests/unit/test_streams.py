"""The thread-free executor: results, failures and an end, on CPU tensors."""

from __future__ import annotations

import threading

import pytest
import torch

from gradq.errors import ConfigError, UnsupportedError
from gradq.sync.feedback import Feedback
from gradq.sync.finite import StepCheck
from gradq.transport.connect import executor_on
from gradq.transport.executor import Executor
from gradq.transport.streams import StreamExecutor, done

CPU = torch.device("cpu")


class Ready:
    def __init__(self, seen=None, error=None):
        self.seen, self.error = seen, error

    def wait(self):
        if self.error is not None:
            raise self.error
        if self.seen is not None:
            self.seen.append(threading.get_ident())


def test_everything_runs_on_the_calling_thread_before_submit_returns():
    executor, seen, result = StreamExecutor(CPU), [], torch.ones(2, requires_grad=True)

    def steps():
        yield Ready(seen)
        result.mul_(3)  # grad mode is off
        yield Ready(seen)
        seen.append("end")

    future = executor.submit(steps(), result)
    assert seen == [threading.get_ident()] * 2 + ["end"]
    assert future.done()
    assert future.wait() is result
    assert result.tolist() == [3.0, 3.0]
    executor.close()
    with pytest.raises(ConfigError, match="closed"):
        executor.submit(steps(), result)


def test_after_a_failure_every_future_raises_its_cause():
    executor, cause, later = StreamExecutor(CPU), RuntimeError("the link broke"), []

    def failing():
        yield Ready(error=cause)

    def never():
        later.append(1)
        yield Ready()

    for steps in (failing(), never()):
        with pytest.raises(RuntimeError, match="the link broke"):
            executor.submit(steps, torch.zeros(1)).wait()
    assert executor.failure is cause
    assert not later


def test_the_device_chooses_the_executor():
    executor = executor_on(CPU)
    assert isinstance(executor, Executor)
    with pytest.raises(UnsupportedError, match="a gradient on meta"):
        executor.submit(iter(()), torch.zeros(1, device="meta"))
    executor.close()
    assert done(torch.ones(1)).wait().item() == 1.0


def test_residuals_of_a_step_that_only_the_device_knows_to_be_bad_are_taken_back():
    for finite in (True, False):
        feedback = Feedback()
        feedback.local.replace("a", torch.full((4,), 2.0))
        with feedback.local.update("a", 4, 0, 4) as (old, new):
            new.copy_(old + 1)
        feedback.finish(torch.tensor(finite))
        assert feedback.local.current("a").tolist() == [3.0 if finite else 2.0] * 4
        with feedback.local.update("a", 4, 2, 4) as (old, _):
            assert old.tolist() == [3.0 if finite else 2.0] * 2


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.gpu
def test_the_verdict_stays_on_the_device():
    flags = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        good, bad = torch.ones(9, device="cuda"), torch.full((2,), torch.inf, device="cuda")
        for pair in ((a, b) for a in (good, bad) for b in (good, bad)):
            check = StepCheck(good.device)
            check.begin()
            for part in pair:
                check.add(part, torch.float32)
            flags.append(check.verdict(1.0, 0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [bool(flag) for flag in flags] == [True, False, False, False]
