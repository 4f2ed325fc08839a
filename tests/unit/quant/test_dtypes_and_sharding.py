"""Prepared models in bf16, fp64 and under autocast, and trained with FSDP2."""

import pytest
import torch
from models import build
from torch.distributed.fsdp import fully_shard

from gradq import quant
from gradq.testing import run_ranks


def ready(name="cnn"):
    model, batches = build(name)
    qmodel = quant.prepare(model, batches[0])
    return quant.calibrate(qmodel, batches, show_progress=False), batches


@pytest.mark.parametrize("name", ["cnn", "transformer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_moving_a_model_keeps_its_scales(name, dtype):
    qmodel, batches = ready(name)
    expected = qmodel(batches[0]).detach()
    scales = [p.detach().clone() for n, p in qmodel.named_parameters() if n.endswith("log2_scale")]
    qmodel.to(dtype)
    now = [p.detach() for n, p in qmodel.named_parameters() if n.endswith("log2_scale")]
    assert all(torch.equal(a, b) for a, b in zip(scales, now, strict=True))
    out = qmodel(batches[0].to(dtype))
    assert out.dtype == dtype
    limit = 0.06 if dtype == torch.bfloat16 else 1e-2
    assert float((out.detach().float() - expected).norm() / expected.norm()) < limit
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in qmodel.parameters())


def test_autocast_trains():
    qmodel, batches = ready("transformer")
    with torch.autocast("cpu", torch.bfloat16):
        out = qmodel(batches[0])
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in qmodel.parameters())


@torch.no_grad()
def test_a_model_prepared_in_bf16():
    model, batches = build("mlp")
    model.bfloat16()
    half = [b.bfloat16() for b in batches]
    qmodel = quant.calibrate(quant.prepare(model, half[0]), half, show_progress=False)
    a, b = model(half[0]).float(), qmodel(half[0]).float()
    assert float((a - b).norm() / a.norm()) < 0.05
    assert torch.allclose(quant.integer_reference(qmodel)(half[0]).float(), b, atol=0.05)


def train(rank, sharded):
    torch.set_num_threads(1)
    qmodel, batches = ready("mlp")
    qmodel.train()
    wrapped = fully_shard(qmodel) if sharded else torch.nn.parallel.DistributedDataParallel(qmodel)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
    for step in range(3):
        wrapped(batches[(step + rank) % 3]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    named = sorted(qmodel.named_parameters())
    return [(n, (p.full_tensor() if sharded else p).detach().tolist()) for n, p in named]


def test_fsdp2_trains_as_ddp_does():
    ddp, fsdp = (run_ranks(train, 2, sharded) for sharded in (False, True))
    assert ddp[0] == ddp[1]
    assert fsdp[0] == fsdp[1]
    for (name, a), (other, b) in zip(ddp[0], fsdp[0], strict=True):
        assert name == other
        assert torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-6), name
