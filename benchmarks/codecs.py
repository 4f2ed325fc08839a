"""The frontier of the codecs on gradients of the example: `gradq bench codecs` with gradients of its GPT.

    python benchmarks/codecs.py        # all codecs: results/codecs.csv, .json and .png
    python benchmarks/codecs.py --codecs rot4,rot3 --no-speed --out /tmp/frontier

The gradients: the GPT of examples/train_gpt.py (size 1m) after 60 steps of AdamW, then one batch of 16
windows a rank; its weights of two dimensions, each encoded by itself. `gradq bench codecs --help` says what
is measured.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from gradq.cli.app import run

HERE = Path(__file__).resolve().parent


def gradients(num_ranks: int, steps: int = 60) -> list[dict[str, Tensor]]:
    """Gradients of the two-dimensional weights of the GPT by name, for every rank."""
    sys.path.insert(0, str(HERE.parent / "examples"))
    from train_gpt import build, load_text

    text, _ = load_text()
    model, seq_len = build("1m", 64, 0), 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)

    def backward() -> None:
        starts = torch.randint(len(text) - seq_len - 1, (16,), generator=generator)
        windows = torch.stack([text[s : s + seq_len + 1] for s in starts.tolist()]).long()
        logits = model(windows[:, :-1])
        model.zero_grad()
        functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()

    for _ in range(steps):
        backward()
        optimizer.step()
    ranks = []
    for _ in range(num_ranks):
        backward()
        ranks.append({n: p.grad.clone() for n, p in model.named_parameters() if p.dim() > 1})
    return ranks


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = sys.argv[1:]
    out = [] if "--out" in asked else ["--out", str(HERE / "results" / "codecs")]
    source = f"{os.path.relpath(__file__)}:gradients"
    sys.exit(run(["bench", "codecs", "--gradients", source, *out, *asked]))
