"""The contracts of DESIGN on real ranks: non-finite values, handshake, failures, odd models, new specs."""

from __future__ import annotations

import os
import signal
import time
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradq
import gradq.codecs
from gradq.policy import Spec
from gradq.testing import RankError, run_ranks


def make(bucket_cap_mb: float = 0.02, width: int = 70) -> DistributedDataParallel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, width), nn.Tanh(), nn.Linear(width, 90), nn.Tanh(), nn.Linear(90, 8))
    return DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb)


def refusals(*cases: tuple[Any, dict[str, Any]]) -> list[str]:
    """What `gradq.compress` says to each spec with its options, "no error" if it takes them."""
    messages = []
    for spec, options in cases:
        try:
            gradq.compress(make(), spec, **options)
            messages.append("no error")
        except gradq.ConfigError as error:
            messages.append(str(error))
    return messages


def backward(model: nn.Module, rank: int, step: int, scale=lambda loss: loss) -> None:
    model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(100 * step + rank)
    scale(model(torch.randn(6, 50, generator=generator)).square().mean()).backward()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def residuals(handle: gradq.HookState) -> dict[str, torch.Tensor]:
    kinds = {"local": handle.sync.feedback.local, "shard": handle.sync.feedback.shard}
    return {
        f"{kind} {name}": store.current(name).clone()
        for kind, store in kinds.items()
        for name in store.names()
    }


# --- non-finite ----------------------------------------------------------------------------------------


PLACES = [("0.weight", 0), ("0.weight", 3499), ("2.weight", 3333), ("2.bias", 89), ("4.bias", 0)]
VALUES = [float("nan"), float("inf"), float("-inf")]


def poison(rank: int, spec: str, collective: str, culprit: int):
    """For every place and value: a good step, one with the value planted on one rank, and a good one."""
    model = make()
    handle = gradq.compress(model, spec, feedback=True, collective=collective)
    outcomes = []
    for target, element in PLACES:
        parameter = dict(model.module.named_parameters())[target]
        for value in VALUES:

            def plant(gradient: torch.Tensor, element=element, value=value) -> torch.Tensor:
                planted = gradient.clone()
                planted.view(-1)[element] = value
                return planted

            backward(model, rank, 1)
            before = residuals(handle)
            removable = parameter.register_hook(plant) if rank == culprit else None
            backward(model, rank, 2)
            poisoned, during = gradients(model.module), residuals(handle)
            if removable is not None:
                removable.remove()
            backward(model, rank, 3)
            outcomes.append((before, poisoned, during, gradients(model.module)))
    handle.close()
    return outcomes


def check_poisoned(results: list[Any], collective: str) -> None:
    """What `poison` saw on all ranks: a bad value reaches everyone, in its parameter, and no residual."""
    for rank, outcomes in enumerate(results):
        cases = [(*place, value) for place in PLACES for value in VALUES]
        for number, (target, element, value) in enumerate(cases):
            where = f"{value} at {target}[{element}], rank {rank}"
            before, poisoned, during, after = outcomes[number]
            assert not torch.isfinite(poisoned[target]).all(), f"{where}: the rank does not see it"
            for name, gradient in poisoned.items():
                assert name == target or torch.isfinite(gradient).all(), f"{where}: {name} was poisoned"
            assert before.keys() == during.keys()
            assert len(before) == (2 if collective == "direct" else 4)
            for name, residual in before.items():
                assert torch.equal(residual, during[name]), f"{where}: the residual {name} changed"
                assert torch.isfinite(residual).all()
            for name, gradient in after.items():
                assert torch.isfinite(gradient).all(), where
                assert torch.equal(gradient, results[0][number][3][name]), where


@pytest.mark.parametrize(("spec", "collective"), [("int8", "direct"), ("int4+int4", "two_phase")])
def test_non_finite_is_seen_everywhere_and_never_remembered(spec: str, collective: str) -> None:
    """More codecs and collectives are in test_collectives.py."""
    check_poisoned(run_ranks(poison, 3, spec, collective, 1), collective)


def scaled_training(rank: int, tell: bool):
    model = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    handle = gradq.compress(model, "int4+int4", collective="two_phase", grad_scaler=scaler if tell else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = []
    for step in range(6):
        factor = float("inf") if (step == 3 and rank == 1) else 1.0
        backward(model, rank, step, lambda loss, factor=factor: scaler.scale(loss * factor))
        weights = model.module[0].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        moved = not torch.equal(weights, model.module[0].weight)
        history.append((moved, scaler.get_scale(), residuals(handle)))
    handle.close()
    return history, model.module.state_dict()


def test_grad_scaler_skips_the_step_and_residuals_stay_unscaled() -> None:
    results = run_ranks(scaled_training, 2, True)
    for history, weights in results:
        assert [moved for moved, _, _ in history] == [True, True, True, False, True, True]
        assert [scale for _, scale, _ in history] == [1024.0] * 3 + [512.0] * 3
        norms = [sum(float(r.norm()) for r in kept.values()) for _, _, kept in history]
        assert norms[2] == norms[3], "the skipped step changed a residual"
        assert 0 < norms[2] < 1.0, "residuals are in scaled units"
        for name, weight in weights.items():
            assert torch.equal(weight, results[0][1][name])


# --- handshake -----------------------------------------------------------------------------------------


def disagree(rank: int, what: str) -> tuple[str, float]:
    options: dict = {"seed": 0, "feedback": "auto", "collective": "auto", "residual_dtype": "fp32"}
    spec: str | Spec = "int4"
    module = make().module
    if rank == 1:
        if what == "spec":
            spec = "int8"
        elif what == "seed":
            options["seed"] = 1
        elif what == "model":
            module = nn.Sequential(*module[:2], nn.Linear(70, 91), nn.Tanh(), nn.Linear(91, 8))
        elif what == "names":
            module = nn.Sequential(nn.Identity(), *module)
        elif what == "dtype":
            module = module.to(torch.bfloat16)
        elif what == "exact":
            options["exact"] = ["2.weight"]
        elif what == "error":
            spec = "int9"
        else:
            options |= {"feedback": {"feedback": False}, "collective": {"collective": "two_phase"}}[what]
    start = time.monotonic()
    try:
        gradq.HookState(module, spec, **options)
    except gradq.GradqError as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "no error", 0.0


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("spec", ["spec", "'int4'", "'int8'"]),
        ("seed", ["seed", "0", "1"]),
        ("model", ["2.weight", "(90, 70)", "(91, 70)"]),
        ("names", ["names", "0.weight", "1.weight"]),
        ("dtype", ["0.weight", "float32", "bfloat16"]),
        ("exact", ["2.weight", "fp32"]),
        ("feedback", ["0.weight", "feedback"]),
        ("collective", ["collective", "two_phase"]),
        ("error", ["int9"]),
    ],
)
def test_ranks_that_disagree_are_told_which_and_what(what: str, words: list[str]) -> None:
    for rank, (message, seconds) in enumerate(run_ranks(disagree, 3, what)):
        if what == "error" and rank == 1:
            assert message.startswith("SpecError")
        else:
            assert message.startswith("MismatchError: "), message
            assert "rank 1" in message
        for word in words:
            assert word in message, message
        assert seconds < 10


# --- failures ------------------------------------------------------------------------------------------


def lose_a_peer(rank: int, victim: int, how: int) -> tuple[str, float]:
    model = make()
    handle = gradq.compress(model, "int4+int8", collective="two_phase")
    for step in range(20):
        if rank == victim and step == 3:
            os.kill(os.getpid(), how)
        start = time.monotonic()
        try:
            backward(model, rank, step)
        except RuntimeError as error:
            seconds, failure = time.monotonic() - start, handle.failure
            known = isinstance(failure, gradq.PeerError) and failure.__cause__ is not None
            return (str(error) if known and str(failure) in str(error) else f"other: {error!r}"), seconds
    return "no error", 0.0


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_peer_raises_on_every_survivor(victim: int) -> None:
    results = run_ranks(lose_a_peer, 3, victim, signal.SIGKILL, expect_exit=(victim,), group_timeout=20)
    for rank, result in enumerate(results):
        if rank != victim:
            message, seconds = result
            assert f"rank {victim}" in message
            assert "step 3" in message
            assert "phase" in message
            assert seconds < 10


def test_a_stopped_peer_raises_at_the_timeout() -> None:
    with pytest.raises(RankError, match="did not finish"):  # the stopped rank itself never returns
        run_ranks(report_to_file, 2, 1, timeout=14, group_timeout=3)


def report_to_file(rank: int, victim: int) -> None:
    message, seconds = lose_a_peer(rank, victim, signal.SIGSTOP)
    assert "rank 1" in message
    assert 1.0 < seconds < 8.0, seconds
    time.sleep(30)


def broken_codec(rank: int) -> tuple[str, str]:
    model = make()
    handle = gradq.compress(model, "int4")

    def explode(*args, **kwargs):
        raise ZeroDivisionError("deliberate")

    backward(model, rank, 0)
    backward(model, rank, 1)  # DDP rebuilds its buckets
    for layout in handle.sync._layouts.values():
        for chunk in layout.chunks:
            chunk.collective.encode1 = explode
    try:
        backward(model, rank, 2)
    except RuntimeError as error:
        return str(error), repr(handle.failure)
    return "no error", ""


def test_an_exception_in_the_worker_reaches_the_loop_with_its_cause() -> None:
    for message, failure in run_ranks(broken_codec, 2):
        assert "ZeroDivisionError: deliberate" in message
        assert failure == "ZeroDivisionError('deliberate')"


# --- odd models and set-ups ----------------------------------------------------------------------------


def alone(rank: int):
    model = make()
    handle = gradq.compress(model, "int4")
    plain = make()
    for step in range(3):
        backward(model, rank, step)
        backward(plain, rank, step)
        for name, gradient in gradients(model).items():
            assert torch.equal(gradient, gradients(plain)[name])
    stats = handle.stats()
    handle.close()
    return stats.steps, stats.wire_bytes, stats.ratio


def test_world_size_one_passes_through() -> None:
    assert run_ranks(alone, 1) == [(3, 0, 1.0)]


def odd(rank: int, what: str) -> str:
    torch.manual_seed(0)
    if what == "sparse":
        model = nn.Sequential(nn.Embedding(50, 64, sparse=True), nn.Linear(64, 4))
    elif what == "complex":
        model = nn.Linear(8, 8).to(torch.complex64)
    elif what == "frozen":
        model = nn.Linear(8, 8).requires_grad_(False)
    else:
        model = nn.Linear(64, 64)
    try:
        if what == "not ddp":
            gradq.compress(model)
        elif what == "hook taken":
            ddp = DistributedDataParallel(model)
            gradq.compress(ddp, "int8")
            gradq.compress(ddp, "int4")
        elif what == "mixed precision":
            ddp = make()
            ddp.mixed_precision = object()
            gradq.compress(ddp)
        elif what == "not a bucket":
            gradq.hook(gradq.HookState(model), (model.weight,))
        elif what == "another module":
            ddp = DistributedDataParallel(model)
            ddp.register_comm_hook(gradq.HookState(nn.Linear(64, 64)), gradq.hook)
            ddp(torch.randn(2, 64)).sum().backward()
        elif what == "exact matches nothing":
            gradq.HookState(model, exact="wieght")
        elif what == "diverging feedback":
            gradq.HookState(model, "int2(rounding=stochastic)", feedback=True)
        elif what == "residual dtype":
            gradq.HookState(model, residual_dtype="fp8")
        elif what == "collective":
            gradq.HookState(model, collective="ring")
        else:
            gradq.HookState(model)
    except gradq.GradqError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("sparse", ["UnsupportedError", "'0'", "sparse=False"]),
        ("complex", ["UnsupportedError", "weight", "complex64"]),
        ("frozen", ["UnsupportedError", "nothing to average"]),
        ("not ddp", ["UnsupportedError", "Linear", "DistributedDataParallel(model)"]),
        ("hook taken", ["UnsupportedError", "already has a communication hook"]),
        ("mixed precision", ["UnsupportedError", "torch.autocast"]),
        ("not a bucket", ["UnsupportedError", "tuple", "python_reducer"]),
        ("another module", ["UnsupportedError", "same module"]),
        ("exact matches nothing", ["ConfigError", "wieght", "weight"]),
        ("diverging feedback", ["ConfigError", "feedback=True", "nearest"]),
        ("residual dtype", ["ConfigError", "fp8", "bf16"]),
        ("collective", ["ConfigError", "ring", "two_phase"]),
    ],
)
def test_what_cannot_work_is_named(what: str, words: list[str]) -> None:
    for message in run_ranks(odd, 2, what):
        for word in words:
            assert word in message, message


def test_no_process_group_is_named() -> None:
    with pytest.raises(gradq.ConfigError, match="init_process_group"):
        gradq.HookState(nn.Linear(4, 4))


def uneven_inputs(rank: int):
    model = make()
    handle = gradq.compress(model, "int4+int4", collective="two_phase")
    with warnings.catch_warnings(), model.join():
        warnings.simplefilter("ignore")  # join warns that it slows training
        for step in range(3 + 2 * rank):
            backward(model, rank, step)
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
    handle.close()
    return {name: p.detach() for name, p in model.named_parameters()}


def test_join_with_uneven_inputs_keeps_replicas_equal() -> None:
    results = run_ranks(uneven_inputs, 3)
    for weights in results:
        for name, weight in weights.items():
            assert torch.isfinite(weight).all()
            assert torch.equal(weight, results[0][name])


def native_form(rank: int):
    model = make()
    pair = dist.new_group([0, 1])
    state = gradq.HookState(model.module, "int4", group=pair) if rank < 2 else None
    if state is None:
        return None
    state.close()
    state = gradq.HookState(model.module, "int4", group=pair)  # a second one over the same ranks
    inner = DistributedDataParallel(model.module, process_group=pair)
    inner.register_comm_hook(state, gradq.hook)
    backward(inner, rank, 0)
    steps = state.stats().steps
    state.close()
    return steps, gradients(inner)


def test_the_hook_form_over_a_subgroup() -> None:
    first, second, outsider = run_ranks(native_form, 3)
    assert first[0] == second[0] == 1
    assert outsider is None
    for name, gradient in first[1].items():
        assert torch.equal(gradient, second[1][name])


class Halves:
    """A policy of one's own: the first parameter in 4 bits, the others in bf16."""

    def plan(self, parameters):
        codecs = [gradq.codecs.from_spec("int4(rounding=nearest)"), gradq.codecs.from_spec("bf16")]
        return {
            info.name: gradq.Assignment(
                phase1=codecs[info.index > 0], phase2=codecs[1], feedback1=info.index == 0, feedback2=False
            )
            for info in parameters
        }


def own_policy(rank: int):
    model = make()
    handle = gradq.compress(model, Halves(), collective="two_phase")
    backward(model, rank, 0)
    stats = handle.stats(parameters=True)
    codecs = {name: entry.codec for name, entry in stats.parameters.items()}
    handle.close()
    return codecs, gradients(model), list(residuals(handle))


def test_a_policy_object_of_ones_own() -> None:
    results = run_ranks(own_policy, 3)
    for codecs, reduced, kept in results:
        assert codecs["0.weight"] == "int4(rounding=nearest) with feedback+bf16"
        assert codecs["2.weight"] == "bf16+bf16"
        assert kept == ["local 0.weight"]
        for name, gradient in reduced.items():
            assert torch.equal(gradient, results[0][1][name])


def compiled(rank: int):
    model = make(25)
    handle = gradq.compress(model, "int4")
    fast = torch.compile(model, backend="aot_eager")
    for step in range(3):
        backward(fast, rank, step)
    steps = handle.stats().steps
    handle.close()
    return steps, gradients(model)


def test_torch_compile_of_the_ddp_model() -> None:
    results = run_ranks(compiled, 2)
    for steps, reduced in results:
        assert steps == 3
        for name, gradient in reduced.items():
            assert torch.equal(gradient, results[0][1][name])


# --- switching, measuring, closing ---------------------------------------------------------------------


def switching(rank: int):
    model = make()
    handle = gradq.compress(model, "int4+int4", collective="two_phase")
    rows = []
    for step, spec in enumerate(["", "int8", "none", "bf16", "int4", ""]):
        if spec:
            handle.set_spec(spec)
        before = handle.stats().wire_bytes
        backward(model, rank, step)
        rows.append(
            (str(handle.spec), handle.stats().wire_bytes - before, gradients(model), residuals(handle))
        )
    try:
        handle.set_spec("int8" if rank == 0 else "int3")
        mismatch = ""
    except gradq.MismatchError as error:
        mismatch = str(error)
    backward(model, rank, 9)
    rows.append((str(handle.spec), 0, gradients(model), {}))
    handle.close()
    handle.close()
    backward(model, rank, 10)  # plain all-reduce
    rows.append(("closed", 0, gradients(model), {}))
    return rows, mismatch, repr(handle)


def test_specs_switch_between_steps() -> None:
    results = run_ranks(switching, 3)
    rows, mismatch, shown = results[0]
    assert [row[0] for row in rows] == ["int4+int4", "int8", "none", "bf16", "int4", "int4", "int4", "closed"]
    assert "rank 1" in mismatch
    assert "int3" in mismatch
    four, eight, none, half = (rows[i][1] for i in range(4))
    assert four < eight < half < none
    assert not rows[1][3], "int8 keeps residuals it does not use"
    assert rows[5][3]
    assert "gradq int4 over 3 ranks" in shown
    for index in range(len(rows)):
        for other in results[1:]:
            for name, gradient in rows[index][2].items():
                assert torch.equal(gradient, other[0][index][2][name])


def measured(rank: int):
    model = make()
    events: list[gradq.Event] = []
    handle = gradq.compress(model, "int4", collective="two_phase")
    handle.add_sink(events.append)
    backward(model, rank, 0)
    unsampled = handle.stats()
    handle.measure_next_step()
    backward(model, rank, 1)
    backward(model, rank, 2)
    stats = handle.stats(parameters=True)
    handle.close()
    return unsampled, stats, events


def test_stats_count_what_was_sent() -> None:
    for unsampled, stats, events in run_ranks(measured, 3):
        assert unsampled.nmse is None
        assert stats.steps == 3
        assert stats.wire_bytes == sum(int(e.value) for e in events if e.kind == "wire_bytes")
        assert stats.ratio == stats.dense_bytes / stats.wire_bytes
        assert 3.0 < stats.ratio < 6.0
        for kind in ("encode_ms", "exchange_ms", "decode_ms"):
            total = sum(e.value for e in events if e.kind == kind)
            assert getattr(stats, kind) == pytest.approx(total)
            assert total > 0
        assert 0.001 < stats.nmse < 0.05
        weight = stats.parameters["2.weight"]
        assert weight.numel == 6300
        assert weight.codec == "int4(rounding=nearest) with feedback+int8(rounding=stochastic)"
        assert 4.0 < weight.wire_bits_per_element < 4.2
        assert 0.001 < weight.nmse < 0.05
        assert stats.parameters["2.bias"].codec == "fp32+fp32"
        assert stats.parameters["2.bias"].nmse == 0.0
