"""Gradients of the GPT of examples/train_gpt.py, for the benchmarks that measure errors on real ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from train_gpt import build, load_text

SEQ_LEN, BATCH_SIZE = 64, 16


def capture(
    stages: Sequence[int], num_ranks: int, *, params: str = "1m", seed: int = 0
) -> Iterator[tuple[int, list[dict[str, Tensor]]]]:
    """Train one replica with AdamW (lr 1e-3) and stop at some steps to take gradients.

    Args:
        stages: the steps, ascending.
        num_ranks: batches of 16 windows taken at each, one a rank, all at the same weights.
        params: size of the model.
        seed: of weights and data.

    Yields:
        The step, and for every rank the gradients [n] of the weights of two dimensions, by name.
    """
    text, _ = load_text()
    model = build(params, SEQ_LEN, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed + 1)

    def backward() -> None:
        starts = torch.randint(len(text) - SEQ_LEN - 1, (BATCH_SIZE,), generator=generator)
        windows = torch.stack([text[s : s + SEQ_LEN + 1] for s in starts.tolist()]).long()
        model.zero_grad()
        functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).backward()

    done = 0
    for stage in stages:
        for _ in range(stage - done):
            backward()
            optimizer.step()
        done = stage
        ranks = []
        for _ in range(num_ranks):
            backward()
            ranks.append({n: p.grad.flatten().clone() for n, p in model.named_parameters() if p.dim() > 1})
        yield stage, ranks
