"""What a new user types first and gets wrong: gradq's own words, with what is right, and at once."""

from __future__ import annotations

import copy
import logging
import pickle
import time
import warnings
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradq
from gradq.codecs import from_spec
from gradq.options import SyncConfig, as_timedelta, scale_of
from gradq.policy import Spec, resolve


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    """One rank with a process group: what is wrong with a call does not depend on the others."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model(*shape: int) -> nn.Module:
    return nn.Linear(*(shape or (64, 64)))


def ddp() -> DistributedDataParallel:
    return DistributedDataParallel(model())


SPECS = [
    ("powersgd(4)", ["'powersgd:4'"]),
    ("powersgd4", ["'powersgd:4'"]),
    ("PowerSGD:8", ["'powersgd:8'"]),
    ("powersgd(rank=2)", ["'powersgd:2'"]),
    ("powersgd", ["needs the rank", "'powersgd:4'"]),
    ("powersgd:" + "1" * 5000, ["needs the rank"]),
    ("INT4", ["'INT4'", "did you mean 'int4'"]),
    ("Int8(block_size=64)", ["'int8(block_size=64)'"]),
    ("int4 + INT8", ["'int8'"]),
    ("fp8", ["'fp8_e4m3'"]),
    ("float8_e5m2", ["'fp8_e5m2'"]),
    ("float16", ["'fp16'"]),
    ("half", ["'fp16'"]),
    ("bfloat16", ["'bf16'"]),
    ("float32", ["'fp32'"]),
    ("int16", ["'bf16'"]),
    ("int1", ["'sign'"]),
    ("1bit", ["'sign'"]),
    ("8bit", ["'int8'"]),
    ("8-bit", ["'int8'"]),
    ("uint8", ["'int8'"]),
    ("q4", ["'int4'"]),
    ("int 8", ["'int 8'", "did you mean 'int8'"]),
    ("int_8", ["'int8'"]),
    ("int4 int8", ["'int4+int8'"]),
    ("int4,int8", ["'int4+int8'"]),
    ("topk(1)", ["'topk(percent=1)'"]),
    ("topk:0.1", ["'topk(percent=0.1)'"]),
    ("top-k", ["'topk'"]),
    ("off", ["'none'"]),
    ("", ["'none'", "'int8'"]),
    ("   ", ["'none'", "'int8'"]),
    ("int4+", ["'int4'"]),
    ("int4(block_size=64", ["'int4(block_size=64)'"]),
    ("int4" + " " * 8000 + "x", ["not a codec spec"]),
    ("int4(" + "1" * 9000 + ")", ["block_size"]),
    ("x" * 9000, ["no codec is called"]),
    (None, ["'none'", "'int8'"]),
    (True, ["'none'", "'int8'"]),
    (8, ["'int8'"]),
    (4, ["'int4'"]),
    (torch.int8, ["'int8'"]),
    (torch.float16, ["'fp16'"]),
    (b"int4", ["bytes"]),
    (["int4", "int8"], ["'int4+int8'"]),
    (Spec, ["class Spec"]),
    (gradq.FixedPolicy, ["class FixedPolicy"]),
]


@pytest.mark.parametrize(("spec", "words"), SPECS, ids=lambda value: repr(value)[:40])
def test_specs(spec, words):
    start = time.perf_counter()
    with pytest.raises(gradq.SpecError):
        resolve(spec, exact=(), feedback="auto")
    assert time.perf_counter() - start < 1, "a wrong spec must be found at once"  # it takes milliseconds
    with pytest.raises(gradq.SpecError) as caught:  # looks for the DDP model around it among all objects
        gradq.HookState(model(), spec)
    message = str(caught.value)
    assert len(message) < 1000
    for word in words:
        assert word in message


def test_a_spec_may_be_surrounded_by_any_number_of_spaces():
    assert str(Spec.parse("int4" + " " * 8000)) == "int4"
    assert str(from_spec(" " * 8000 + "int4 ( block_size = 64 )")) == "int4(block_size=64)"


def test_a_suggestion_is_itself_a_spec():
    for spec, words in SPECS:
        if isinstance(spec, str) and "did you mean" in (message := _message(spec)):
            meant = message.split("did you mean '")[1].split("'")[0]
            assert meant == "none" or Spec.parse(meant), (spec, words)


def _message(spec):
    try:
        Spec.parse(spec)
    except gradq.SpecError as error:
        return str(error)
    return ""


def after_close(use):
    handle = gradq.compress(ddp(), "int8")
    handle.close()
    use(handle)


def steps_in_backward():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package scripts functions
        from torch.distributed.optim import _apply_optimizer_in_backward
    wrapped = model()
    _apply_optimizer_in_backward(torch.optim.SGD, wrapped.parameters(), {"lr": 0.1})
    gradq.compress(DistributedDataParallel(wrapped), "none")


def twice():
    wrapped = ddp()
    gradq.compress(wrapped, "int8")
    gradq.compress(wrapped, "int4")


CALLS = {
    "optimizer": (
        lambda: gradq.compress(torch.optim.SGD(model().parameters(), 0.1)),
        gradq.UnsupportedError,
        ["SGD", "DistributedDataParallel(model)"],
    ),
    "plain module": (
        lambda: gradq.compress(model()),
        gradq.UnsupportedError,
        ["Linear", "DistributedDataParallel(model)"],
    ),
    "class": (lambda: gradq.compress(nn.Linear), gradq.UnsupportedError, ["class Linear"]),
    "nothing": (lambda: gradq.compress(None), gradq.UnsupportedError, ["NoneType"]),
    "data parallel": (
        lambda: gradq.compress(nn.DataParallel(model())),
        gradq.UnsupportedError,
        ["DataParallel", "DistributedDataParallel(model)"],
    ),
    "ddp inside": (
        lambda: gradq.compress(nn.Sequential(ddp())),
        gradq.UnsupportedError,
        ["Sequential", "its '0'"],
    ),
    "state of an optimizer": (
        lambda: gradq.HookState(torch.optim.SGD(model().parameters(), 0.1)),
        gradq.UnsupportedError,
        ["SGD"],
    ),
    "optimizer in backward": (steps_in_backward, gradq.UnsupportedError, ["only hook", "after backward"]),
    "complex parameter": (
        lambda: gradq.HookState(nn.Linear(4, 4, dtype=torch.complex64)),
        gradq.UnsupportedError,
        ["'weight'", "complex64", '"none"'],
    ),
    "number as spec": (lambda: gradq.compress(ddp(), 8), gradq.SpecError, ["'int8'"]),
    "twice": (twice, gradq.UnsupportedError, ["already", "int8", "set_spec", "close()"]),
    "seed of text": (lambda: gradq.compress(ddp(), seed="a"), gradq.ConfigError, ["seed='a'", "integer"]),
    "seed of a float": (lambda: gradq.compress(ddp(), seed=1.5), gradq.ConfigError, ["seed=1.5", "integer"]),
    "seed of a bool": (lambda: gradq.compress(ddp(), seed=True), gradq.ConfigError, ["seed=True"]),
    "seed of None": (lambda: gradq.compress(ddp(), seed=None), gradq.ConfigError, ["seed=None"]),
    "huge seed": (lambda: gradq.compress(ddp(), seed=1 << 64), gradq.ConfigError, ["64 bits"]),
    "timeout of text": (
        lambda: gradq.compress(ddp(), timeout="5"),
        gradq.ConfigError,
        ["timeout='5'", "seconds", "timedelta"],
    ),
    "timeout nan": (lambda: gradq.compress(ddp(), timeout=float("nan")), gradq.ConfigError, ["positive"]),
    "timeout inf": (lambda: gradq.compress(ddp(), timeout=float("inf")), gradq.ConfigError, ["finite"]),
    "negative timeout": (lambda: gradq.compress(ddp(), timeout=-1), gradq.ConfigError, ["positive"]),
    "no timeout": (lambda: gradq.compress(ddp(), timeout=timedelta(0)), gradq.ConfigError, ["positive"]),
    "timeout of a bool": (lambda: gradq.compress(ddp(), timeout=True), gradq.ConfigError, ["seconds"]),
    "collective of a list": (
        lambda: gradq.compress(ddp(), collective=["direct"]),
        gradq.ConfigError,
        ["name"],
    ),
    "no collective": (lambda: gradq.compress(ddp(), collective=None), gradq.ConfigError, ["'auto'"]),
    "residual dtype": (
        lambda: gradq.compress(ddp(), "int4", residual_dtype=torch.bfloat16),
        gradq.ConfigError,
        ["bf16"],
    ),
    "feedback": (lambda: gradq.compress(ddp(), feedback="yes"), gradq.ConfigError, ["True or False"]),
    "feedback of a list": (lambda: gradq.compress(ddp(), feedback=[]), gradq.ConfigError, ["True or False"]),
    "exact of a typo": (
        lambda: gradq.compress(ddp(), exact="wieght"),
        gradq.ConfigError,
        ["'wieght' matches no parameter", "close: weight"],
    ),
    "exact of a parameter": (
        lambda: gradq.compress(ddp(), exact=[nn.Parameter(torch.zeros(2))]),
        gradq.ConfigError,
        ["names or shell patterns"],
    ),
    "exact of None": (lambda: gradq.compress(ddp(), exact=None), gradq.ConfigError, ["exact=None"]),
    "rules of a string": (
        lambda: gradq.compress(ddp(), gradq.MixedPolicy(rules="int4")),
        gradq.ConfigError,
        ['"*": "int4"'],
    ),
    "rule with a number": (lambda: gradq.compress(ddp(), {"*": 8}), gradq.SpecError, ["'int8'"]),
    "group of a name": (lambda: gradq.compress(ddp(), group="gloo"), gradq.ConfigError, ["new_group"]),
    "not in the group": (
        lambda: gradq.HookState(model(), group=dist.GroupMember.NON_GROUP_MEMBER),
        gradq.ConfigError,
        ["not in the group"],
    ),
    "grad scaler": (lambda: gradq.compress(ddp(), grad_scaler=True), gradq.ConfigError, ["GradScaler"]),
    "meta": (
        lambda: gradq.HookState(nn.Linear(64, 64, device="meta")),
        gradq.UnsupportedError,
        ["'weight'", "meta", "to_empty"],
    ),
    "set_spec": (lambda: gradq.compress(ddp()).set_spec(4), gradq.SpecError, ["'int4'"]),
    "set_spec without": (lambda: gradq.compress(ddp()).set_spec(None), gradq.SpecError, ["'none'"]),
    "set_spec after close": (
        lambda: after_close(lambda handle: handle.set_spec("int4")),
        gradq.ConfigError,
        ["closed", "gradq.compress"],
    ),
    "state_dict after close": (
        lambda: after_close(lambda handle: handle.state_dict()),
        gradq.ConfigError,
        ["closed"],
    ),
    "load after close": (
        lambda: after_close(lambda handle: handle.load_state_dict({})),
        gradq.ConfigError,
        ["closed"],
    ),
    "option of another name": (
        lambda: gradq.compress(ddp(), process_group=None),
        gradq.ConfigError,
        ["process_group= is not an option", "group=?"],
    ),
    "spec as an option": (lambda: gradq.compress(ddp(), bits=4), gradq.ConfigError, ["spec='int4'"]),
    "a sink that is no function": (
        lambda: gradq.compress(ddp()).add_sink("wandb"),
        gradq.ConfigError,
        ["'wandb'", "function"],
    ),
    "hook without its state": (lambda: gradq.hook(None, None), gradq.UnsupportedError, ["HookState(model"]),
}


@pytest.mark.parametrize("what", CALLS)
def test_calls(what):
    call, kind, words = CALLS[what]
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert len(message) < 1000
    for word in words:
        assert word in message, message


def test_what_is_right_in_another_form():
    """Numbers of seconds, integers of other libraries, one name as a string."""
    assert as_timedelta(5) == as_timedelta(5.0) == as_timedelta(timedelta(seconds=5)) == timedelta(seconds=5)
    assert as_timedelta(None) is None
    for seed in (3, np.int64(3), torch.tensor(3)):
        config = SyncConfig(seed=seed)
        assert (type(config.seed), config.seed) == (int, 3)
    assert SyncConfig(seed=-1).seed == -1
    handle = gradq.compress(ddp(), "int4", exact="weight", timeout=5, seed=-7)
    assert handle.stats(parameters=True).parameters["weight"].codec == "fp32+fp32"
    handle.close()


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_a_loss_scale_that_loses_the_gradients(scale):
    class Scaler:
        def get_scale(self):
            return scale

    assert scale_of(torch.amp.GradScaler("cpu", init_scale=8.0, enabled=False))() == 1.0
    with pytest.raises(gradq.ConfigError, match=r"scale is .*look for NaN or Inf in the loss"):
        scale_of(Scaler())()


def test_no_process_group(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(gradq.ConfigError, match="init_process_group"):
        gradq.HookState(model())


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))])
def test_a_copied_handle_says_what_it_is(make):
    handle = gradq.compress(ddp(), "int4")
    copied = make(make(handle))
    assert repr(copied) == "<gradq int4, copied or unpickled: compresses nothing>"
    copied.close()
    assert not handle.closed
    for use in (lambda: copied.stats(), lambda: copied.set_spec("int8"), lambda: gradq.hook(copied, None)):
        with pytest.raises(gradq.GradqError, match=r"copy or a pickle|instead of a DDP bucket"):
            use()
    handle.close()


def test_local_steps_say_the_same():
    with pytest.raises(gradq.SpecError, match="'int8'"):
        gradq.LocalSGD(model(), None, 8, every=2)
    local = gradq.LocalSGD(model(), None, {"*": "int8"}, every=2)
    assert "compresses nothing" in repr(copy.deepcopy(local))
    local.close()


def test_a_closed_handle_makes_room_for_another():
    wrapped = ddp()
    first = gradq.compress(wrapped, "int8")
    first.close()
    second = gradq.compress(wrapped, "int4")
    wrapped(torch.ones(2, 64)).sum().backward()
    assert (first.stats().steps, second.stats().steps) == (0, 1)
    second.close()


def test_nothing_is_said_where_all_is_well(caplog):
    with caplog.at_level(logging.INFO, logger="gradq"):
        gradq.compress(ddp(), "int8").close()
    assert not caplog.records
