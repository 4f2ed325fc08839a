"""What the tests run on MPI ranks: torch's own smoke cases, then every operation against plain arithmetic."""

from __future__ import annotations

import copy
import itertools
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradq

OP = dist.ReduceOp
all_gather_single = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)  # before torch 2.13
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def make_input(rank: int, step: int = 0) -> Tensor:
    return torch.randn(4, 20, generator=torch.Generator().manual_seed(100 * step + rank))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.left, self.right = nn.Linear(20, 33), nn.Linear(33, 7), nn.Linear(33, 7)

    def forward(self, x: Tensor, branch: str) -> Tensor:
        hidden = self.first(x).tanh()
        return {"left": self.left, "right": self.right, "both": lambda h: self.left(h) + self.right(h)}[
            branch
        ](hidden)


# --- torch's own cases ---------------------------------------------------------------------------------


def ddp(rank: int, options: dict, branches: list[str], num_steps: int = 3) -> list[dict[str, Tensor]]:
    """Gradients of plain DDP; checked against the mean of what every rank computes alone."""
    world_size = dist.get_world_size()
    model = Branches()
    alone = copy.deepcopy(model)
    model = DistributedDataParallel(model, **options)
    history = []
    for step in range(num_steps):
        branch = branches[step % len(branches)]
        model.zero_grad()
        model(make_input(rank, step), branch).square().sum().backward()
        want = {name: torch.zeros_like(p) for name, p in alone.named_parameters()}
        largest = dict.fromkeys(want, 0.0)  # of what is summed: the mean may nearly cancel
        for other in range(world_size):
            alone.zero_grad()
            alone(make_input(other, step), branch).square().sum().backward()
            for name, p in alone.named_parameters():
                if p.grad is not None:
                    want[name] += p.grad / world_size
                    largest[name] = max(largest[name], float(p.grad.abs().max()))
        got = {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, want[name], rtol=1e-5, atol=1e-6 * largest[name])
        assert got
        history.append({name: gradient.clone() for name, gradient in got.items()})
    return history


def objects(rank: int) -> None:
    world_size = dist.get_world_size()
    everyone = [None] * world_size
    dist.all_gather_object(everyone, {"rank": rank, "text": "x" * 1000 * rank})
    assert [entry["rank"] for entry in everyone] == list(range(world_size))
    box = [("hello", 3.5) if rank == world_size - 1 else None]
    dist.broadcast_object_list(box, src=world_size - 1)
    assert box == [("hello", 3.5)]
    gathered = [None] * world_size if rank == 0 else None
    dist.gather_object(rank * 2, gathered)
    assert gathered == ([2 * r for r in range(world_size)] if rank == 0 else None)
    out = [None]
    dist.scatter_object_list(out, [f"for {r}" for r in range(world_size)] if rank == 0 else None)
    assert out == [f"for {rank}"]


def barrier(rank: int) -> None:
    """Nobody leaves before the last has come."""
    start = time.monotonic()
    if rank == 0:
        time.sleep(0.3)
    dist.barrier()
    assert rank == 0 or time.monotonic() - start > 0.2
    work = dist.barrier(async_op=True)
    work.wait()
    assert work.is_completed()


def batched_p2p(rank: int) -> None:
    world_size = dist.get_world_size()
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    sent, received = torch.full((1000,), float(rank)), torch.zeros(1000)
    sent16, received16 = (
        torch.full((7, 3), rank, dtype=torch.bfloat16),
        torch.zeros(7, 3, dtype=torch.bfloat16),
    )
    ops = [
        dist.P2POp(dist.isend, sent, right),
        dist.P2POp(dist.irecv, received, left),
        dist.P2POp(dist.isend, sent16, right, tag=5),
        dist.P2POp(dist.irecv, received16, left, tag=5),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert torch.equal(received, torch.full((1000,), float(left)))
    assert torch.equal(received16, torch.full((7, 3), left, dtype=torch.bfloat16))


# --- every operation against plain arithmetic ----------------------------------------------------------


def value(rank: int, shape: tuple[int, ...], dtype: torch.dtype, salt: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * salt + rank)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) > 0.5
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(
            shape, generator=generator, dtype=torch.float32 if not dtype.is_complex else dtype
        ).to(dtype)
    return torch.randint(1, 9, shape, generator=generator).to(dtype)


def reduced(values: list[Tensor], op: object) -> Tensor:
    """What a reduction must give: fp16 and bf16 through fp32."""
    wide = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.bool: torch.int32}
    parts = [v.to(wide.get(v.dtype, v.dtype)) for v in values]
    total = parts[0].clone()
    for part in parts[1:]:
        if op in (OP.SUM, OP.AVG):
            total = total + part
        elif op == OP.PRODUCT:
            total = total * part
        elif op in (OP.MIN, OP.MAX):
            total = torch.minimum(total, part) if op == OP.MIN else torch.maximum(total, part)
        else:
            total = {OP.BAND: total & part, OP.BOR: total | part, OP.BXOR: total ^ part}[op]
    if op == OP.AVG:
        exact = not (total.is_floating_point() or total.is_complex())
        total = total // len(values) if exact else total / len(values)
    return total.to(values[0].dtype)


def close(got: Tensor, want: Tensor) -> None:
    """MPI adds in any order it likes, the same one for all ranks."""
    assert got.dtype == want.dtype
    if got.is_floating_point() or got.is_complex():
        tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(got.dtype, 1e-5)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    else:
        assert torch.equal(got, want)


def same_everywhere(tensor: Tensor) -> None:
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, tensor)
    assert all(torch.equal(tensor, other) for other in everyone)


def reductions(rank: int) -> None:
    world_size = dist.get_world_size()
    pairs = list(itertools.product((*FLOATS, *INTEGERS), (OP.SUM, OP.AVG, OP.MIN, OP.MAX)))
    pairs += [(torch.float32, OP.PRODUCT), (torch.complex64, OP.SUM), (torch.complex128, OP.AVG)]
    pairs += [(torch.int32, op) for op in (OP.BAND, OP.BOR, OP.BXOR)]
    pairs += [(torch.bool, OP.MAX), (torch.bool, OP.MIN)]
    for (dtype, op), shape in itertools.product(pairs, [(), (0,), (5, 7)]):
        values = [value(r, shape, dtype) for r in range(world_size)]
        want = reduced(values, op)
        got = values[rank].clone()
        dist.all_reduce(got, op)
        close(got, want)
        same_everywhere(got)
        got = values[rank].clone()
        root = world_size - 1
        dist.reduce(got, root, op)
        close(got, want if rank == root else values[rank])
    odd = value(rank, (6, 8), torch.float32).t()  # not contiguous
    dist.all_reduce(odd)
    close(odd, reduced([value(r, (6, 8), torch.float32).t() for r in range(world_size)], OP.SUM))
    with pytest.raises(gradq.UnsupportedError, match=r"float32 tensors by .*BOR"):
        dist.all_reduce(torch.ones(3), OP.BOR)


def movements(rank: int) -> None:
    """Broadcast, gather, scatter, all-gather, all-to-all, reduce-scatter."""
    world_size = dist.get_world_size()
    everyone = range(world_size)
    for dtype in (*FLOATS, *INTEGERS, torch.bool, torch.complex128, torch.float8_e4m3fn):
        mine = value(rank, (3, 4), dtype)
        all_values = [value(r, (3, 4), dtype) for r in everyone]
        got = mine.clone()
        dist.broadcast(got, world_size - 1)
        assert equal(got, all_values[-1])
        outputs = [torch.zeros_like(mine) for _ in everyone]
        dist.all_gather(outputs, mine)
        assert all(equal(a, b) for a, b in zip(outputs, all_values, strict=True))
        whole = torch.zeros(3 * world_size, 4, dtype=torch.float32).to(dtype)
        all_gather_single(whole, mine)
        assert equal(whole, torch.cat([v.view(torch.uint8) for v in all_values]).view(dtype))
        outputs = [torch.zeros_like(mine) for _ in everyone] if rank == 0 else None
        dist.gather(mine, outputs, dst=0)
        assert rank or all(equal(a, b) for a, b in zip(outputs, all_values, strict=True))
        got = torch.zeros_like(mine)
        dist.scatter(got, all_values if rank == 0 else None, src=0)
        assert equal(got, mine)
        table = [[value(10 * a + b, (3, 4), dtype) for b in everyone] for a in everyone]  # from a to b
        outputs = [torch.zeros_like(mine) for _ in everyone]
        dist.all_to_all(outputs, table[rank])
        assert all(equal(outputs[a], table[a][rank]) for a in everyone)
        got, send = torch.zeros_like(whole), torch.cat([v.view(torch.uint8) for v in table[rank]]).view(dtype)
        dist.all_to_all_single(got, send)
        assert equal(got, torch.cat([table[a][rank].view(torch.uint8) for a in everyone]).view(dtype))
    odd = value(rank, (6, 8), torch.float32).t()
    dist.broadcast(odd, 0)
    assert torch.equal(odd, value(0, (6, 8), torch.float32).t())
    uneven_sizes(rank)
    for dtype, op in itertools.product((torch.float32, torch.bfloat16, torch.int32), (OP.SUM, OP.AVG)):
        whole = [value(r, (2 * world_size, 3), dtype) for r in everyone]
        want = reduced([w[2 * rank : 2 * rank + 2] for w in whole], op)
        got = torch.zeros(2, 3, dtype=dtype)
        reduce_scatter_single(got, whole[rank].clone(), op)
        close(got, want)
        got = torch.zeros(2, 3, dtype=dtype)
        dist.reduce_scatter(got, list(whole[rank].chunk(world_size)), op)
        close(got, want)


def equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def uneven_sizes(rank: int) -> None:
    world_size = dist.get_world_size()
    outputs = [torch.zeros(r + 1) for r in range(world_size)]
    dist.all_gather(outputs, torch.full((rank + 1,), float(rank)))
    assert all(torch.equal(out, torch.full((r + 1,), float(r))) for r, out in enumerate(outputs))
    sizes_in = [rank + b for b in range(world_size)]
    sizes_out = [a + rank for a in range(world_size)]
    send = torch.cat([torch.full((n, 2), 10.0 * rank + b) for b, n in enumerate(sizes_in)])
    got = torch.zeros(sum(sizes_out), 2)
    dist.all_to_all_single(got, send, sizes_out, sizes_in)
    assert torch.equal(got, torch.cat([torch.full((n, 2), 10.0 * a + rank) for a, n in enumerate(sizes_out)]))


def coalesced(rank: int) -> None:
    world_size = dist.get_world_size()
    a, b = torch.full((3,), float(rank)), torch.full((2, 2), 2.0 * rank)
    total = world_size * (world_size - 1) / 2
    with dist._coalescing_manager():
        dist.all_reduce(a)
        dist.all_reduce(b)
    assert torch.equal(a, torch.full((3,), total))
    assert torch.equal(b, torch.full((2, 2), 2 * total))
    outputs = [torch.zeros(world_size * n) for n in (2, 3)]
    with dist._coalescing_manager(async_ops=True) as manager:
        for n, out in zip((2, 3), outputs, strict=True):
            all_gather_single(out, torch.full((n,), float(rank)))
    manager.wait()
    for n, out in zip((2, 3), outputs, strict=True):
        assert torch.equal(out, torch.arange(float(world_size)).repeat_interleave(n))


def messages(rank: int) -> None:
    """A receive that waits holds up neither collectives nor other messages; any source; tags; errors."""
    world_size = dist.get_world_size()
    late = torch.zeros(4)
    if rank == 0:
        waiting = dist.irecv(late, 1, tag=9)
        early = torch.zeros(2)
        dist.all_reduce(torch.ones(3))
        dist.recv(early, 1, tag=3)
        assert not waiting.is_completed()
        dist.barrier()
        waiting.wait()
        assert torch.equal(late, torch.full((4,), 9.0))
        assert torch.equal(early, torch.full((2,), 3.0))
    else:
        dist.all_reduce(torch.ones(3))
        if rank == 1:
            dist.send(torch.full((2,), 3.0), 0, tag=3)
        dist.barrier()
        if rank == 1:
            dist.send(torch.full((4,), 9.0), 0, tag=9)
    if rank == 0:
        sources = set()
        for _ in range(world_size - 1):
            got = torch.zeros(1)
            source = dist.recv(got)
            assert int(got) == source
            sources.add(source)
        assert sources == set(range(1, world_size))
    else:
        dist.send(torch.tensor([float(rank)]), 0)
    with pytest.raises(gradq.ConfigError, match="this MPI allows"):
        dist.send(torch.zeros(1), 0 if rank else 1, tag=dist.group.WORLD._highest_tag + 1)
    with pytest.raises(gradq.UnsupportedError, match="dense CPU tensors"):
        dist.all_reduce(torch.ones(3).to_sparse())


def groups(rank: int) -> list[float]:
    """Subgroups, overlapping ones, one after another beyond what could leak, and made by members only."""
    world_size = dist.get_world_size()
    pair = dist.new_group([0, 1])
    rest = dist.new_group(list(range(1, world_size)))
    x = torch.tensor([float(rank + 1)])
    if rank < 2:
        assert dist.get_process_group_ranks(pair) == [0, 1]
        dist.all_reduce(x, group=pair)
        assert float(x) == 3.0
    if rank >= 1:
        y = torch.tensor([1.0])
        dist.all_reduce(y, group=rest)
        assert float(y) == world_size - 1
        dist.broadcast(y.fill_(rank), world_size - 1, group=rest)
        assert float(y) == world_size - 1
    if rank < 2:
        own = dist.new_group([0, 1], use_local_synchronization=True, timeout=timedelta(seconds=20))
        dist.barrier(own)
    for _ in range(20):
        group = dist.new_group()
        dist.barrier(group)
        dist.destroy_process_group(group)
        with pytest.raises((ValueError, RuntimeError)):
            dist.barrier(group)
    return x.tolist()


def sharded(rank: int) -> list[float]:
    """DTensor, and FSDP2 against the same model trained on the whole batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    world_size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    whole = torch.arange(8.0 * world_size).view(-1, 2)
    tensor = distribute_tensor(whole, mesh, [Shard(0)])
    assert torch.equal(tensor.full_tensor(), whole)
    assert torch.equal(tensor.redistribute(mesh, [Shard(1)]).full_tensor(), whole)
    partial = (tensor * 2).sum()
    assert float(partial.full_tensor()) == float(whole.sum() * 2)
    assert isinstance(partial.redistribute(mesh, [Replicate()]), DTensor)

    def train(model: nn.Module, batches: list[int]) -> list[float]:
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05), []
        for step in range(3):
            optimizer.zero_grad()
            total = 0.0
            for r in batches:
                loss = model(make_input(r, step)).square().mean() / len(batches)
                loss.backward()
                total += float(loss.detach())
            optimizer.step()
            losses.append(total)
        return losses

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 8))
    alone = copy.deepcopy(model)
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, [rank])
    losses = train(alone, list(range(world_size)))
    for got, want in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got.full_tensor(), want.detach(), rtol=1e-4, atol=1e-5)
    return losses


def environment(rank: int) -> dict[str, str]:
    import os

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    assert dist.get_backend() == "mpi4py"
    return {name: os.environ[name] for name in names}
