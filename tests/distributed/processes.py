"""The command in processes of its own, for tests that send them signals."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


# in the background of a script SIGINT is ignored, and children inherit that
_GRADQ = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from gradq.cli import main; main()"
)


def launch(options: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen:
    """The command gradq, as a terminal would start it."""
    return subprocess.Popen(
        [sys.executable, "-c", _GRADQ, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )


def end(process: subprocess.Popen, number: int, timeout: float = 60.0) -> str:
    """Send it a signal and wait; returns what it wrote to stderr. Nothing of it is left alive if it fails."""
    process.send_signal(number)
    try:
        return process.communicate(timeout=timeout)[1]
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            words = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            words = process.communicate()
        pytest.fail(f"it did not end within {timeout} s of {signal.Signals(number).name}: {words}")
