"""The codecs on other processors, as far as they can be had here: older ones, and without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("test_wire_fixtures.py", "test_codecs.py", "test_kernels.py", "test_rotated.py", "test_topk.py",
         "test_low_rank.py", "test_table_kernels.py")  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "setting", ["GRADQ_KERNELS=reference", "NUMBA_CPU_NAME=haswell", "NUMBA_CPU_NAME=nehalem"]
)
def test_codecs_are_the_same_on_other_processors(setting: str, tmp_path: Path) -> None:
    name, _, value = setting.partition("=")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--timeout", "1800"]
        + [f"tests/unit/{file}" for file in FILES],
        cwd=ROOT,
        env=os.environ | {name: value, "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=3500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
