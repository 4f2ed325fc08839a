"""The examples for Lightning, Accelerate and the Hugging Face Trainer, in those that are installed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from programs import run_program

EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
HOW = {
    "accelerate": ("accelerate_gpt.py", TORCHRUN),
    "lightning": ("lightning_gpt.py", ()),
    "transformers": ("hf_trainer.py", TORCHRUN),
}


@pytest.mark.slow
@pytest.mark.parametrize("package", HOW)
def test_a_trainer_learns_with_a_quarter_of_the_bytes(package: str) -> None:
    pytest.importorskip(package, reason="pip install 'gradq[trainers]'")
    script, start = HOW[package]
    options = ["--params=tiny", "--steps=40", "--lr=4e-3", "--log-every=10", "--codec=int8"]
    command = [sys.executable, *start, str(EXAMPLES / script), *options]
    code, shown = run_program(command, env={"OMP_NUM_THREADS": "1"}, timeout=110)
    assert code == 0, shown
    ratio = re.search(r"<gradq int8 over 2 ranks, .*?([\d.]+)x", shown)
    assert ratio is not None, shown
    assert float(ratio[1]) > 2.5
    losses = [float(loss) for loss in re.findall(r"'?loss'?:? '?([\d.]+)", shown)]
    assert len(losses) >= 4, shown
    assert losses[3] < losses[0] - 0.3, shown
