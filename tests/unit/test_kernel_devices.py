"""What has no kernels for a device says so by name, when it is asked for and not in the first backward."""

from __future__ import annotations

import pytest
import torch

from gradq.codecs.topk.format import BACKENDS as TOPK
from gradq.collectives.low_rank.collective import LowRank
from gradq.collectives.low_rank.format import BACKENDS as LOW_RANK
from gradq.errors import KernelError


@pytest.mark.parametrize(
    ("ask", "name"),
    [
        (TOPK.on, "the codec topk"),
        (LOW_RANK.on, r"the collective low_rank \(powersgd\)"),
        (LowRank.warm_up, r"the collective low_rank \(powersgd\)"),
    ],
)
def test_what_has_no_cuda_kernels_says_so_by_name(ask, name, monkeypatch) -> None:
    monkeypatch.delenv("GRADQ_KERNELS", raising=False)
    with pytest.raises(KernelError, match=rf"no triton kernels for {name}.*int2 to int8"):
        ask(torch.device("cuda"))
