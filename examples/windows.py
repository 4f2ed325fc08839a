"""The small GPT's text as a `Dataset`, for trainers that bring their own loop."""

from __future__ import annotations

import torch
import train_gpt
from torch import Tensor
from torch.utils.data import Dataset


class Windows(Dataset[Tensor]):
    """Windows [T + 1] of the text, int64; item i is a function of the seed and i.

    Args:
        count: of windows.
        seq_len: T.
        seed: which windows.
    """

    def __init__(self, count: int, seq_len: int, seed: int) -> None:
        self.text = train_gpt.load_text()[0]
        generator = torch.Generator().manual_seed(seed)
        self.starts = torch.randint(len(self.text) - seq_len, (count,), generator=generator)
        self.seq_len = seq_len

    def __len__(self) -> int:
        """How many there are."""
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        """One window."""
        start = int(self.starts[index])
        return self.text[start : start + self.seq_len + 1].long()


def loss_of(model: torch.nn.Module, window_BT: Tensor) -> Tensor:
    """Mean cross-entropy of the next byte."""
    logits_BTV = model(window_BT[:, :-1])
    return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), window_BT[:, 1:].flatten())
