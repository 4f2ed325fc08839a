"""All-reduces of many sizes, in the manner of nccl-tests: time, bandwidth, bytes, and whether ranks agree.

algbw is size / time; busbw multiplies it by 2 (W - 1) / W, what a ring has to move, so it can be held against
the link's rate at any number of ranks. A compressed all-reduce may have a busbw above the link's rate: that
is its point.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from gradq import wire
from gradq.bench.scenario import PLAIN
from gradq.options import SyncConfig
from gradq.policy import FixedPolicy, ParameterInfo, Spec
from gradq.sync.gradient_sync import GradientSync

__all__ = ["measure_collectives"]

Record = dict[str, Any]

_WARM_UP = 2
_LEAST, _MOST = 3, 20
_BUDGET_S = 1.5


def measure_collectives(
    codecs: Sequence[str], sizes_bytes: Sequence[int], control: dist.ProcessGroup
) -> Iterator[Record]:
    """Average fp32 tensors with every codec, sizes outside, codecs taking turns inside.

    Args:
        codecs: gradq specs; "none" is torch's all-reduce.
        sizes_bytes: sizes of the tensors.
        control: a Gloo group of all ranks.

    Yields:
        "collective" records: size_bytes, count, dtype, codec, time_ms (median of the slowest rank), p20_ms,
        p80_ms, samples, algbw_gbps, busbw_gbps (GB/s), wire_bytes (mean over ranks), ratio, nmse (‖mean -
        exact‖² / ‖exact‖²), wrong (elements that differ from rank 0's; for "none" and "fp32" also those off
        the exact mean).
    """
    for size in sizes_bytes:
        count = max(1, size // 4)
        open_syncs = {codec: _open(codec, count) for codec in dict.fromkeys(codecs)}
        times: dict[str, list[float]] = {codec: [] for codec in open_syncs}
        checks = {}
        start = time.perf_counter()
        for repeat in range(_WARM_UP + _MOST):
            for codec, sync in open_syncs.items():
                flat = _values(dist.get_rank(), count)
                dist.barrier(control)
                begin = time.perf_counter()
                if sync is None:
                    dist.all_reduce(flat)
                    flat /= dist.get_world_size()
                else:
                    sync.average_buckets([(flat, ["flat"])])[0].wait()
                if repeat >= _WARM_UP:
                    times[codec].append(1e3 * (time.perf_counter() - begin))
                else:
                    checks[codec] = _check(flat, exact=codec in (PLAIN, "fp32"), control=control)
            spent = torch.tensor([time.perf_counter() - start])
            dist.all_reduce(spent, dist.ReduceOp.MAX, group=control)
            if repeat >= _WARM_UP + _LEAST - 1 and float(spent) > _BUDGET_S * len(open_syncs):
                break
        for codec, sync in open_syncs.items():
            yield _record(codec, sync, count, times[codec], control) | checks[codec]
            if sync is not None:
                sync.close()


def _open(codec: str, count: int) -> GradientSync | None:
    if codec == PLAIN:
        return None
    info = ParameterInfo(name="flat", shape=(count,), dtype=torch.float32, index=0)
    policy = FixedPolicy(spec=Spec.parse(codec), exact=lambda _: False)
    assert dist.group.WORLD is not None
    return GradientSync([info], policy, codec, dist.group.WORLD, SyncConfig())


def _values(rank: int, count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(rank))


def _check(flat: torch.Tensor, *, exact: bool, control: dist.ProcessGroup) -> Record:
    """How wrong the mean is, over all ranks."""
    world_size = dist.get_world_size()
    mean = torch.zeros(flat.numel(), dtype=torch.float64)
    for rank in range(world_size):
        mean += _values(rank, flat.numel())
    mean /= world_size
    first = flat.clone()
    dist.broadcast(first, 0, group=control)
    wrong = (first.view(torch.int32) != flat.view(torch.int32)).sum()
    if exact:
        wrong += ((flat - mean).abs() > 1e-5 * (1 + mean.abs())).sum()
    total = wrong.double().reshape(1)
    dist.all_reduce(total, group=control)
    return {"wrong": int(total), "nmse": float((flat - mean).square().sum() / mean.square().sum())}


def _record(
    codec: str, sync: GradientSync | None, count: int, times: list[float], control: dist.ProcessGroup
) -> Record:
    slowest = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=control)
    ordered = sorted(slowest.tolist())
    time_ms, size, world_size = statistics.median(ordered), 4 * count, dist.get_world_size()
    ring = float(wire.ring_bytes(size, world_size))
    stats = sync.stats() if sync is not None else None
    wire_bytes = torch.tensor([stats.wire_bytes / stats.steps if stats else ring], dtype=torch.float64)
    dist.all_reduce(wire_bytes, group=control)
    sent = float(wire_bytes) / world_size
    return {
        "record": "collective",
        "size_bytes": size,
        "count": count,
        "dtype": "fp32",
        "codec": codec,
        "time_ms": time_ms,
        "p20_ms": ordered[round(0.2 * (len(ordered) - 1))],
        "p80_ms": ordered[round(0.8 * (len(ordered) - 1))],
        "samples": len(ordered),
        "algbw_gbps": size / time_ms / 1e6,
        "busbw_gbps": ring / time_ms / 1e6,
        "wire_bytes": sent,
        "ratio": ring / sent,
    }
