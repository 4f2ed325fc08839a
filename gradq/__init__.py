"""Gradient compression for data-parallel PyTorch training: fewer bytes, same model, one line.

    model = DistributedDataParallel(model)
    handle = gradq.compress(model, "int4")

The main path, in reading order: `hooks/ddp.py`, `sync.py`, `collectives/direct.py`,
`collectives/two_phase.py`, `codecs/uniform.py`, `kernels/reference.py`.
"""

from __future__ import annotations

from gradq.checkpoint import load_checkpoint
from gradq.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    ExportError,
    GradqError,
    KernelError,
    MismatchError,
    NonFiniteError,
    PeerError,
    QuantError,
    SpecError,
    TraceError,
    UnsupportedError,
    VerifyError,
    WireError,
)
from gradq.hooks.ddp import HookState, compress, hook
from gradq.metrics import Event, ParameterStats, Stats
from gradq.policy import Assignment, FixedPolicy, ParameterInfo, Spec

__version__ = "0.1.0"

__all__ = [
    "Assignment",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "Event",
    "ExportError",
    "FixedPolicy",
    "GradqError",
    "HookState",
    "KernelError",
    "MismatchError",
    "NonFiniteError",
    "ParameterInfo",
    "ParameterStats",
    "PeerError",
    "QuantError",
    "Spec",
    "SpecError",
    "Stats",
    "TraceError",
    "UnsupportedError",
    "VerifyError",
    "WireError",
    "compress",
    "hook",
    "load_checkpoint",
]
