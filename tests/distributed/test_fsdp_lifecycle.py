"""FSDP2 models with a handle: copied, pickled, compiled, frozen between two runs, dropped."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import gradq
from gradq.testing import run_ranks


def build(freeze: bool = False) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(40, 40) for _ in range(3)])
    if freeze:
        model[0].requires_grad_(False)
    for layer in model:
        fully_shard(layer)
    return fully_shard(model)


def backward(model: Callable[[Tensor], Tensor], rank: int, step: int) -> None:
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(9 * step + rank))
    model(x).square().mean().backward()


def copied(rank: int) -> list[list[str]]:
    """What copying, pickling and saving do: of a plain model, and of one with a handle."""
    outcomes = []
    for is_compressed in (False, True):
        model = build()
        handle = gradq.compress(model, "int4", feedback=True) if is_compressed else None
        backward(model, rank, 0)
        rows = []
        for do in (
            lambda model=model: copy.deepcopy(model),
            lambda model=model: torch.save(model, io.BytesIO()),
            lambda model=model: torch.save(model.state_dict(), io.BytesIO()),
        ):
            try:
                rows.append(f"{type(do()).__name__}")
            except Exception as error:
                rows.append(f"{type(error).__name__}: {str(error)[:60]}")
        outcomes.append(rows)
        if handle is not None:
            handle.close()
    return outcomes


def test_copies_do_what_they_do_without_gradq() -> None:
    """torch refuses to copy FSDP2 modules whole; state_dict() is its way."""
    for plain, compressed in run_ranks(copied, 2):
        assert plain == compressed
        assert plain[2] == "NoneType"


def frozen_since(rank: int, folder: str, before: bool, after: bool) -> tuple[dict[str, bool], int]:
    model = build(before)
    handle = gradq.compress(model, "int4", feedback=True)
    for step in range(3):
        backward(model, rank, step)
    dcp.save({"gradq": handle.state_dict()}, checkpoint_id=folder)
    local = handle.sync.feedback.local
    saved = {name: local.current(name).clone() for name in local.names()}
    handle.close()
    model = build(after)
    handle = gradq.compress(model, "int4", feedback=True)
    gradq.load_checkpoint(handle, folder)
    local = handle.sync.feedback.local
    same = {name: torch.equal(local.current(name), saved[name]) for name in local.names() if name in saved}
    backward(model, rank, 3)
    step = handle.sync.step
    handle.close()
    return same, step


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False)])
def test_states_load_after_freezing_and_unfreezing(tmp_path: Path, before: bool, after: bool) -> None:
    for same, step in run_ranks(frozen_since, 2, str(tmp_path / "c"), before, after):
        assert {"1.weight", "2.weight"} <= same.keys()
        assert all(same.values())
        assert step == 4


def compiled(rank: int) -> tuple[bool, int]:
    models = [build(), build()]
    handle = gradq.compress(models[1], "fp32")
    for model in models:
        fast = torch.compile(model, backend="eager")
        for step in range(2):
            backward(fast, rank, step)
    gradients = [[p.grad.to_local() for p in model.parameters()] for model in models]
    steps = handle.stats().steps
    handle.close()
    return all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)), steps


@pytest.mark.slow
def test_a_compiled_model_counts_steps() -> None:
    for is_equal, steps in run_ranks(compiled, 2):
        assert is_equal
        assert steps == 2


def dropped(rank: int) -> list[bool]:
    """Whether the handle and the model are gone with the last reference, without close()."""
    model = build()
    handle = gradq.compress(model, "int4", feedback=True)
    backward(model, rank, 0)
    references = [weakref.ref(handle), weakref.ref(model)]
    del model, handle
    gc.collect()
    return [reference() is None for reference in references]


def test_a_dropped_model_takes_its_handle_along() -> None:
    for gone in run_ranks(dropped, 2):
        assert gone == [True, True]
