"""Gradient compression for data-parallel PyTorch training: fewer bytes, same model, one line.

    model = DistributedDataParallel(model)
    handle = gradq.compress(model, "int8")

The main path, in reading order: `hooks/ddp.py`, `sync/gradient_sync.py`, `collectives/direct.py`,
`collectives/two_phase.py`, `codecs/uniform/codec.py`, `codecs/uniform/reference.py`.

Errors are in `gradq.errors`, policies in `gradq.policy`, figures in `gradq.metrics`; what these list in
`__all__` can be reached as `gradq.<name>` too.
"""

from __future__ import annotations

from typing import Any

from gradq import errors, metrics, policy
from gradq.checkpoint import load_newest, save_checkpoint
from gradq.errors import GradqError
from gradq.hooks.compress import compress
from gradq.hooks.ddp import HookState, hook
from gradq.hooks.handle import load_checkpoint
from gradq.local_steps.local_sgd import DiLoCo, LocalSGD
from gradq.metrics import Stats
from gradq.options import Options
from gradq.policy import BitAllocation, MixedPolicy, Spec

__version__ = "0.1.0"

__all__ = [
    "BitAllocation",
    "DiLoCo",
    "GradqError",
    "HookState",
    "LocalSGD",
    "MixedPolicy",
    "Options",
    "Spec",
    "Stats",
    "compress",
    "hook",
    "load_checkpoint",
    "load_newest",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    """A public name of one of the modules below, such as `gradq.SpecError`.

    Raises:
        AttributeError: none of them has it.
    """
    for module in (errors, policy, metrics):
        if name in module.__all__:
            return getattr(module, name)
    raise AttributeError(f"module 'gradq' has no attribute {name!r}")
