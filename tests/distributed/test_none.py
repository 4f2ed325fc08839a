"""The spec "none": whatever plain DistributedDataParallel averages, gradq leaves as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradq
from gradq.testing import run_ranks


class Odd(nn.Module):
    """Sparse gradients and complex parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(50, 4, sparse=True)
        self.bag = nn.EmbeddingBag(20, 4, sparse=True, mode="sum")
        self.wave = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.words(x).mean(1) + self.bag(x % 20)
        return self.out(hidden * self.wave.abs() + self.wave.angle())


def gradients(rank, compressed):
    model = DistributedDataParallel(Odd())
    handle = gradq.compress(model, "none") if compressed else None
    found = []
    for step in range(3):
        model.zero_grad()
        x = torch.randint(0, 50, (6, 3), generator=torch.Generator().manual_seed(10 * step + rank))
        model(x).square().sum().backward()
        found += [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in model.parameters()]
    if handle is not None:
        assert handle.stats().steps == 3
        assert handle.stats().wire_bytes == handle.stats().dense_bytes > 0
        with pytest.raises(gradq.UnsupportedError, match="sparse"):
            gradq.compress(DistributedDataParallel(Odd()), "int8")
    return [gradient.clone() for gradient in found]


def both(rank):
    return gradients(rank, False), gradients(rank, True)


def test_what_cannot_be_compressed_can_be_left_alone():
    for plain, ours in run_ranks(both, 2, timeout=240):
        assert len(plain) == len(ours) == 15
        for one, other in zip(plain, ours, strict=True):
            torch.testing.assert_close(one, other)
