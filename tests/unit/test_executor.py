"""The ordered worker: order, overlap, failures and an end."""

from __future__ import annotations

import random
import threading
import time
import weakref

import pytest
import torch

from gradq.transport.executor import Executor


class Ready:
    """An exchange that has already arrived, or takes a while, or waits for an event, or fails."""

    def __init__(self, delay=0.0, event=None, error=None):
        self.delay, self.event, self.error = delay, event, error

    def wait(self):
        time.sleep(self.delay)
        if self.event is not None:
            assert self.event.wait(10), "the event never came"
        if self.error is not None:
            raise self.error


@pytest.fixture
def executor():
    executor = Executor(name="test-gradq")
    yield executor
    executor.close()
    assert not stage_threads()


def stage_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("test-gradq")]


def in_time(future):
    """The future's value; a hang is an error."""
    deadline = time.monotonic() + 10
    while not future.done():
        assert time.monotonic() < deadline, "the job never ended"
        time.sleep(0.001)
    return future.wait()


def test_the_future_holds_the_result(executor):
    result = torch.ones(3)

    def steps():
        yield Ready()
        result.mul_(2)
        yield Ready()
        result.add_(1)

    assert in_time(executor.submit(steps(), result)) is result
    assert result.tolist() == [3.0] * 3


def test_a_job_that_never_waits(executor):
    result = torch.zeros(1)
    assert in_time(executor.submit(iter(()), result)) is result


def test_every_stage_sees_the_jobs_in_the_order_they_came(executor):
    log = [[], [], []]
    chance = random.Random(0)

    def steps(job):
        for stage in range(3):
            time.sleep(chance.random() * 2e-3)
            log[stage].append((job, threading.current_thread().name))
            if stage < 2:
                yield Ready(chance.random() * 2e-3)

    futures = [executor.submit(steps(job), torch.zeros(1)) for job in range(30)]
    for future in futures:
        in_time(future)
    for stage, entries in enumerate(log):
        assert entries == [(job, f"test-gradq-stage-{stage}") for job in range(30)]


def test_jobs_with_fewer_stages_do_not_hold_up_the_others(executor):
    order = []

    def steps(job, waits):
        for _ in range(waits):
            yield Ready()
        order.append(job)

    futures = [executor.submit(steps(job, job % 3), torch.zeros(1)) for job in range(12)]
    for future in futures:
        in_time(future)
    for waits in range(3):
        done = [job for job in order if job % 3 == waits]
        assert done == sorted(done)


def test_stages_of_two_jobs_overlap(executor):
    arrived, second_started = threading.Event(), threading.Event()

    def first():
        yield Ready(event=arrived)  # stage 1 waits here until the second job is in stage 0

    def second():
        second_started.set()
        arrived.set()
        yield Ready()

    futures = [executor.submit(first(), torch.zeros(1)), executor.submit(second(), torch.zeros(1))]
    for future in futures:
        in_time(future)
    assert second_started.is_set()


def test_submit_does_not_wait(executor):
    release = threading.Event()

    def steps():
        assert release.wait(10)
        yield Ready(event=release)

    futures = [executor.submit(steps(), torch.zeros(1)) for _ in range(5)]
    assert not any(future.done() for future in futures)
    release.set()
    for future in futures:
        in_time(future)


def fails(stage, error):
    for _ in range(stage):
        yield Ready()
    raise error


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_what_a_stage_raises_reaches_the_future(executor, stage):
    future = executor.submit(fails(stage, ValueError(f"broken in {stage}")), torch.zeros(1))
    with pytest.raises(Exception, match=f"ValueError.*broken in {stage}|^broken in {stage}"):
        in_time(future)
    assert isinstance(executor.failure, ValueError)


def test_what_an_exchange_raises_reaches_the_future_with_its_cause(executor):
    cause = RuntimeError("connection reset by peer")
    error = ConnectionError("rank 3 is gone")
    error.__cause__ = cause

    def steps():
        yield Ready(error=error)

    with pytest.raises(Exception, match="rank 3 is gone"):
        in_time(executor.submit(steps(), torch.zeros(1)))
    assert executor.failure is error
    assert executor.failure.__cause__ is cause


def test_after_a_failure_every_later_job_fails_and_none_runs(executor):
    ran = []

    def steps():
        ran.append(1)
        yield Ready()

    futures = [executor.submit(fails(1, ValueError("broken")), torch.zeros(1))]
    with pytest.raises(Exception, match="broken"):
        in_time(futures[0])
    for _ in range(3):
        with pytest.raises(Exception, match="broken"):
            in_time(executor.submit(steps(), torch.zeros(1)))
    assert ran == []


def test_a_failure_in_stage_0_fails_the_job_that_waits_behind_it_in_stage_1(executor):
    waiting, broken = threading.Event(), threading.Event()

    def first():
        yield Ready(event=broken)  # in stage 1 until the third job has failed
        yield Ready()

    def second():
        waiting.set()
        yield Ready()

    def third():
        assert waiting.wait(10)
        raise ValueError("broken")
        yield

    jobs = [executor.submit(steps, torch.zeros(1)) for steps in (first(), second(), third())]
    with pytest.raises(Exception, match="broken"):
        in_time(jobs[2])
    broken.set()
    with pytest.raises(Exception, match="broken"):
        in_time(jobs[1])


def test_even_an_exit_is_carried_to_the_training_loop(executor):
    with pytest.raises(BaseException, match="stop"):
        in_time(executor.submit(fails(0, SystemExit("stop")), torch.zeros(1)))


def test_grad_mode_is_off_in_every_stage(executor):
    modes = []

    def steps():
        modes.append(torch.is_grad_enabled())
        yield Ready()
        modes.append(torch.is_grad_enabled())
        yield Ready()
        modes.append(torch.is_grad_enabled())

    assert torch.is_grad_enabled()
    in_time(executor.submit(steps(), torch.zeros(1)))
    assert modes == [False, False, False]


def test_threads_start_with_the_first_job_and_are_one_a_stage():
    executor = Executor(name="test-gradq")
    assert not stage_threads()

    def steps():
        yield Ready()
        yield Ready()

    for _ in range(5):
        in_time(executor.submit(steps(), torch.zeros(1)))
    assert sorted(t.name for t in stage_threads()) == [f"test-gradq-stage-{stage}" for stage in range(3)]
    executor.close()
    assert not stage_threads()


def test_close_finishes_what_is_queued_and_is_idempotent():
    executor = Executor(name="test-gradq")

    def steps():
        yield Ready(0.01)
        yield Ready(0.01)

    futures = [executor.submit(steps(), torch.zeros(1)) for _ in range(5)]
    executor.close()
    assert all(future.done() for future in futures)
    assert not stage_threads()
    executor.close()
    Executor(name="test-gradq").close()


def test_close_after_a_failure_ends_all_threads():
    executor = Executor(name="test-gradq")
    future = executor.submit(fails(2, ValueError("broken")), torch.zeros(1))
    with pytest.raises(Exception, match="broken"):
        in_time(future)
    executor.close()
    assert not stage_threads()


def test_all_futures_raise_what_the_executor_says_failed():
    """Two stages that fail at the same time: whatever is raised is `failure`."""
    for _ in range(30):
        executor = Executor(name="test-gradq")
        both = threading.Barrier(2, timeout=10)

        def steps(stage, both=both):
            for _ in range(stage):
                yield Ready()
            both.wait()
            raise ValueError(f"broken in {stage}")

        futures = [executor.submit(steps(stage), torch.zeros(1)) for stage in (1, 0)]
        said = []
        for future in futures:
            with pytest.raises(Exception, match="broken in") as caught:
                in_time(future)
            said.append(str(caught.value).splitlines()[0])
        assert all(str(executor.failure) in text for text in said), (said, executor.failure)
        executor.close()


def test_a_failure_is_told_once():
    told = []
    executor = Executor(name="test-gradq")
    executor.failed.tell = told.append
    futures = [executor.submit(fails(1, ValueError("broken")), torch.zeros(1)) for _ in range(3)]
    for future in futures:
        with pytest.raises(Exception, match="broken"):
            in_time(future)
    executor.close()
    assert told == [executor.failure]


def test_an_idle_executor_keeps_nothing_of_its_last_job(executor):
    class Payload:
        pass

    payload = Payload()
    alive = weakref.ref(payload)

    def steps(payload):
        yield Ready()
        assert payload is not None

    in_time(executor.submit(steps(payload), torch.zeros(1)))
    del payload
    deadline = time.monotonic() + 10
    while alive() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert alive() is None


def test_stop_does_not_wait_for_a_thread_that_waits_for_a_peer():
    release = threading.Event()

    def steps():
        yield Ready(event=release)

    executor = Executor(name="test-gradq")
    future = executor.submit(steps(), torch.zeros(1))
    executor.submit(steps(), torch.zeros(1))
    executor.stop()
    assert not future.done()
    release.set()
    in_time(future)
    executor.close()


def test_an_action_runs_after_a_job_and_before_its_future_is_done(executor):
    log, arrives = [], threading.Event()

    def stages():
        log.append("encode")
        yield Ready(event=arrives)
        log.append("decode")

    result = torch.ones(2)
    future = executor.after(executor.submit(stages(), result), lambda: log.append("end"))
    assert not future.done()
    arrives.set()
    assert in_time(future) is result
    assert log == ["encode", "decode", "end"]


def test_an_action_does_not_run_after_a_job_that_failed(executor):
    log = []

    def stages():
        yield Ready(error=ValueError("deliberate"))

    with pytest.raises(RuntimeError, match="ValueError: deliberate"):
        in_time(executor.after(executor.submit(stages(), torch.zeros(1)), lambda: log.append("end")))
    assert not log


def test_an_action_that_fails_stops_the_executor(executor):
    def fail():
        raise ValueError("deliberate")

    with pytest.raises(RuntimeError, match="ValueError: deliberate"):
        in_time(executor.after(executor.submit(iter([Ready()]), torch.zeros(1)), fail))
    assert isinstance(executor.failure, ValueError)
    with pytest.raises(RuntimeError, match="deliberate"):
        in_time(executor.submit(iter(()), torch.zeros(1)))
