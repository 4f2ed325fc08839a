"""Gradient compression for data-parallel PyTorch training: fewer bytes, same model, one line.

    model = DistributedDataParallel(model)
    handle = gradq.compress(model, "int4")

The main path, in reading order: `hooks/ddp.py`, `sync.py`, `collectives/direct.py`,
`collectives/two_phase.py`, `codecs/uniform.py`, `kernels/reference.py`.
"""

from __future__ import annotations

from gradq.checkpoint import load_checkpoint
from gradq.errors import (
    CheckpointError,
    ConfigError,
    GradqError,
    KernelError,
    MismatchError,
    PeerError,
    SpecError,
    UnsupportedError,
    WireError,
)
from gradq.hooks.ddp import HookState, compress, hook
from gradq.metrics import Event, ParameterStats, Stats
from gradq.policy import Assignment, FixedPolicy, ParameterInfo, Spec

__version__ = "0.1.0"

__all__ = [
    "Assignment",
    "CheckpointError",
    "ConfigError",
    "Event",
    "FixedPolicy",
    "GradqError",
    "HookState",
    "KernelError",
    "MismatchError",
    "ParameterInfo",
    "ParameterStats",
    "PeerError",
    "Spec",
    "SpecError",
    "Stats",
    "UnsupportedError",
    "WireError",
    "compress",
    "hook",
    "load_checkpoint",
]
