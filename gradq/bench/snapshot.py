"""Checkpoints of a benchmark: all contenders' states, a file a rank. After a failure ranks agree on one.

torch's PowerSGD keys its state by bucket index, which DDP changes after the first step of a process; it
starts anew, with its two plain steps. gradq's residuals are restored, so its codecs continue bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from gradq.bench.contenders import Contender

__all__ = ["load", "save"]


def save(folder: str, rank: int, contenders: list[Contender], turn: int) -> None:
    """Write this rank's state after a number of turns; the newest two are kept."""
    state = {
        contender.name: {
            "model": contender.model.module.state_dict(),
            "optimizer": contender.optimizer.state_dict(),
            "gradq": _local(contender.handle.state_dict()) if contender.handle else None,
            "steps": contender.steps,
        }
        for contender in contenders
    }
    path = Path(folder) / f"rank{rank}-turn{turn:06d}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
    for old in _files(folder, rank)[:-2]:
        old.unlink(missing_ok=True)


def load(folder: str, rank: int, contenders: list[Contender], control: dist.ProcessGroup) -> int:
    """Restore the newest turn that every rank has. All ranks call this together.

    Returns:
        Turns done; 0 if some rank finds no file, and nothing is restored then.
    """
    own = {int(path.stem[-6:]) for path in _files(folder, rank)}
    everyones: list[set[int]] = [set()] * control.size()
    dist.all_gather_object(everyones, own, group=control)
    common = set.intersection(*everyones)
    if not common:
        return 0
    turn = max(common)
    path = Path(folder) / f"rank{rank}-turn{turn:06d}.pt"
    state = torch.load(path, weights_only=True)
    for contender in contenders:
        saved = state[contender.name]
        contender.model.module.load_state_dict(saved["model"])
        contender.optimizer.load_state_dict(saved["optimizer"])
        contender.steps = saved["steps"]
        if contender.handle:
            contender.handle.load_state_dict(saved["gradq"])
    return turn


def _files(folder: str, rank: int) -> list[Path]:
    return sorted(Path(folder).glob(f"rank{rank}-turn*.pt"))


def _local(state: Any) -> Any:
    """The state with this rank's rows in the place of sharded tensors."""
    if isinstance(state, dict):
        return {key: _local(value) for key, value in state.items()}
    return state.to_local().clone() if isinstance(state, DTensor) else state
