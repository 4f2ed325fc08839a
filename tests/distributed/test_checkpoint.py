"""Checkpoints through torch.distributed.checkpoint: the same ranks, other ranks, and wrong ones."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_contracts import backward, gradients, make, residuals

import gradq
from gradq.testing import run_ranks

SPEC = {"int4+int4": {"collective": "two_phase"}, "int4": {}, "int8": {}}


def trained(rank: int, spec: str, steps: int, options: dict):
    model = make()
    handle = gradq.compress(model, spec, **SPEC.get(spec, {}), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(steps):
        backward(model, rank, step)
        optimizer.step()
    return model, handle, optimizer


def save(rank: int, folder: str, spec: str, options: dict):
    """Train 5 steps, save, train 4 more."""
    model, handle, optimizer = trained(rank, spec, 5, options)
    dcp.save({"model": model.module.state_dict(), "gradq": handle.state_dict()}, checkpoint_id=folder)
    saved = residuals(handle)
    history = []
    for step in range(5, 9):
        backward(model, rank, step)
        optimizer.step()
        history.append(gradients(model.module))
    handle.close()
    return saved, history, {name: p.detach() for name, p in model.module.named_parameters()}


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def resume(rank: int, folder: str, spec: str, options: dict, bucket_cap_mb: float = 0.02):
    """Load into a fresh model and train the same 4 steps."""
    records = Records()
    logging.getLogger("gradq").addHandler(records)
    model = make(bucket_cap_mb)
    handle = gradq.compress(model, spec, **SPEC.get(spec, {}), **options)
    weights = {"model": model.module.state_dict()}
    dcp.load(weights, checkpoint_id=folder)
    gradq.load_checkpoint(handle, folder)
    loaded, step = residuals(handle), handle.sync.step
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    history = []
    for index in range(5, 9):
        backward(model, rank, index)
        optimizer.step()
        history.append(gradients(model.module))
    handle.close()
    return loaded, step, history, {n: p.detach() for n, p in model.module.named_parameters()}, records.lines


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("options", [{}, {"residual_dtype": "bf16"}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("spec", SPEC)
def test_resume_continues_bit_for_bit(tmp_path: Path, spec: str, options: dict) -> None:
    before = run_ranks(save, 3, str(tmp_path / "c"), spec, options)
    after = run_ranks(resume, 3, str(tmp_path / "c"), spec, options, 0.001)  # with other buckets, too
    for (saved, history, weights), (loaded, step, replayed, resumed, lines) in zip(
        before, after, strict=True
    ):
        assert step == 5
        assert equal(saved, loaded)
        assert (len(saved) > 0) == (spec != "int8")
        for want, got in zip(history, replayed, strict=True):
            assert equal(want, got)
        assert equal(weights, resumed)
        assert not lines
    if spec != "int8":
        assert not equal(before[0][0], before[1][0]), "ranks have residuals of their own; the test saw one"


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_resume_on_other_ranks_takes_the_mean_and_says_so(tmp_path: Path, world_size: int) -> None:
    before = run_ranks(save, 3, str(tmp_path / "c"), "int4+int4", {})
    means = {
        name: torch.stack([saved[name] for saved, _, _ in before]).mean(0)
        for name in before[0][0]
        if name.startswith("local")
    }
    for loaded, step, history, weights, lines in run_ranks(
        resume, world_size, str(tmp_path / "c"), "int4+int4", {}
    ):
        assert step == 5
        if world_size > 1:
            assert equal(loaded, means)
        assert len(lines) == 1
        assert f"resumed on {world_size} ranks from 3 at step 5" in lines[0]
        assert "mean" in lines[0]
        assert len(history) == 4
        assert all(torch.isfinite(weight).all() for weight in weights.values())


def other_spec(rank: int, folder: str):
    return resume(rank, folder, "int8", {})


def test_resume_with_a_spec_that_has_no_feedback_says_what_it_drops(tmp_path: Path) -> None:
    run_ranks(save, 2, str(tmp_path / "c"), "int4", {})
    for loaded, step, _, _, lines in run_ranks(other_spec, 2, str(tmp_path / "c")):
        assert not loaded
        assert step == 5
        assert any("dropped" in line and "2 parameters" in line for line in lines)


def full_tensors(rank: int):
    """Full tensors load on every rank; one rank's rows are refused on the others."""
    _, handle, _ = trained(rank, "int4", 3, {})
    state = handle.state_dict()
    whole = {
        key: {name: row.full_tensor() for name, row in value.items()}
        if isinstance(value, dict)
        else (value.full_tensor() if key == "rank" else value)
        for key, value in state.items()
    }
    buffer = io.BytesIO()
    torch.save(whole, buffer)
    buffer.seek(0)
    want = residuals(handle)
    handle.sync.feedback.local.clear()
    handle.load_state_dict(torch.load(buffer))
    assert equal(residuals(handle), want)

    rows = [None]
    if rank == 0:
        rows = [state]
    torch.distributed.broadcast_object_list(rows)
    try:
        handle.load_state_dict(rows[0])
        message = ""
    except gradq.CheckpointError as error:
        message = str(error)
    handle.close()
    return message


def test_full_tensors_load_and_another_ranks_rows_do_not() -> None:
    first, second = run_ranks(full_tensors, 2)
    assert first == ""
    assert "rank 1 was given the residuals of rank 0" in second


def wrong(rank: int, folder: str, what: str) -> str:
    model = make(width=71 if what == "model" else 70)
    handle = gradq.compress(model, "int4")
    try:
        if what == "key":
            gradq.load_checkpoint(handle, folder, key="quant")
        elif what == "folder":
            gradq.load_checkpoint(handle, folder + "-not")
        else:
            gradq.load_checkpoint(handle, folder)
    except gradq.CheckpointError as error:
        return str(error)
    finally:
        step, kept = handle.sync.step, residuals(handle)
        handle.close()
        assert step == 0
        assert not kept
    return "no error"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("key", ["'quant'", "gradq", "model"]),
        ("folder", ["not a checkpoint"]),
        ("model", ["0.weight", "3500", "3550"]),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path: Path, what: str, words: list[str]) -> None:
    run_ranks(save, 2, str(tmp_path / "c"), "int4", {})
    for message in run_ranks(wrong, 2, str(tmp_path / "c"), what):
        for word in words:
            assert word in message, message
