"""Programs as a user starts them: bounded in time, with nothing of them left alive."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from gradq.testing import RankError


def run_program(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout: float
) -> tuple[int, str]:
    """Run a command to its end; returns its exit code and what it printed.

    Raises:
        RankError: the time was up; the command and all that it has started were killed.
    """
    process = subprocess.Popen(
        command, env=os.environ | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process.pid)
        output, _ = process.communicate()
        raise RankError(f"{command}: no end after {timeout} s:\n{output}") from None
    return process.returncode, output


def kill(pid: int) -> None:
    """Kill a process and all that it has started, in sessions of their own too."""
    pids = [pid]
    for parent in pids:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                pids += [int(child) for child in children.read_text().split()]
    for each in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
