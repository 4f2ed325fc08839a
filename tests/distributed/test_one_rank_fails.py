"""One rank fails alone, while it starts or later: all ranks raise at once, and say which rank and why."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradq
from gradq.codecs import UniformCodec
from gradq.testing import run_ranks

FAILING = 1
AT_ONCE_S = 100.0  # the group's timeout is far above


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


def predicate(error):
    """A rule for exact parameters that fails on one rank."""

    def rule(parameter):
        if dist.get_rank() == FAILING:
            raise error
        return False

    return rule


class OneRankFails:
    """A context in which something of gradq's fails on one rank."""

    def __init__(self, how):
        self.how, self.undo = how, lambda: None

    def __enter__(self):
        if dist.get_rank() != FAILING:
            return
        if self.how == "typo in GRADQ_KERNELS":
            os.environ["GRADQ_KERNELS"] = "numpy"
            self.undo = lambda: os.environ.pop("GRADQ_KERNELS")
        elif self.how == "no kernels":
            kept = sys.modules.pop("gradq.codecs.uniform.cpu", None)
            sys.modules["gradq.codecs.uniform.cpu"] = None
            self.undo = lambda: sys.modules.update({"gradq.codecs.uniform.cpu": kept}) if kept else None
        elif self.how == "full disk":
            kept_method = UniformCodec.warm_up

            def full(self, *unused):
                raise OSError("No space left on device")

            UniformCodec.warm_up = full
            self.undo = lambda: setattr(UniformCodec, "warm_up", kept_method)

    def __exit__(self, *unused):
        self.undo()
        if sys.modules.get("gradq.codecs.uniform.cpu", 0) is None:
            del sys.modules["gradq.codecs.uniform.cpu"]


STARTS = {
    "typo in GRADQ_KERNELS": "'numpy' is not a kernel backend",
    "no kernels": "cannot be imported",
    "full disk": "OSError: No space left on device",
    "predicate": "ZeroDivisionError: by a user",
    "interrupt": "KeyboardInterrupt",
    "unknown spec": "no codec is called 'int99'",
    "misspelt keyword": "sed= is not an option; did you mean seed=?",
    "no options": "options={'seed': 1}: it must be a gradq.Options",
}


def outcome(call):
    """What a call raised, as text, and how long that took."""
    start = time.monotonic()
    try:
        call()
        said = "nothing"
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    return said, time.monotonic() - start


def start(rank, how, kind):
    options = {}
    if how == "predicate":
        options["exact"] = predicate(ZeroDivisionError("by a user"))
    elif how == "interrupt":
        options["exact"] = predicate(KeyboardInterrupt())
    elif how == "misspelt keyword" and rank == FAILING:
        options["sed"] = 1
    elif how == "no options" and rank == FAILING:
        options["options"] = {"seed": 1}
    spec = "int99" if how == "unknown spec" and rank == FAILING else "int4"
    with OneRankFails(how):
        if kind == "ddp":
            wrapped = DistributedDataParallel(model())
            return outcome(lambda: gradq.compress(wrapped, spec, collective="two_phase", **options))
        if kind == "fsdp":
            sharded = fully_shard(model())
            return outcome(lambda: gradq.compress(sharded, spec, feedback=True, **options))
        return outcome(lambda: gradq.LocalSGD(model(), None, spec, every=2, **options))


def all_starts(rank, kind):
    results = {how: start(rank, how, kind) for how in STARTS}
    handle = gradq.compress(DistributedDataParallel(model()), "int4")  # and all is well afterwards
    handle.close()
    return results


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "local"])
def test_a_rank_that_cannot_start(kind):
    everyone = run_ranks(all_starts, 3, kind, timeout=400, group_timeout=390)
    for how, why in STARTS.items():
        for rank, results in enumerate(everyone):
            said, seconds = results[how]
            assert why in said, f"{kind}, {how}, rank {rank}: {said}"
            assert rank == FAILING or f"MismatchError: rank {FAILING} cannot start" in said, said
            assert seconds < AT_ONCE_S, f"{kind}, {how}, rank {rank}: {seconds} s"


def train(wrapped, steps):
    for step in range(steps):
        wrapped.zero_grad()
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step))
        wrapped(x).square().mean().backward()


def another_spec(rank):
    """set_spec with something wrong on one rank: all keep the old spec and go on."""
    wrapped = DistributedDataParallel(model())
    handle = gradq.compress(wrapped, "int4")
    train(wrapped, 1)
    said = [outcome(lambda: handle.set_spec("int99" if rank == FAILING else "int8"))]
    with OneRankFails("full disk"):
        said.append(outcome(lambda: handle.set_spec("int3")))
    train(wrapped, 2)
    assert handle.stats().steps == 3
    assert str(handle.spec) == "int4"
    handle.close()
    return said


class Learns(gradq.BitAllocation):
    """Fails on one rank when it plans again."""

    def measured(self):
        if dist.get_rank() == FAILING:
            raise ZeroDivisionError("in a policy")
        return super().measured()


def later(rank, how):
    """A failure of one rank in a later step, in the training loop or on a worker's thread."""
    wrapped = DistributedDataParallel(model())
    spec = Learns(average_bits=4.0, every=2) if how == "policy" else "int4"
    handle = gradq.compress(wrapped, spec, collective="two_phase")
    train(wrapped, 1)
    if how == "codec" and rank == FAILING:

        def broken(self, *unused, **more):
            raise ZeroDivisionError("in a codec")

        UniformCodec.encode = broken
    said = outcome(lambda: train(wrapped, 3))
    failure = handle.failure
    handle.close()
    return [(f"{said[0]} / {type(failure).__name__}: {failure}", said[1])]


def late(rank, how):
    if how == "set_spec":
        return another_spec(rank)
    return later(rank, how)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("set_spec", ["no codec is called 'int99'", "No space left on device"]),
        ("policy", ["in a policy"]),
        ("codec", ["in a codec"]),
    ],
)
def test_a_rank_that_fails_later(how, why):
    everyone = run_ranks(late, 3, how, timeout=400, group_timeout=390)
    for rank, results in enumerate(everyone):
        for (said, seconds), expected in zip(results, why, strict=True):
            assert expected in said, f"{how}, rank {rank}: {said}"
            assert rank == FAILING or f"rank {FAILING} " in said, said
            assert seconds < AT_ONCE_S, f"{how}, rank {rank}: {seconds} s"


def alone(rank, what):
    """A call that all ranks must make, made by one; the others train on."""
    ddp = DistributedDataParallel(model())
    handle = gradq.compress(ddp, "int4")
    for _ in range(3):
        ddp(torch.ones(2, 64)).sum().backward()
    try:
        if rank == FAILING:
            handle.set_spec("int8") if what == "set_spec" else handle.gathered_state_dict()
        else:
            ddp(torch.ones(2, 64)).sum().backward()
            ddp(torch.ones(2, 64)).sum().backward()
    except (gradq.GradqError, RuntimeError) as error:  # DDP passes errors on as RuntimeError
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


@pytest.mark.parametrize("what", ["set_spec", "gathered_state_dict"])
def test_a_call_of_one_rank_only_ends_with_the_timeout_and_says_so(what):
    messages = run_ranks(alone, 2, what, group_timeout=5)
    assert messages[FAILING].startswith("PeerError: rank 1: another rank is gone, or did not make this call")
    assert "PeerError: rank 0: " in messages[0]
    assert "rank 1 failed in step" in messages[0]


def wrong_before_the_handshake(rank, what):
    """One rank's arguments are wrong before its group is known."""
    ddp = DistributedDataParallel(model())
    options = {"group": 5} if what == "group" else {"gather_spec": "int8"}
    start = time.monotonic()
    try:
        gradq.compress(ddp, "int4", **(options if rank == FAILING else {}))
    except gradq.GradqError as error:
        return time.monotonic() - start, f"{type(error).__name__}: {error}"
    return time.monotonic() - start, "nothing was raised"


@pytest.mark.parametrize(("what", "words"), [("group", "group=5"), ("gather_spec", "are for FSDP2 models")])
def test_wrong_arguments_of_one_rank_are_told_before_its_group_is_known(what, words):
    (waited, message), (_, own) = run_ranks(
        wrong_before_the_handshake, 2, what, timeout=100, group_timeout=90
    )
    assert waited < 60
    assert message.startswith("MismatchError: rank 1 cannot start: ")
    assert words in message
    assert own.startswith("ConfigError")
    assert words in own


WRONG = {
    "seed": ({"seed": "x"}, "seed='x'"),
    "timeout": ({"timeout": "x"}, "timeout='x'"),
    "every": ({"every": "4"}, "every='4'"),
    "group": ({"group": 5}, "group=5"),
    "only for others": ({"gather_spec": "int8"}, "local steps have none of them"),
    "outer_lr": ({"outer_lr": "x"}, "outer_lr='x'"),
}


def wrong_local_steps(rank, options):
    net = model()
    start = time.monotonic()
    try:
        gradq.DiLoCo(net, None, "int4", **{"every": 4, **(options if rank == FAILING else {})})
    except gradq.GradqError as error:
        return time.monotonic() - start, f"{type(error).__name__}: {error}"
    return time.monotonic() - start, "nothing was raised"


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_for_local_steps_of_one_rank_are_told(what):
    options, words = WRONG[what]
    (waited, message), (_, own) = run_ranks(wrong_local_steps, 2, options, timeout=100, group_timeout=90)
    assert waited < 60
    assert message.startswith("MismatchError: rank 1 cannot start: ")
    assert words in message
    assert own.startswith("ConfigError")
    assert words in own
