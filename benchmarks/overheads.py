"""What gradq costs beside plain DDP: memory, threads, sockets, and time for each parameter.

    python benchmarks/overheads.py --record after
    PYTHONPATH=<an older checkout> python benchmarks/overheads.py --record before
    python benchmarks/overheads.py --table overheads_*.json

Every figure stands beside that of plain DDP from the same run. Steps of both take turns, and the ratio is the
median of the pairs' ratios, with the 20 % and 80 % quantiles.

- tiny: 5,000 parameters of 16 elements and a matrix of 64 x 16, two ranks.
- ranks: 20 parameters of 1,000 elements and a matrix of 64 x 1,000 on 16 and 64 ranks, with threads and
  sockets of a rank.
- memory: the largest resident memory while one parameter of 200 M elements is trained, two ranks.
- left: threads, files and memory after the models of a sweep, dropped without `close()`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradq
from gradq.bench.records import write_record
from gradq.testing import run_ranks

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


class Tiny(nn.Module):
    """Parameters whose gradient is one broadcast product each, and a matrix, which is compressed."""

    def __init__(self, count: int, numel: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(numel)) for _ in range(count))
        self.matrix = nn.Parameter(torch.zeros(64, numel))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A number."""
        return torch.stack([(weight * x).sum() for weight in self.weights]).sum() + (self.matrix @ x).sum()


class Wide(nn.Module):
    """One large parameter."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(numel // 1000, 1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A number."""
        return (self.weight * x).sum()


def held() -> tuple[int, ...]:
    """Threads and open files of this process."""
    return tuple(len(list(Path("/proc/self", what).iterdir())) for what in ("task", "fd"))


def memory_mb(field: str) -> float:
    """A field of /proc/self/status, such as VmHWM, the largest resident memory so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(entry for entry in lines if entry.startswith(field))
    return int(line.split()[1]) / 1024


def paired(rank: int, count: int, numel: int, spec: str, steps: int) -> Row:
    """Steps of plain DDP and gradq in turn; the slowest rank's times."""
    start = held()
    plain = DistributedDataParallel(Tiny(count, numel))
    before = held()
    compressed = DistributedDataParallel(Tiny(count, numel))
    handle = gradq.compress(compressed, spec)
    x = torch.randn(numel)
    times = torch.zeros(steps, 2, dtype=torch.float64)
    for step in range(-3, steps):
        for column, model in enumerate((plain, compressed) if step % 2 else (compressed, plain)):
            where = column if step % 2 else 1 - column
            model.zero_grad()
            dist.barrier()
            begin = time.perf_counter()
            model(x).backward()
            if step >= 0:
                times[step, where] = time.perf_counter() - begin
    after = held()
    dist.all_reduce(times, dist.ReduceOp.MAX)
    handle.close()
    ratios = sorted((times[:, 1] / times[:, 0]).tolist())
    return {
        "plain_ms": 1e3 * statistics.median(times[:, 0].tolist()),
        "gradq_ms": 1e3 * statistics.median(times[:, 1].tolist()),
        "ratio": statistics.median(ratios),
        "ratio_p20": ratios[len(ratios) // 5],
        "ratio_p80": ratios[-1 - len(ratios) // 5],
        "plain_threads": before[0],
        "gradq_threads": after[0] - before[0],
        "plain_files": before[1],
        "gradq_files": after[1] - before[1],
        "start_threads": start[0],
    }


def peak(rank: int, numel: int, spec: str) -> float:
    """Largest resident memory in MB, less what the process had before the model."""
    base = memory_mb("VmRSS")
    model = DistributedDataParallel(Wide(numel))
    handle = gradq.compress(model, spec) if spec != "ddp" else None
    x = torch.randn(1000)
    for _ in range(3):
        model.zero_grad()
        model(x).backward()
    if handle is not None:
        handle.close()
    return memory_mb("VmHWM") - base


def left(rank: int, spec: str, count: int) -> Row:
    """What the models of a sweep leave behind, each: threads, files, MB."""
    rows = []
    for _ in range(count):
        model = DistributedDataParallel(nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 1000)))
        handle = gradq.compress(model, spec) if spec != "ddp" else None
        for _ in range(2):
            model.zero_grad()
            model(torch.randn(2, 1000)).square().mean().backward()
        del model, handle
        gc.collect()
        rows.append((*held(), memory_mb("VmRSS")))
    each = [(last - first) / (count - 2) for first, last in zip(rows[1], rows[-1], strict=True)]
    return dict(zip(("threads", "files", "mb"), each, strict=True))


def measure(parts: list[str], numel: int, ranks: list[int]) -> list[Row]:
    """All rows, printed as they come."""
    rows: list[Row] = []

    def add(**row: Any) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)

    if "tiny" in parts:
        for spec in ("int8", "int4"):
            add(part="tiny", spec=spec, ranks=2, **run_ranks(paired, 2, 5000, 16, spec, 15, timeout=900)[0])
    if "ranks" in parts:
        for count in ranks:
            row = run_ranks(paired, count, 20, 1000, "int8", 15, timeout=900, group_timeout=600)[0]
            add(part="ranks", spec="int8", ranks=count, **row)
    if "memory" in parts:
        plain = max(run_ranks(peak, 2, numel, "ddp", timeout=900))
        for spec in ("int8", "int4"):
            ours = max(run_ranks(peak, 2, numel, spec, timeout=900, group_timeout=600))
            add(part="memory", spec=spec, numel=numel, plain_mb=plain, gradq_mb=ours, ratio=ours / plain)
    if "left" in parts:
        for spec in ("ddp", "int4"):
            add(part="left", spec=spec, **run_ranks(left, 2, spec, 6, timeout=900)[0])
    return rows


def table(paths: list[Path]) -> str:
    """Records side by side, as a table in Markdown."""
    records = [json.loads(path.read_text()) for path in paths]
    lines = [
        "| figure | " + " | ".join(record["label"] for record in records) + " |",
        "|---|" + "---|" * len(records),
    ]
    figures: dict[str, dict[str, str]] = {}
    for record in records:
        for row in record["rows"]:
            where = " ".join(str(row[key]) for key in ("part", "spec", "ranks") if key in row)
            for key, value in row.items():
                if isinstance(value, float) or key.endswith(("threads", "files")):
                    figures.setdefault(f"{where}: {key}", {})[record["label"]] = f"{value:.3g}"
    for figure, values in figures.items():
        lines.append(f"| {figure} | " + " | ".join(values.get(r["label"], "") for r in records) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print; write the record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["tiny", "ranks", "memory", "left"])
    parser.add_argument("--numel", type=int, default=200_000_000, help="elements of the large parameter")
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--record", metavar="LABEL", help="write the record under this label")
    parser.add_argument("--table", nargs="+", type=Path, help="show records side by side and measure nothing")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return
    rows = measure(args.parts, args.numel, args.ranks)
    if args.record:
        name = f"overheads_{args.record}"
        print(write_record(ROOT / "benchmarks" / "results", name, label=args.record, rows=rows))


if __name__ == "__main__":
    main()
