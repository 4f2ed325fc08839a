"""Every way to move a bucket gives the same bits: threads, a stream, a stream with staging, CPU and CUDA.

The truth is the CPU path over Gloo, with its worker threads. The stream paths are those of CUDA tensors; here
they are driven with CPU tensors over Gloo. On a machine with GPUs `pytest -m gpu tests/distributed` runs them
on CUDA tensors over Gloo (one GPU is enough) and NCCL (one GPU a rank). Not run on a GPU.
"""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gradq
import gradq.sync.base as sync_module
from gradq import wire
from gradq.errors import UnsupportedError, WireError
from gradq.hooks import _fsdp_torch
from gradq.metrics import Metrics
from gradq.options import SyncConfig
from gradq.policy import FixedPolicy, ParameterInfo, Spec
from gradq.sync.finite import StepCheck
from gradq.sync.gradient_sync import GradientSync
from gradq.testing import run_ranks
from gradq.transport.connect import open_channels
from gradq.transport.streams import StagedChannel, StreamChannel, StreamExecutor

SHAPES = ((70, 60), (4500,), (33,))
SPECS = {"cpu": ("int4", "fp32"), "cuda": ("int4", "rot4+int8", "fp32")}
CPU = torch.device("cpu")
CONFIG = SyncConfig


def averages(rank: int, spec: str, collective: str, device: torch.device, group) -> list[torch.Tensor]:
    """Three steps of one bucket, the second with a NaN on one rank: means, then the residuals."""
    infos = [
        ParameterInfo(name=f"p{i}", shape=shape, dtype=torch.float32, index=i)
        for i, shape in enumerate(SHAPES)
    ]
    policy = FixedPolicy(spec=Spec.parse(spec))
    sync = GradientSync(infos, policy, spec, group, CONFIG(collective=collective), device)
    numel, results = sum(info.numel for info in infos), []
    for step in range(3):
        flat = torch.randn(numel, generator=torch.Generator().manual_seed(17 * step + rank))
        if step == 1 and rank == 1:
            flat[100] = torch.nan
        flat = flat.to(device)
        future = sync.average_buckets([(flat, [info.name for info in infos])])[0]
        assert future.wait() is flat or device.type == "cuda"
        results.append(flat.cpu())
    for residuals in (sync.feedback.local, sync.feedback.shard):
        results += [residuals.current(name).float().cpu() for name in residuals.names()]
    assert sync.failure is None
    assert sync.stats().steps == 3
    sync.close()
    return results


def as_on_cuda(kind: str) -> None:
    """From now on CPU tensors go the way of CUDA tensors."""

    def channels(group, count, metrics, timeout, device):
        own = dist.new_group()
        channel = StreamChannel(own, metrics, device) if kind == "stream" else StagedChannel(own, metrics)
        return [channel] * count, lambda error: error or dist.destroy_process_group(own)

    class Unknown(StepCheck):
        def verdict(self, loss_scale, step):
            return torch.tensor(super().verdict(loss_scale, step))

    sync_module.executor_on = StreamExecutor
    sync_module.open_channels = channels
    sync_module.StepCheck = Unknown


def same_bits(rank: int, kind: str, device_type: str) -> int:
    """Every case on the CPU's own path and on another; the number of tensors compared."""
    cases = list(itertools.product(SPECS[device_type], ("direct", "two_phase")))
    truth = [averages(rank, *case, CPU, dist.group.WORLD) for case in cases]
    device, group = CPU, dist.group.WORLD
    if device_type == "cpu":
        as_on_cuda(kind)
    else:
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if kind == "stream" else "gloo"
        group = dist.new_group(backend=backend)
    count = 0
    for case, expected in zip(cases, truth, strict=True):
        got = averages(rank, *case, device, group)
        assert len(got) == len(expected), case
        for ours, theirs in zip(got, expected, strict=True):
            same = (ours.view(torch.int32) == theirs.view(torch.int32)) | (ours.isnan() & theirs.isnan())
            assert bool(same.all()), f"{case}: {int((~same).sum())} of {same.numel()} elements differ"
            count += 1
    return count


WAYS = [
    ("stream", "cpu"),
    ("staged", "cpu"),
    pytest.param("stream", "cuda", marks=pytest.mark.gpu),
    pytest.param("staged", "cuda", marks=pytest.mark.gpu),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "device_type"), WAYS)
def test_the_same_bits_whatever_moves_them(kind, device_type):
    world_size = 3 if device_type == "cpu" or torch.cuda.device_count() >= 3 else 2
    if device_type == "cuda" and kind == "stream" and torch.cuda.device_count() < world_size:
        pytest.skip("NCCL needs a GPU for every rank")
    counts = run_ranks(same_bits, world_size, kind, device_type)
    assert counts == [counts[0]] * world_size
    assert counts[0] > 3 * 2 * len(SPECS[device_type])


def shards(mesh) -> list[torch.Tensor]:
    """Gradients of two steps of FSDP2, and what its forward computes with gathered weights of 8 bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 70), nn.Tanh(), nn.Linear(70, 41))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    handle = gradq.compress(model, "int8", gather_spec="int8")
    results = []
    for step in range(2):
        torch.manual_seed(10 * step + dist.get_rank())
        out = model(torch.randn(8, 40))
        out.square().sum().backward()
        results += [out.detach(), *(p.grad.to_local().clone() for p in model.parameters())]
        model.zero_grad()
    handle.close()
    return results


def same_shards(rank: int, kind: str) -> int:
    """FSDP2 on the CPU's own way and on another; the number of tensors compared."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    truth = shards(mesh)
    as_on_cuda(kind)
    got = shards(mesh)
    assert all(torch.equal(a, b) for a, b in zip(got, truth, strict=True))
    return len(truth)


@pytest.mark.parametrize("kind", ["stream", "staged"])
def test_the_same_shards_whatever_moves_them(kind):
    assert run_ranks(same_shards, 3, kind) == [2 * (1 + 4)] * 3


def no_feedback(rank: int) -> list[str]:
    """What is said of feedback where units are on a GPU (or would be)."""
    model = nn.Linear(40, 70)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    handle = gradq.compress(model, "int8", feedback=True)
    found = []
    with mock.patch.object(_fsdp_torch.Unit, "device", torch.device("cuda")):
        for spec in ("int8", "int4"):
            try:
                handle.set_spec(spec)
            except UnsupportedError as error:
                found.append(str(error))
    handle.close()
    return found


def test_fsdp_on_cuda_refuses_feedback_by_name():
    for found in run_ranks(no_feedback, 2):
        assert [text.startswith("FSDP2 on cuda has no error feedback, which 'weight'") for text in found] == [
            True,
            True,
        ]


def differ(rank: int) -> str:
    channel = StreamChannel(dist.new_group(), Metrics(), CPU)
    messages = [torch.zeros(32, dtype=torch.uint8) for _ in range(2)]
    channel.post(messages, messages, wire.Header(1, rank, 0, 5, 77)).wait()
    channel.post(messages, messages, wire.Header(1, rank, 0, 6, 77)).wait()
    try:
        channel.post(messages, messages, wire.Header(1, rank, 0, 7, 78 + rank))
    except WireError as error:
        return str(error)
    return ""


def test_ranks_with_different_layouts_are_told_once_a_layout():
    for rank, text in enumerate(run_ranks(differ, 2)):
        assert f"layout digest of rank {1 - rank} is {79 - rank}" in text


def traffic(rank: int) -> tuple[int, int]:
    """Messages of many sizes through the staging buffers, some empty."""
    channel = StagedChannel(dist.new_group(), Metrics())
    for step in range(6):
        size = (16 + 5 * step, 400, 0)[step % 3]
        send = [torch.full((size,), 10 * rank + step, dtype=torch.uint8) for _ in range(3)]
        receive = [torch.zeros(size, dtype=torch.uint8) for _ in range(3)]
        if size:
            channel.post(send, receive, wire.Header(1, rank, 0, step, 1)).wait()
        for peer, message in enumerate(receive):
            if peer != rank and size:
                assert message[wire.HEADER_BYTES :].eq(10 * peer + step).all()
                assert message[:2].tolist() == [ord("g"), ord("q")]
    return len(channel._free), sum(buffer.numel() for buffer in channel._free)


def test_staging_buffers_are_used_again():
    for num_buffers, _ in run_ranks(traffic, 3):
        assert num_buffers <= 8  # 5 for an exchange, and a few that became too small


def a_device_nobody_moves(rank: int) -> str:
    try:
        open_channels(dist.group.WORLD, 2, Metrics(), None, torch.device("xla"))
    except UnsupportedError as error:
        return str(error)
    return ""


def test_a_device_without_a_backend_is_named():
    for text in run_ranks(a_device_nobody_moves, 2):
        assert "the process group moves xla tensors by" in text
        assert "NCCL or Gloo" in text
