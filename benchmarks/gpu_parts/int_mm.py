"""Exported INT8 programs on `torch._int_mm` beside the integer reference on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from gpu_parts.setting import Setting

__all__ = ["int_mm"]

TESTS = Path(__file__).parents[2] / "tests" / "gpu"


def int_mm(setting: Setting) -> None:
    """The check of tests/gpu/test_int_mm.py for every kind of activations, also at one row.

    Raises:
        AssertionError: a program is off.
    """
    sys.path.insert(0, str(TESTS))
    import test_int_mm as check

    wrong = []
    for activations in check.ACTIVATIONS:
        for rows, error in check.errors(activations, setting.device.type).items():
            setting.add(activations=activations, rows=rows, relative_error=error)
            wrong += [] if error < check.TOLERANCE else [f"{activations} at {rows} rows is {error:.1e} off"]
    if not setting.dry_run:
        torch.cuda.synchronize()
    assert not wrong, wrong
