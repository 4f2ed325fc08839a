"""The codecs on other processors, as far as they can be had here: older ones, and without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("test_wire_fixtures.py", "test_codecs.py", "test_kernels.py", "test_rotated.py", "test_topk.py",
         "test_low_rank.py")  # fmt: skip
# what a Haswell and a Nehalem have; a name alone leaves Numba the features of this machine
HASWELL = "+avx2,+avx,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe,+popcnt,+sse4.2,+sse4.1,+ssse3,+sse3,+sse2"
NEHALEM = "+popcnt,+sse4.2,+sse4.1,+ssse3,+sse3,+sse2"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "setting",
    [
        {"GRADQ_KERNELS": "reference"},
        {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": HASWELL},
        {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": NEHALEM},
    ],
    ids=["reference", "haswell", "nehalem"],
)
def test_codecs_are_the_same_on_other_processors(setting: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--timeout", "1800"]
        + [f"tests/unit/{file}" for file in FILES],
        cwd=ROOT,
        env=os.environ | setting | {"NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=3500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
