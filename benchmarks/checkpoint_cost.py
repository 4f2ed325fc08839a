"""What gradq's state adds to a checkpoint: seconds and bytes beside those of the model's own dcp.save.

    python benchmarks/checkpoint_cost.py [--out record.json]

Ranks over Gloo on this machine save, one after another in each turn: the model; gradq's state as it is
(residuals packed into flats); and as format 1 had it (an entry a parameter). Seconds are rank 0's from one
barrier to the next, `state_dict()` included; ratios are of the same turn. "gathered" is
`gathered_state_dict` and torch.save by rank 0. Then packed and format 1 are loaded. Bytes are of the folder.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradq
from gradq.checkpoint import to_row
from gradq.checkpoint.state import residual_shapes
from gradq.testing import run_ranks

MODELS = {"1000 x 1,600": (1000, 40), "100 x 16,384": (100, 128), "48 x 1,048,576": (48, 1024)}


def per_parameter(handle: gradq.HookState) -> dict[str, Any]:
    """The state as format 1 had it."""
    sync, local = handle.sync, {}
    for name, numel in residual_shapes(sync)[0].items():
        row = torch.zeros(numel)
        row.copy_(sync.feedback.local.current(name))
        local[name] = to_row(row, sync.group)
    scalars = {"format": 1, "step": sync.step, "world_size": sync.world_size}
    state: dict[str, Any] = {name: torch.tensor(value) for name, value in scalars.items()}
    return state | {"rank": to_row(torch.tensor([sync.rank]), sync.group), "local": local, "shard": {}}


def size(path: Path) -> int:
    """Bytes of a file or folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))


def measure(rank: int, folder: str, count: int, width: int, turns: int) -> dict[str, Any]:
    """Seconds by way and turn, and bytes by way."""
    weights = [nn.Parameter(torch.randn(width, width)) for _ in range(count)]
    model = DistributedDataParallel(nn.ParameterList(weights))
    handle = gradq.compress(model, "int4")
    for name, numel in residual_shapes(handle.sync)[0].items():
        handle.sync.feedback.local.replace(name, torch.randn(numel))
    at = Path(folder)

    def gathered() -> None:
        state = handle.gathered_state_dict()
        if rank == 0:
            torch.save(state, place["now"] / "gathered")

    place = {"now": at}

    ways: dict[str, Callable[[], Any]] = {
        "model": lambda: dcp.save({"model": model.module.state_dict()}, checkpoint_id=place["now"] / "model"),
        "packed": lambda: dcp.save({"gradq": handle.state_dict()}, checkpoint_id=place["now"] / "packed"),
        "per parameter": lambda: dcp.save(
            {"gradq": per_parameter(handle)}, checkpoint_id=place["now"] / "per parameter"
        ),
        "gathered": gathered,
        "load packed": lambda: gradq.load_checkpoint(handle, place["now"] / "packed"),
        "load per parameter": lambda: gradq.load_checkpoint(handle, place["now"] / "per parameter"),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(turns + 1):
        place["now"] = at / str(turn)
        place["now"].mkdir(exist_ok=True)
        for way, do in ways.items():
            dist.barrier()
            start = time.perf_counter()
            do()
            dist.barrier()
            if turn:
                seconds[way].append(time.perf_counter() - start)
    handle.close()
    return {"seconds": seconds, "bytes": {way: size(place["now"] / way) for way in list(ways)[:4]}}


def main() -> None:
    """Measure every model at every number of ranks, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    record: dict[str, Any] = {"torch": torch.__version__, "machine": platform.processor(), "cells": []}
    print("| model | ranks | way | ms (20-80 %) | of the model's save | MB |\n|---|---|---|---|---|---|")
    for name in args.models:
        for ranks in args.ranks:
            with tempfile.TemporaryDirectory() as folder:
                found = run_ranks(measure, ranks, folder, *MODELS[name], args.turns, timeout=1800)[0]
            record["cells"].append({"model": name, "ranks": ranks} | found)
            own = found["seconds"]["model"]
            for way, seconds in found["seconds"].items():
                low, *_, high = (1e3 * s for s in statistics.quantiles(seconds, n=5))
                ratio = statistics.median(s / base for s, base in zip(seconds, own, strict=True))
                mb = found["bytes"].get(way, 0) / 1e6
                print(
                    f"| {name} | {ranks} | {way} | {1e3 * statistics.median(seconds):.0f} ({low:.0f} to "
                    f"{high:.0f}) | {ratio:.2f} | {f'{mb:.1f}' if mb else ''} |",
                    flush=True,
                )
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
