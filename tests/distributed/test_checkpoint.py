"""Checkpoints through torch.distributed.checkpoint: the same ranks, other ranks, and wrong ones."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_contracts import backward, gradients, make, residuals

import gradq
import gradq.checkpoint.state
from gradq.testing import run_ranks

FORMAT_1 = Path(__file__).parents[1] / "fixtures/checkpoint_format_1"

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


# --- rank 0 saves alone ----------------------------------------------------------------------------------


def own_rows(state: dict):
    """What a pickle of this rank's state would hold: the rows as plain tensors."""
    return {
        key: own_rows(value) if isinstance(value, dict) else getattr(value, "to_local", lambda v=value: v)()
        for key, value in state.items()
    }


def rank_0_saves(rank: int, folder: str):
    """torch.save refuses the state of one rank, and takes what is gathered."""
    _, handle, _ = trained(rank, "int4+int4", 3, {})
    want, refusals = residuals(handle), []
    state = handle.state_dict()
    for attempt in (lambda: torch.save({"gradq": state}, io.BytesIO()), lambda: pickle.dumps(state)):
        try:
            attempt()
        except gradq.CheckpointError as error:
            refusals.append(str(error))
    copied = copy.deepcopy(state)
    handle.sync.feedback.local.clear()
    handle.load_state_dict(copied)
    assert equal(residuals(handle), want)

    gathered = handle.gathered_state_dict()
    if rank == 0:
        torch.save({"gradq": gathered}, folder + "/state.pt")
    torch.distributed.barrier()
    handle.sync.feedback.local.clear()
    handle.load_state_dict(torch.load(folder + "/state.pt", weights_only=True)["gradq"])
    assert equal(residuals(handle), want)

    handle.load_state_dict(own_rows(state))  # a file for each rank of its own
    assert equal(residuals(handle), want)
    one = [own_rows(state) if rank == 0 else None]
    torch.distributed.broadcast_object_list(one)
    try:
        handle.load_state_dict(one[0])
        message = ""
    except gradq.CheckpointError as error:
        message = str(error)
    assert equal(residuals(handle), want)
    handle.close()
    return want, refusals, list(gathered), message


def load_gathered(rank: int, folder: str):
    handle = gradq.compress(make(), "int4+int4", collective="two_phase")
    handle.load_state_dict(torch.load(folder + "/state.pt", weights_only=True)["gradq"])
    loaded, step = residuals(handle), handle.sync.step
    handle.close()
    return loaded, step


def test_rank_0_can_save_what_was_gathered_and_nothing_less(tmp_path: Path) -> None:
    saved = run_ranks(rank_0_saves, 2, str(tmp_path))
    for rank, (_, refusals, keys, message) in enumerate(saved):
        assert len(refusals) == 2
        assert all("gathered_state_dict()" in text and "dcp.save" in text for text in refusals)
        assert bool(keys) == (rank == 0)
        assert "rank 1 was given the residuals of rank 0" in message, "every rank must hear it"
    means = {
        name: (saved[0][0][name] + saved[1][0][name]) / 2 for name in saved[0][0] if name.startswith("local")
    }
    for loaded, step in run_ranks(load_gathered, 3, str(tmp_path)):
        assert step == 3
        assert equal(loaded, means)


# --- what does not fit ------------------------------------------------------------------------------------


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


def wrong_arguments(rank: int, folder: str) -> list[str]:
    model = make()
    handle = gradq.compress(model, "int4")
    messages = []
    for arguments in (
        (model, folder),
        (folder, handle),
        (handle.state_dict(), folder),
        (handle, None),
        (handle, handle),
        (handle, folder, 3),
    ):
        try:
            gradq.load_checkpoint(*arguments)
        except gradq.GradqError as error:
            messages.append(f"{type(error).__name__}: {error}")
    handle.close()
    return messages


def test_wrong_arguments_are_told_what_to_pass(tmp_path: Path) -> None:
    for messages in run_ranks(wrong_arguments, 2, str(tmp_path)):
        assert len(messages) == 6
        for message, what in zip(messages[:3], ("DistributedDataParallel", "str", "RowsState"), strict=True):
            assert message.startswith("UnsupportedError: gradq.load_checkpoint(handle, folder)")
            assert f"got {what}" in message
        assert all("checkpoint_id must be the folder" in message for message in messages[3:5])
        assert "key must be the name" in messages[5]


# --- other plans, models and names ------------------------------------------------------------------------


def load_into(rank: int, folder: str, jobs: list[tuple[str, str]]):
    """The messages of loading into other models and specs."""
    told = []
    for spec, model in jobs:
        records = Records()
        logging.getLogger("gradq").addHandler(records)
        module = make().module
        if model == "frozen":
            module[0].weight.requires_grad_(False)
        elif model == "renamed":
            module.register_module("new", module[2])
            module.register_module("2", torch.nn.Identity())
            module.forward = lambda x, m=module: m[4](torch.tanh(m.new(torch.tanh(m[0](x)))))
        elif model == "other":
            module = torch.nn.ModuleDict({"x": torch.nn.Linear(50, 70)})
        elif model == "compiled":
            inner = module[0]
            wrapper = torch.nn.Module()
            wrapper._orig_mod = inner
            wrapper.forward = inner.forward
            module[0] = wrapper
        handle = gradq.compress(torch.nn.parallel.DistributedDataParallel(module), spec)
        try:
            gradq.load_checkpoint(handle, folder)
        except gradq.CheckpointError as error:
            records.lines.append(str(error))
        told.append((records.lines, residuals(handle)))
        handle.close()
        logging.getLogger("gradq").removeHandler(records)
    return told


def test_other_plans_models_and_names_are_spoken_of(tmp_path: Path) -> None:
    before = run_ranks(save, 2, str(tmp_path / "c"), "int4", {})
    models = ["frozen", "renamed", "other", "compiled"]
    jobs = [("int8", ""), ("int3", ""), *(("int4", model) for model in models)]
    for (saved, _, _), told in zip(before, run_ranks(load_into, 2, str(tmp_path / "c"), jobs), strict=True):
        (int8, kept8), (int3, kept3), (frozen, kept), (renamed, _), (other, none), (compiled, same) = told
        assert any("'int8' from a state of 'int4'" in line and "2 parameters" in line for line in int8)
        assert any("dropped" in line for line in int8)
        assert not kept8
        assert len(int3) == 1
        assert "'int3' from a state of 'int4'" in int3[0]
        assert "2 keep it" in int3[0]
        assert equal(kept3, saved)
        assert any("1 parameters (0.weight, ...) are not in this model (frozen" in line for line in frozen)
        assert equal(kept, {"local 2.weight": saved["local 2.weight"]})
        assert any("(2.weight, ...) are not in this model" in line for line in renamed)
        assert any("(new.weight, ...) have no saved local residual" in line for line in renamed)
        assert len(other) == 1
        assert "of another model" in other[0]
        assert not none
        assert not compiled
        assert [value.tolist() for value in same.values()] == [value.tolist() for value in saved.values()]


def load_format_1(rank: int, prefix: str):
    records = Records()
    logging.getLogger("gradq").addHandler(records)
    module = torch.nn.Sequential(torch.nn.Linear(33, 35), torch.nn.Tanh(), torch.nn.Linear(35, 31))
    handle = gradq.compress(
        torch.nn.parallel.DistributedDataParallel(module), "int4+int4", collective="two_phase"
    )
    gradq.load_checkpoint(handle, FORMAT_1)
    found, step = residuals(handle), handle.sync.step
    handle.close()
    return found, step, records.lines


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_checkpoint_of_the_first_format_loads(world_size: int) -> None:
    saved = torch.load(FORMAT_1 / "residuals.pt", weights_only=True)
    for rank, (found, step, lines) in enumerate(run_ranks(load_format_1, world_size, "")):
        assert step == 3
        if world_size == 2:
            assert equal({name.replace(" ", ".", 1): value for name, value in found.items()}, saved[rank])
            assert not lines
        else:
            assert len(found) == 2
            for name, value in found.items():
                assert torch.equal(
                    value, (saved[0][name.replace(" ", ".", 1)] + saved[1][name.replace(" ", ".", 1)]) / 2
                )


# --- ways to save -----------------------------------------------------------------------------------------


def ways(rank: int, folder: str):
    """Through many flats, async_save, Stateful, and a loaded template."""
    gradq.checkpoint.state.FLAT_NUMEL = 1000
    _, handle, _ = trained(rank, "int4+int4", 3, {})
    want = residuals(handle)
    dcp.save({"gradq": handle.state_dict(), "other": {"step": 3}}, checkpoint_id=f"{folder}/flats")
    gradq.checkpoint.state.FLAT_NUMEL = 1 << 22
    dcp.async_save({"gradq": handle.state_dict()}, checkpoint_id=f"{folder}/async").result()
    dcp.save({"gradq": handle}, checkpoint_id=f"{folder}/stateful")
    for way in ("flats", "async", "stateful"):
        handle.sync.feedback.local.clear()
        gradq.load_checkpoint(handle, f"{folder}/{way}")
        assert equal(residuals(handle), want), way
    handle.sync.feedback.local.clear()
    dcp.load({"gradq": handle}, checkpoint_id=f"{folder}/stateful")
    assert equal(residuals(handle), want)
    state = {"gradq": handle.state_dict()}
    handle.sync.feedback.local.clear()
    dcp.load(state, checkpoint_id=f"{folder}/async")
    handle.load_state_dict(state["gradq"])
    assert equal(residuals(handle), want)
    names = len(dcp.FileSystemReader(f"{folder}/flats").read_metadata().state_dict_metadata)
    handle.close()
    return want, names


def load_flats(rank: int, folder: str):
    handle = gradq.compress(make(), "int4+int4", collective="two_phase")
    gradq.load_checkpoint(handle, f"{folder}/flats")
    found = residuals(handle)
    handle.close()
    return found


def test_every_way_to_save_is_a_way_to_load(tmp_path: Path) -> None:
    saved = run_ranks(ways, 2, str(tmp_path))
    assert saved[0][1] > 12, "the residuals were not cut into flats"
    for found in run_ranks(load_flats, 3, str(tmp_path)):
        assert equal(found, {n: (v + saved[1][0][n]) / 2 for n, v in saved[0][0].items() if n[0] == "l"})


def one_rank_saves(rank: int, folder: str):
    """What every rank hears where rank 0 alone has saved, or alone has what was gathered."""
    _, handle, _ = trained(rank, "int4", 2, {})
    state = handle.state_dict()
    if rank == 0:
        dcp.save({"gradq": state}, checkpoint_id=folder, no_dist=True)
    torch.distributed.barrier()
    heard = []
    gathered = handle.gathered_state_dict()
    for load in (lambda: gradq.load_checkpoint(handle, folder), lambda: handle.load_state_dict(gathered)):
        with pytest.raises(gradq.GradqError) as caught:
            load()
        heard.append(str(caught.value))
    step = handle.sync.step
    handle.close()
    return heard, step


def test_what_one_rank_alone_saved_or_holds_is_refused(tmp_path: Path) -> None:
    for (rows, empty), step in run_ranks(one_rank_saves, 2, str(tmp_path / "c")):
        assert "has the rows of some ranks only" in rows
        assert "gathered_state_dict()" in rows
        assert "the saved state is empty" in empty
        assert step == 2
    for message in run_ranks(wrong, 3, str(tmp_path / "c"), ""):
        assert "has the rows of some ranks only" in message
