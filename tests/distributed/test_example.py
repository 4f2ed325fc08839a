"""examples/train_gpt.py as a user runs it: torchrun, 2 ranks, logs, checkpoints."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "train_gpt.py"
TINY = ["--params=tiny", "--steps=20", "--lr=4e-3", "--log-every=5", "--eval-every=5", "--quiet"]


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def train(*options: str, num_ranks: int = 2, timeout: float = 100) -> str:
    """Run the example to its end and return what it printed; nothing of it is left alive."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(
        [sys.executable, *start, str(SCRIPT), *TINY, *options],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for pid in [*children(process.pid), process.pid]:
            os.kill(pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"no end after {timeout} s: {output}")
    assert process.returncode == 0, output
    return output


def read(log: Path, kind: str) -> list[dict]:
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [record for record in records if record["record"] == kind]


def curve(log: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["val_loss"]) for r in read(log, "step")]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("codec", [pytest.param("none", marks=pytest.mark.slow), "int4"])
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, codec):
    whole, resumed, folder = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl", tmp_path / "checkpoints"
    options = [f"--codec={codec}", "--accumulate=2", f"--checkpoint={folder}"]
    options += [] if codec == "none" else ["--codec-start=2"]
    output = train(*options, f"--log-file={whole}", "--checkpoint-every=10")
    assert [path.name for path in sorted(folder.iterdir())] == ["step-00000010", "step-00000020"]
    shutil.rmtree(folder / "step-00000020")  # as if the run had been killed after step 10
    output += train(*options, f"--log-file={resumed}", "--resume")
    assert curve(resumed) == curve(whole)[2:]
    assert output == "", "a --quiet run printed something"

    (header,), (summary,) = read(whole, "header"), read(whole, "summary")
    assert header["config"]["codec"] == codec
    assert header["environment"]["world_size"] == 2
    steps = read(whole, "step")
    assert [record["step"] for record in steps] == [5, 10, 15, 20]
    assert steps[-1]["val_loss"] == summary["val_loss"] < steps[0]["val_loss"] - 0.5
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    dense = 2 * 4 * header["num_parameters"] // 2 * 20  # a ring over 2 ranks sends every gradient once
    assert summary["stats"]["dense_bytes"] == pytest.approx(dense, rel=1e-3)
    ratio = summary["stats"]["dense_bytes"] / summary["stats"]["wire_bytes"]
    assert ratio == 1 if codec == "none" else 6 < ratio < 8
    assert all(earlier["wire_bytes"] < later["wire_bytes"] for earlier, later in itertools.pairwise(steps))


@pytest.fixture(scope="module")
def train_gpt():
    spec = importlib.util.spec_from_file_location("train_gpt", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_presets_have_the_size_of_their_name(train_gpt):
    for name in ("1m", "5m", "10m", "25m"):
        size = sum(p.numel() for p in train_gpt.build(name).parameters())
        assert size == pytest.approx(int(name[:-1]) * 1e6, rel=0.1)
    with pytest.raises(ValueError, match="choose from tiny, 1m"):
        train_gpt.build("3m")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--params", "3m"], "choose from"),
        (["--steps", "0"], "steps is 0; it must be at least 1"),
        (["--resume"], "need --checkpoint DIR"),
        (["--resume", "--checkpoint", "nowhere"], "no finished checkpoint in nowhere"),
        (["--steps", "10", "--stop-at", "11"], "beyond --steps 10"),
    ],
)
def test_bad_options_are_explained(train_gpt, monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *options])
    with pytest.raises(SystemExit):
        train_gpt.parse_args()
    assert message in capsys.readouterr().err


def test_no_text_is_an_error(train_gpt, monkeypatch, tmp_path):
    monkeypatch.setattr("gradq.bench.data.sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match="no text to train on"):
        train_gpt.load_text()
