"""Codecs meet the contract on CUDA tensors too: `pytest -m gpu tests/gpu`."""

from __future__ import annotations

import pytest
import torch

from gradq import codecs
from gradq.conformance import CHECKS
from gradq.rng import EncodeContext

pytestmark = pytest.mark.gpu
SPECS = [
    "fp32",
    "bf16",
    "fp16",
    "fp64",
    *(f"int{bits}" for bits in range(2, 9)),
    *(f"int{bits}(rounding=nearest)" for bits in (2, 3, 4, 8)),
    "int6(block_size=192,rounding=stochastic,scale_dtype=fp16)",
    "int2(block_size=1024,scale_dtype=fp32)",
    *(f"rot{bits}(levels=scalar)" for bits in range(1, 7)),
    "rot4(scale=mse)",
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_contract(check, spec):
    with torch.device("cuda"):
        check(codecs.from_spec(spec))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_is_allocated_and_nobody_waits():
    """After the first call a step's kernels neither allocate device memory nor synchronize."""
    for spec in ("int4", "rot4", "bf16"):
        codec = codecs.from_spec(spec)
        x = torch.randn(100_003, device="cuda")
        payloads = torch.zeros(3, codec.nbytes(x.numel()), dtype=torch.uint8, device="cuda")

        def step(codec=codec, x=x, payloads=payloads):
            codec.encode(x, payloads[0], context=EncodeContext(key=1))
            codec.decode_mean(payloads, x)

        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before, spec
