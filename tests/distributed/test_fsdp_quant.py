"""Quantization-aware training under FSDP2 with compressed gradients, against the same model unsharded."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gradq
from gradq import quant
from gradq.testing import run_ranks


def train(rank: int, spec: str, weights: str):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    images = torch.randn(512, 32)
    labels = (images @ torch.randn(32, 10)).argmax(1)
    prepared = quant.prepare(model, images[:4], quant.Config(weights=weights))
    quant.calibrate(prepared, [images[:64][rank::2]], show_progress=False)
    twin = copy.deepcopy(prepared)
    fully_shard(prepared)
    handle = gradq.compress(prepared, spec)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.5) for net in (prepared, twin)]
    losses = []
    for step in range(20):
        batch = torch.randperm(512, generator=torch.Generator().manual_seed(step))[:64][rank::2]
        pair = []
        for net, optimizer in zip((prepared, twin), optimizers, strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(images[batch]), labels[batch])
            loss.backward()
            for p in net.parameters() if net is twin else ():
                dist.all_reduce(p.grad)
                p.grad /= 2
            optimizer.step()
            pair.append(loss.item())
        losses.append(pair)
    full = get_model_state_dict(prepared, options=StateDictOptions(full_state_dict=True))
    steps = handle.stats().steps
    handle.close()
    trained = {name: value.clone() for name, value in full.items() if isinstance(value, torch.Tensor)}
    unsharded = {n: v.clone() for n, v in twin.state_dict().items() if isinstance(v, torch.Tensor)}
    codes = None
    if rank == 0:  # torch gives the whole state to rank 0 only
        fresh = copy.deepcopy(twin)
        fresh.load_state_dict(full)
        codes = quant.integer_reference(fresh)(images[:8])
    return losses, steps, trained, unsharded, codes


@pytest.mark.parametrize(("spec", "weights"), [("fp32", "int8"), ("int8", "int4")])
def test_qat_under_fsdp2(spec: str, weights: str) -> None:
    (losses, steps, trained, twin, codes), _ = run_ranks(train, 2, spec, weights)
    assert steps == 20
    assert any("log2_scale" in name for name in trained)
    assert torch.isfinite(codes).all()
    assert losses[-1][0] < losses[0][0] - 0.1, "it does not learn"
    for name, value in twin.items():
        if spec == "fp32":
            assert torch.equal(trained[name], value), name
        else:
            torch.testing.assert_close(trained[name], value, atol=0.03, rtol=0, msg=name)
    assert losses[-1][0] == pytest.approx(losses[-1][1], rel=0.02)
