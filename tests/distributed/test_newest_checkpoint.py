"""Whole checkpoints: written aside and renamed, and the newest good one of several is found."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from test_checkpoint import Records, equal
from test_contracts import backward, make, residuals

import gradq
from gradq.testing import run_ranks


def save_three(rank: int, folder: str):
    """Three checkpoints, and two that cannot be saved."""
    model = make()
    handle = gradq.compress(model, "int4")
    states, messages = [], []
    for step in range(3):
        backward(model, rank, step)
        state = {"model": model.module.state_dict(), "gradq": handle.state_dict()}
        gradq.save_checkpoint(state, f"{folder}/step-{step + 1}")
        states.append(residuals(handle))
    bad = state | {"other": {f"{rank}": (lambda: 0) if rank else 0}}  # cannot be pickled on rank 1
    (Path(folder) / "file").touch()
    torch.distributed.barrier()
    for what, name in ((state, "step-3"), (state, "file/step-4"), (bad, "step-5")):
        try:
            gradq.save_checkpoint(what, f"{folder}/{name}")
        except gradq.CheckpointError as error:
            messages.append(str(error))
    handle.close()
    return states, messages


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def load_thrice(rank: int, folder: str):
    """Load the newest: when all are good, when two are damaged, and when none is good."""
    records = Records()
    logging.getLogger("gradq").addHandler(records)
    model = make()
    handle = gradq.compress(model, "int4")
    at, found = Path(folder), []

    def load(path: Path) -> None:
        dcp.load({"model": model.module.state_dict()}, checkpoint_id=path)
        gradq.load_checkpoint(handle, path)

    assert gradq.load_newest(at / "nothing here", load) is None
    for turn in range(3):
        if turn == 1 and rank == 0:
            flip(weights := at / "step-3" / "__0_0.distcp", weights.stat().st_size // 3)
            (torn := at / "step-2" / "__1_0.distcp").write_bytes(torn.read_bytes()[:-9])
        if turn == 2 and rank == 0:
            (at / "step-1" / ".metadata").unlink()
        torch.distributed.barrier()
        try:
            path = gradq.load_newest(folder, load)
            told = path.name
        except gradq.CheckpointError as error:
            told = str(error)
        found.append((told, handle.sync.step, residuals(handle), list(records.lines)))
        records.lines.clear()
    if rank == 0:
        flip(metadata := at / "step-2" / ".metadata", metadata.stat().st_size // 2)
    torch.distributed.barrier()
    try:
        gradq.load_checkpoint(handle, at / "step-2")
    except gradq.CheckpointError as error:
        found.append(str(error))
    handle.close()
    return found


def test_the_newest_good_checkpoint_is_loaded_and_the_others_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    saved = run_ranks(save_three, 2, str(folder))
    for _, messages in saved:
        assert len(messages) == 3
        assert "exists already" in messages[0]
        assert "cannot save" in messages[1] or "NotADirectory" in messages[1]
        assert "step-5" in messages[2]
    names = sorted(path.name for path in folder.iterdir())
    assert names == [".step-5.partial", "file", "step-1", "step-2", "step-3"]

    loaded = run_ranks(load_thrice, 2, str(folder))
    for (states, _), (good, damaged, none, metadata) in zip(saved, loaded, strict=True):
        assert good[:2] == ("step-3", 3)
        assert equal(good[2], states[2])
        assert not good[3]
        assert damaged[:2] == ("step-1", 1)
        assert equal(damaged[2], states[0])
        first, second, last = damaged[3]
        assert "step-3/__0_0.distcp is not as it was saved" in first
        assert "step-2/__1_0.distcp" in second
        assert "it is torn" in second
        assert "resumed from" in last
        assert "step-1" in last
        assert "none of the 3 checkpoints" in none[0]
        assert equal(none[2], states[0]), "nothing was changed"
        assert "step-2/.metadata is not as it was saved" in metadata
