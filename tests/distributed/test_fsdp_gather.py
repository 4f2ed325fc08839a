"""FSDP2 with `gather_spec`: parameters travel rounded, shards stay exact, and every byte is counted."""

from __future__ import annotations

import torch
from test_fsdp import backward, sharded
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import gradq
from gradq.testing import run_ranks


def gathered(rank: int):
    """The weights a model computes with, and those it keeps."""
    model = sharded({})
    events: list[gradq.Event] = []
    handle = gradq.compress(model, "int8", gather_spec="int8")
    handle.add_sink(events.append)
    kept = {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}
    seen = []
    for step in range(40):
        model.unshard()
        for child in (model.first, model.second):
            child.unshard()
        with torch.no_grad():
            seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        model.reshard()
        for child in (model.first, model.second):
            child.reshard()
        backward(model, rank, step, {})
    after = {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}
    handle.close()
    counts = {
        kind: sum(e.value for e in events if e.kind == kind)
        for kind in ("gather_bytes", "dense_gather_bytes")
    }
    return kept, seen, after, counts


def test_gathered_parameters_are_an_unbiased_rounding_and_shards_stay_exact() -> None:
    results = run_ranks(gathered, 2)
    for kept, seen, after, counts in results:
        assert counts["gather_bytes"] < 0.3 * counts["dense_gather_bytes"]
        for name, exact in kept.items():
            assert torch.equal(exact, after[name]), "the master weights changed"
            values = torch.stack([step[name] for step in seen])
            assert torch.equal(values[0], results[0][1][0][name]), "ranks compute with different weights"
            if exact.ndim == 1 or exact.numel() < 1024:
                assert torch.equal(values[0], exact)
            else:
                level = float(exact.abs().max()) / 127
                assert 0 < float((values - exact).abs().max()) <= 1.02 * level
                bias = (values.mean(0) - exact).mean().abs()
                assert float(bias) < 6 * level / (12 * values.numel()) ** 0.5


def counted(rank: int, mesh: tuple[int, ...], options: dict[str, str]) -> gradq.Stats:
    """Two steps of two layers of 64 x 96, each gathered in forward and again in backward."""
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Linear(96, 64, bias=False))
    names = ("replicate", "shard")[-len(mesh) :]
    for part in (*model, model):
        fully_shard(part, mesh=init_device_mesh("cpu", mesh, mesh_dim_names=names))
    handle = gradq.compress(model, "int8", **options)
    for _ in range(2):
        model(torch.randn(4, 64)).sum().backward()
    stats = handle.stats()
    handle.close()
    return stats


def test_bytes_of_gathered_parameters_are_in_the_totals() -> None:
    """By hand: half a layer is 3072 elements: a byte each, 2 for each block of 256, 16 of the header."""
    message, dense, gathers, steps = 3072 + 2 * 12 + 16, 4 * 3072, 2 * 2, 2
    for stats in run_ranks(counted, 2, (2,), {"gather_spec": "int8"}):
        assert stats.gather_bytes == steps * gathers * message
        assert stats.wire_bytes == stats.gather_bytes + steps * 2 * message
        assert stats.dense_bytes == steps * (gathers + 2) * dense
        assert f"{steps * gathers * message / steps / 1e6:.3f} of parameters" in str(stats)
    for stats in run_ranks(counted, 2, (2,), {}):
        assert stats.gather_bytes == 0
        assert stats.wire_bytes == steps * 2 * message


def test_gathered_parameters_count_as_inside_the_node_with_replicas() -> None:
    message, gathers, steps = 3072 + 2 * 12 + 16, 2 * 2, 2
    for stats in run_ranks(counted, 4, (2, 2), {"gather_spec": "int8"}):
        assert stats.gather_bytes == stats.intra_node_bytes == steps * gathers * message
        assert stats.inter_node_bytes > 0
