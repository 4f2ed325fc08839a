"""Gradient compression for data-parallel PyTorch training: fewer bytes, same model, one line.

    model = DistributedDataParallel(model)
    handle = gradq.compress(model, "int4")

The main path, in reading order: `hooks/ddp.py`, `sync.py`, `collectives/direct.py`,
`collectives/two_phase.py`, `codecs/uniform/codec.py`, `codecs/uniform/reference.py`.
"""

from __future__ import annotations

from gradq.checkpoint import load_checkpoint, load_newest, save_checkpoint
from gradq.errors import (
    BenchError,
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
from gradq.local_steps.local_sgd import DiLoCo, LocalSGD
from gradq.metrics import Event, ParameterStats, Stats
from gradq.policy import (
    Assignment,
    BitAllocation,
    FixedPolicy,
    GradientStatistics,
    MixedPolicy,
    ParameterInfo,
    Spec,
    allocate_bits,
)

__version__ = "0.1.0"

__all__ = [
    "Assignment",
    "BenchError",
    "BitAllocation",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "DiLoCo",
    "Event",
    "ExportError",
    "FixedPolicy",
    "GradientStatistics",
    "GradqError",
    "HookState",
    "KernelError",
    "LocalSGD",
    "MismatchError",
    "MixedPolicy",
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
    "allocate_bits",
    "compress",
    "hook",
    "load_checkpoint",
    "load_newest",
    "save_checkpoint",
]
