"""PowerSGD on real ranks: what the oracle predicts, whatever the buckets, non-finite values and resumes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_checkpoint import Records, equal, resume, save
from test_contracts import VALUES, backward, gradients, make, refusals, residuals
from test_ddp import check
from test_wire_bytes import Counting

import gradq
from gradq import wire
from gradq.options import SyncConfig
from gradq.policy import FixedPolicy, ParameterInfo, Spec
from gradq.sync.gradient_sync import GradientSync
from gradq.testing import run_ranks

DDP = {"find_unused_parameters": True, "bucket_cap_mb": 0.02}
JOBS = {
    "2 ranks": (2, {"spec": "powersgd:4"}),
    "3 ranks, two phases": (3, {"spec": "powersgd:4", "compress": {"collective": "two_phase"}}),
    "4 ranks, tiny buckets, skewed": (
        4,
        {"spec": "powersgd:2", "ddp": DDP | {"bucket_cap_mb": 0.001}, "skew": 5},
    ),
    "3 ranks, one bucket": (3, {"spec": "powersgd:1", "ddp": DDP | {"bucket_cap_mb": 25}}),
    "rank above every dimension but few": (2, {"spec": "powersgd:64"}),
    "the rest in 4 bits": (3, {"spec": "powersgd:4+int4+int4", "compress": {"collective": "two_phase"}}),
    "some exact, bf16 model": (
        2,
        {"spec": "powersgd:4", "compress": {"exact": "se*"}, "dtype": torch.bfloat16},
    ),
    "some fp64, other seed": (2, {"spec": "powersgd:4", "compress": {"seed": 3}, "mixed": True}),
}


LONG = {
    "2 ranks",
    "3 ranks, one bucket",
    "rank above every dimension but few",
    "some fp64, other seed",
    "some exact, bf16 model",
    "3 ranks, two phases",
    "the rest in 4 bits",
}  # in one process all of them are in test_collectives.py


@pytest.mark.parametrize(
    "job", [pytest.param(job, marks=[pytest.mark.slow] if job in LONG else []) for job in JOBS]
)
def test_every_gradient_is_what_the_oracle_says(job: str) -> None:
    """Eight steps, so that a basis comes from a factor from the left and from the right several times."""
    world_size, changes = JOBS[job]
    check(world_size, {"ddp": DDP, "steps": 8} | changes, unused=("branch",))


@pytest.mark.slow
def test_a_parameter_used_on_one_rank_only() -> None:
    check(2, {"spec": "powersgd:2", "ddp": DDP, "branch": "rank 1", "steps": 4})


def zeros_now_and_then(rank: int):
    """Gradients of zeros and of denormals between ordinary ones."""
    model = make()
    handle = gradq.compress(model, "powersgd:4", collective="two_phase")
    history = []
    for step, factor in enumerate([0.0, 0.0, 1.0, 1e-42, 0.0, 1.0]):
        backward(model, rank, step, lambda loss, factor=factor: loss * factor)
        history.append(gradients(model))
    kept = residuals(handle)
    handle.close()
    return history, kept


def test_zeros_and_denormals_make_no_nan_and_bring_back_what_is_owed() -> None:
    results = run_ranks(zeros_now_and_then, 3)
    for history, kept in results:
        for step, reduced in enumerate(history):
            for name, gradient in reduced.items():
                assert torch.isfinite(gradient).all(), (step, name)
                assert torch.equal(gradient, results[0][0][step][name])
        assert all(torch.isfinite(residual).all() for residual in kept.values())
        name = "module.2.weight"
        assert not history[0][name].any()
        assert not history[1][name].any()
        assert history[2][name].any()
        assert history[4][name].any(), "a step without gradients does not send residuals"


# --- non-finite ----------------------------------------------------------------------------------------


def memory(handle: gradq.HookState) -> dict[str, torch.Tensor]:
    bases = handle.sync.feedback.bases
    return residuals(handle) | {f"basis {name}": bases.current(name).clone() for name in bases.names()}


def poison(rank: int, collective: str):
    """For both sides of the bases, every value and some places: a good step, a poisoned and a good one."""
    model = make()
    handle = gradq.compress(model, "powersgd:3", collective=collective)
    parameter = dict(model.module.named_parameters())["2.weight"]
    outcomes, step = [], 0
    for extra in (0, 1):
        for value, element in zip(VALUES, (0, 3333, 6299), strict=True):

            def plant(gradient: torch.Tensor, element=element, value=value) -> torch.Tensor:
                planted = gradient.clone()
                planted.view(-1)[element] = value
                return planted

            for _ in range(1 + extra):
                backward(model, rank, step := step + 1)
            before = memory(handle)
            removable = parameter.register_hook(plant) if rank == 1 else None
            backward(model, rank, step := step + 1)
            poisoned, during = gradients(model.module), memory(handle)
            if removable is not None:
                removable.remove()
            backward(model, rank, step := step + 1)
            outcomes.append((before, poisoned, during, gradients(model.module)))
    handle.close()
    return outcomes


@pytest.mark.parametrize("collective", [pytest.param("direct", marks=pytest.mark.slow), "two_phase"])
def test_non_finite_is_seen_everywhere_and_never_remembered(collective: str) -> None:
    results = run_ranks(poison, 3, collective)
    sides = set()
    for outcomes in results:
        for number, (before, poisoned, during, after) in enumerate(outcomes):
            assert not torch.isfinite(poisoned["2.weight"]).all()
            assert all(torch.isfinite(g).all() for name, g in poisoned.items() if name != "2.weight")
            assert len(before) == 4
            assert equal(before, during), "a step with NaN or Inf was remembered"
            sides.add(float(before["basis 2.weight"][0]))
            for name, gradient in after.items():
                assert torch.isfinite(gradient).all()
                assert torch.equal(gradient, results[0][number][3][name])
    assert sides == {0.0, 1.0}


def scaled(rank: int, scale: float):
    """Six steps with a loss scale of which gradq is told."""
    model = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    handle = gradq.compress(model, "powersgd:3", grad_scaler=scaler)
    history = []
    for step in range(6):
        backward(model, rank, step, scaler.scale)
        history.append({name: gradient / scale for name, gradient in gradients(model).items()})
    kept = memory(handle)
    handle.close()
    return history, kept


def test_a_loss_scale_changes_nothing() -> None:
    """A power of two, so all of it is exact; remembered factors are in scaled units, residuals are not."""
    for (plain, kept), (large, kept_large) in zip(
        run_ranks(scaled, 2, 1.0), run_ranks(scaled, 2, 1024.0), strict=True
    ):
        assert all(equal(a, b) for a, b in zip(plain, large, strict=True))
        for name, residual in kept.items():
            if name.startswith("local"):
                assert torch.equal(residual, kept_large[name])


# --- checkpoints ---------------------------------------------------------------------------------------


def test_resume_continues_bit_for_bit(tmp_path: Path) -> None:
    """With other buckets, after an odd number of steps: the bases are left ones."""
    spec = "powersgd:3"
    before = run_ranks(save, 3, str(tmp_path / "c"), spec, {})
    after = run_ranks(resume, 3, str(tmp_path / "c"), spec, {}, 0.001)
    for (saved, history, weights), (loaded, step, replayed, resumed, lines) in zip(
        before, after, strict=True
    ):
        assert step == 5
        assert len(saved) == 2
        assert equal(saved, loaded)
        assert all(equal(want, got) for want, got in zip(history, replayed, strict=True))
        assert equal(weights, resumed)
        assert not lines
    assert not equal(before[0][0], before[1][0])


def resume_bases(rank: int, folder: str, spec: str):
    records = Records()
    logging.getLogger("gradq").addHandler(records)
    model = make()
    handle = gradq.compress(model, spec)
    gradq.load_checkpoint(handle, folder)
    kept = memory(handle)
    handle.close()
    return kept, records.lines


@pytest.mark.slow
def test_resume_on_other_ranks_keeps_the_bases_and_takes_the_mean_of_the_residuals(tmp_path: Path) -> None:
    before = run_ranks(save_bases, 3, str(tmp_path / "c"))
    means = {n: torch.stack([kept[n] for kept in before]).mean(0) for n in before[0] if n.startswith("local")}
    for kept, lines in run_ranks(resume_bases, 2, str(tmp_path / "c"), "powersgd:3"):
        assert equal({n: r for n, r in kept.items() if n.startswith("local")}, means)
        bases = [name for name in kept if name.startswith("basis")]
        assert len(bases) == 2
        assert all(torch.equal(kept[name], before[0][name]) for name in bases)
        assert len(lines) == 1
    for _, lines in run_ranks(resume_bases, 3, str(tmp_path / "c"), "powersgd:2"):
        assert any("2 parameters" in line and "start at random" in line for line in lines)


def save_bases(rank: int, folder: str):
    model = make()
    handle = gradq.compress(model, "powersgd:3")
    for step in range(5):
        backward(model, rank, step)
    dcp.save({"gradq": handle.state_dict()}, checkpoint_id=folder)
    kept = memory(handle)
    handle.close()
    return kept


# --- switching and measuring -----------------------------------------------------------------------------


def switching(rank: int):
    model = make()
    handle = gradq.compress(model, "powersgd:3")
    kept, step = [], 0
    for spec in ("powersgd:3", "powersgd:3+int8", "powersgd:2", "int8"):
        handle.set_spec(spec)
        kept.append(memory(handle))
        for _ in range(3):
            backward(model, rank, step := step + 1)
    handle.set_spec("powersgd:3")
    nmse = []
    for _ in range(12):
        handle.measure_next_step()
        backward(model, rank, step := step + 1)
    nmse = handle.stats(parameters=True)
    final = gradients(model)
    handle.close()
    return kept, nmse, final


def test_bases_are_kept_while_a_parameter_travels_as_before() -> None:
    results = run_ranks(switching, 2)
    for kept, stats, final in results:
        names = [{name for name in one if name.startswith("basis")} for one in kept]
        assert [len(one) for one in names] == [0, 2, 0, 0]
        assert [len([n for n in one if n.startswith("local")]) for one in kept] == [0, 2, 2, 0]
        assert 0.01 < stats.nmse < 1.0
        assert stats.parameters["0.bias"].nmse == 0.0
        assert 0.01 < stats.parameters["2.weight"].nmse < 1.0
        assert all(torch.equal(gradient, results[0][2][name]) for name, gradient in final.items())


# --- bytes, and errors where it starts -------------------------------------------------------------------


def counted(rank: int):
    """Bytes of three steps, counted where they are handed to the process group."""
    shapes = {"a": (300, 40), "b": (40,), "c": (64, 64)}
    infos = [
        ParameterInfo(name=name, shape=shape, dtype=torch.float32, index=i)
        for i, (name, shape) in enumerate(shapes.items())
    ]
    policy = FixedPolicy(spec=Spec.parse("powersgd:4"))
    sync = GradientSync(infos, policy, "", dist.group.WORLD, SyncConfig())
    sync.channels[0]._group = Counting(sync.channels[0]._group)
    flat, sent = torch.randn(300 * 40 + 40 + 64 * 64), []
    for _ in range(4):
        before = sync.channels[0]._group.sent
        sync.average_buckets([(flat, list(shapes))])[0].wait()
        sent.append(sync.channels[0]._group.sent - before)
    total, rows = sync.stats().wire_bytes, sync.stats(parameters=True).parameters
    sync.close()
    return sent, total, {name: row.wire_bits_per_element * row.numel / 8 for name, row in rows.items()}


def test_the_bytes_are_those_promised() -> None:
    for sent, total, promised in run_ranks(counted, 2):
        exact = wire.HEADER_BYTES + 4 * 40
        down = wire.HEADER_BYTES + 4 * 4 * 300 + 4 * 4 * 64  # P of both matrices
        across = wire.HEADER_BYTES + 4 * 4 * 40 + 4 * 4 * 64
        assert sent == [exact + down, exact + across] * 2
        assert total == sum(sent)
        assert promised == {"a": 4 * 4 * 340 / 2, "b": 160, "c": 4 * 4 * 64}


class OneDimensional:
    """Low rank for everything, a bias too."""

    def plan(self, parameters):
        entry = FixedPolicy(spec=Spec.parse("powersgd:2")).plan(
            [ParameterInfo(name="w", shape=(99, 99), dtype=torch.float32, index=0)]
        )["w"]
        return {parameter.name: entry for parameter in parameters}


def impossible(rank: int) -> list[str]:
    return refusals(
        (OneDimensional(), {}),
        ("int8", {"collective": "low_rank"}),
        ("powersgd:4", {"feedback": False}),
    )


def test_what_cannot_work_is_an_error_at_construction() -> None:
    for one_dimensional, model_wide, no_feedback in run_ranks(impossible, 2):
        assert "'0.bias' of shape [70]: it needs a matrix" in one_dimensional
        assert "collective='low_rank': choose from auto, direct, two_phase" in model_wide
        assert "feedback=False with powersgd:4" in no_feedback
