"""Top-k on real ranks: what the oracle predicts, whatever the buckets; bytes, resumes, impossible pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Net, expected, plan_for, run
from test_checkpoint import equal, resume, save
from test_contracts import refusals
from test_ddp import check
from test_wire_bytes import one_step

import gradq
from gradq import wire
from gradq.codecs import TopKCodec, from_spec
from gradq.policy import Assignment, FixedPolicy, ParameterInfo
from gradq.testing import run_ranks

SPEC = "topk(percent=5,block_size=256)"
DDP = {"find_unused_parameters": True, "bucket_cap_mb": 0.02}
JOBS = {
    "2 ranks": (2, {"spec": SPEC}),
    "3 ranks": (3, {"spec": "topk", "ddp": DDP | {"bucket_cap_mb": 25}}),
    "3 ranks, two phases": (3, {"spec": SPEC, "compress": {"collective": "two_phase"}}),
    "4 ranks, tiny buckets, skewed": (4, {"spec": SPEC, "ddp": DDP | {"bucket_cap_mb": 0.001}, "skew": 5}),
    "means in 8 bits": (3, {"spec": f"{SPEC}+int8", "compress": {"collective": "two_phase"}}),
    "gradients in 8 bits, means by top-k": (
        3,
        {"spec": f"int8+{SPEC}", "compress": {"collective": "two_phase"}},
    ),
    "bf16 model": (2, {"spec": SPEC, "dtype": torch.bfloat16}),
}


SHORT = {"4 ranks, tiny buckets, skewed"}  # in one process all of them are in test_collectives.py


@pytest.mark.parametrize(
    "job", [pytest.param(job, marks=[] if job in SHORT else [pytest.mark.slow]) for job in JOBS]
)
def test_every_gradient_is_what_the_oracle_says(job: str) -> None:
    world_size, changes = JOBS[job]
    check(world_size, {"ddp": DDP, "steps": 5} | changes, unused=("branch",))


def check_owners(results: list[Any]) -> None:
    """Top-k goes by owners, all else directly, to the bit what the oracle says."""
    plan = {
        name: (info, replace(entry, collective="two_phase" if entry.feedback1 else "direct"))
        for name, (info, entry) in plan_for(Net(), SPEC).items()
    }
    want = expected([put_in for put_in, _, _ in results], plan, two_phase=False)
    for _, came_out, _ in results:
        for step, reduced in enumerate(came_out):
            for name, gradient in reduced.items():
                assert name.startswith("branch") or torch.equal(gradient, want[step][name]), (step, name)


@pytest.mark.slow
def test_from_5_ranks_on_owners_average_and_the_rest_stays_direct() -> None:
    check_owners(run_ranks(run, 5, {"spec": SPEC, "ddp": DDP, "steps": 3}))


@pytest.mark.slow
@pytest.mark.parametrize("collective", ["auto", "two_phase"])
def test_resume_continues_bit_for_bit(tmp_path: Path, collective: str) -> None:
    options = {"collective": collective}
    before = run_ranks(save, 3, str(tmp_path / "c"), SPEC, options)
    after = run_ranks(resume, 3, str(tmp_path / "c"), SPEC, options, 0.001)  # with other buckets, too
    for (saved, history, weights), (loaded, step, replayed, resumed, lines) in zip(
        before, after, strict=True
    ):
        assert step == 5
        assert len(saved) == (2 if collective == "auto" else 4)
        assert equal(saved, loaded)
        assert all(equal(want, got) for want, got in zip(history, replayed, strict=True))
        assert equal(weights, resumed)
        assert not lines


def test_the_bytes_are_those_promised() -> None:
    for sent, counted, dense, numel in run_ranks(one_step, 2, "topk"):
        assert sent == counted
        assert numel > 5_000_000
        assert 0 < sent - wire.HEADER_BYTES < 0.009 * dense  # 0.14 bits an element and the exact vectors
    codec = TopKCodec()
    assert codec.nbytes(4096) == 2 + 48 // 2 + -(-(41 + 63) // 8) + -(-41 * 6 // 8)


class Sparse:
    """An assignment that names its collective."""

    def __init__(self, spec: str) -> None:
        self.spec = spec

    def plan(self, parameters):
        codec = from_spec(self.spec)
        entry = Assignment(phase1=codec, phase2=codec, feedback1=True, feedback2=True, collective="sparse")
        return {parameter.name: entry for parameter in parameters}


def impossible(rank: int) -> list[str]:
    return refusals(
        ("topk", {"feedback": False}),
        (Sparse("int4(rounding=nearest)"), {}),
        ("int4", {"collective": "sparse"}),
    )


def test_what_cannot_work_is_an_error_at_construction() -> None:
    for no_feedback, dense_codec, model_wide in run_ranks(impossible, 2):
        assert "topk needs error feedback" in no_feedback
        assert "for sparse codecs such as topk, not for int4(rounding=nearest)" in dense_codec
        assert "collective='sparse': choose from auto, direct, two_phase" in model_wide


def test_an_assignment_decides_before_the_run_and_the_run_before_the_codec() -> None:
    info = ParameterInfo(name="w", shape=(64, 64), dtype=torch.float32, index=0)
    entry = FixedPolicy(spec=gradq.Spec.parse("topk")).plan([info])["w"]
    assert (entry.feedback1, entry.feedback2, entry.collective) == (True, True, "auto")
    assert str(entry.phase2) == "topk(percent=2.0)"
    assert [entry.resolve(run) for run in ("auto", "direct")] == ["sparse", "direct"]
    assert replace(entry, collective="two_phase").resolve("direct") == "two_phase"
