"""The wheel that people install: built here, put into an empty environment, used outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TRAIN = """
import pathlib, sys, torch
import gradq
from gradq.testing import run_ranks


def train(rank):
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(64, 64))
    handle = gradq.compress(model, "int8")
    for step in range(2):
        model(torch.full((2, 64), rank + 1.0)).square().mean().backward()
    ratio = handle.stats().ratio
    handle.close()
    return ratio, model.module.weight.grad


if __name__ == "__main__":
    assert pathlib.Path(gradq.__file__).is_relative_to(sys.prefix), gradq.__file__
    (ratio, first), (_, second) = run_ranks(train, 2, timeout=400)
    assert ratio > 3 and torch.equal(first, second)
    print("trained")
"""


def run(command: list[str], cwd: Path, **variables: str) -> str:
    """Run a command without this environment's variables for Python."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_works_in_an_empty_environment(tmp_path: Path) -> None:
    """Of the environment around it sees torch, numpy and numba, but no gradq and no checkout."""
    run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", ".", str(ROOT)],
        tmp_path,
    )
    (wheel,) = tmp_path.glob("gradq-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "gradq/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "examples"))]
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "gradq").rglob("*.py")}
    assert sources <= set(names), f"the wheel lacks {sorted(sources - set(names))[:5]}"

    run([sys.executable, "-m", "venv", "--without-pip", "empty"], tmp_path)
    python = tmp_path / "empty" / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        str(wheel),
    ]
    run(pip, tmp_path)
    (packages,) = (tmp_path / "empty" / "lib").glob("python*/site-packages")
    # as a line of a .pth file, a folder's own .pth files, such as that of an editable gradq, are not read
    (packages / "around.pth").write_text(sysconfig.get_path("purelib") + "\n")

    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "train.py").write_text(TRAIN)
    assert "trained" in run([str(python), "train.py"], outside, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    assert "gradq" in run([str(tmp_path / "empty" / "bin" / "gradq"), "--version"], outside)
