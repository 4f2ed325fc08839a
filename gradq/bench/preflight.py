"""Before anything is measured: do collectives of several sizes work here, and do they go where we think?

Inside an actor or a container the usual trouble is silent: peer-to-peer that does not work because each
process sees one GPU only, or traffic that takes another interface than the one that is counted. So sums are
checked, bytes are compared with a ring's, and rates with the link the user stated.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from typing import Any

import torch
import torch.distributed as dist

from gradq import wire
from gradq.bench.counters import Counters
from gradq.errors import BenchError

__all__ = ["preflight"]

_SIZES = (4 << 10, 256 << 10, 4 << 20, 16 << 20)
_REPEATS = 3


def preflight(
    interface: str,
    ranks_on_host: int,
    rate_bps: float | None,
    device: torch.device,
    control: dist.ProcessGroup,
) -> dict[str, Any]:
    """Run all-reduces and say what was found. All ranks call this together.

    Args:
        interface: the interface that should carry the traffic; "" if it is not known.
        ranks_on_host: the number of ranks that share it.
        rate_bps: rate of the link as stated, in bits per second, or None.
        device: device on which the gradients will be.
        control: a Gloo group of all ranks.

    Returns:
        "ranks" (host, pid, interface, device of each), "sizes" (bytes, time_ms, algbw and busbw in GB/s,
        interface_share: bytes on the interface over a ring's) and "warnings".

    Raises:
        BenchError: a sum is wrong.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    me = {
        "rank": rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "interface": interface,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "threads": torch.get_num_threads(),
    }
    ranks: list[Any] = [None] * world_size
    dist.all_gather_object(ranks, me, group=control)
    sizes, warnings = [], []
    for size in _SIZES:
        times = []
        for _ in range(_REPEATS):
            tensor = torch.full((size // 4,), float(rank + 1), device=device)
            dist.barrier(control)
            before = Counters.read(interface)
            dist.all_reduce(tensor)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - before.wall_s)
            dist.barrier(control)
            sent = (Counters.read(interface) - before).sent_bytes
            expected = world_size * (world_size + 1) / 2
            if not bool((tensor == expected).all()):
                raise BenchError(
                    f"preflight: an all-reduce of {size} bytes over {interface or 'an unknown interface'} "
                    f"gave wrong sums on rank {rank}; with NCCL in actors try NCCL_P2P_DISABLE=1"
                )
        slowest = torch.tensor([min(times), float(sent or 0)], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=control)
        seconds, ring = float(slowest[0]), wire.ring_bytes(size, world_size)
        entry = {
            "bytes": size,
            "time_ms": 1e3 * seconds,
            "algbw_gbps": size / seconds / 1e9,
            "busbw_gbps": ring / seconds / 1e9,
        }
        if sent is not None:
            entry["interface_share"] = float(slowest[1]) / ring / ranks_on_host
        sizes.append(entry)
    largest = sizes[-1]
    if not 0.9 <= largest.get("interface_share", 1.0) <= 1.3 and interface != "lo":
        warnings.append(
            f"{interface} carried {largest['interface_share']:.2f} of the largest all-reduce's bytes: the "
            "gradients take another way, or share this one"
        )
    if rate_bps is not None:
        share = largest["busbw_gbps"] * 8e9 / rate_bps
        if not 0.5 <= share <= 1.1:
            warnings.append(f"the largest all-reduce ran at {share:.2f} of the rate stated for the link")
    return {"ranks": ranks, "sizes": sizes, "warnings": warnings}
