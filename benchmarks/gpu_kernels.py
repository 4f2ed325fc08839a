"""The speed of the Triton kernels, as a fraction of a copy of the same buffer, side by side on a GPU.

Every row once per round in a new order, timed with CUDA events after a write to another buffer that empties
the cache; a round's ratio is its copy's time over its kernel's. Reported: the median over the rounds and the
20th and 80th percentile. A ratio of 1 means: as fast as copying the gradient once. A kernel that moves more
than a copy does (residuals are read and written, several payloads are read) cannot reach 1, so the share of
the copy's bandwidth, by the bytes that have to be moved, stands next to it.

Refuses to run without a CUDA device. The first run compiles every kernel, a minute or more.

    python benchmarks/gpu_kernels.py --record
"""

from __future__ import annotations

import argparse
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradq.bench.records import environment, percentile, write_record
from gradq.codecs import Codec, from_spec
from gradq.rng import EncodeContext

SPECS = ("int8", "int4", "int3", "int2", "rot6", "rot4", "rot3", "rot2(levels=scalar)", "rot1(levels=scalar)")
RESULTS = Path(__file__).parent / "results"
FLUSH_BYTES = 256 << 20

Row = tuple[str, dict[str, object], int, Callable[[], object]]  # name, facts, bytes moved, call


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numel", type=int, default=25_000_000, help="fp32 elements (default: 100 MB)")
    parser.add_argument("--rounds", type=int, default=31, help="rounds over all rows (default: 31)")
    parser.add_argument("--only", default="", help="regular expression: the rows to run, by name")
    parser.add_argument("--record", action="store_true", help="write a record to benchmarks/results/")
    return parser.parse_args()


def codec_rows(codec: Codec, x: Tensor, residual: Tensor, new: Tensor, out: Tensor) -> list[Row]:
    """Encode without and with feedback, decode, and the mean of 2, 4 and 8 payloads."""
    rows: list[Row] = []
    n, nbytes = x.numel(), codec.nbytes(x.numel())
    payloads = torch.zeros(8, -(-nbytes // 16) * 16, dtype=torch.uint8, device=x.device)[:, :nbytes]
    for rank, payload in enumerate(payloads):
        codec.encode(x, payload, context=EncodeContext(key=rank))
    for feedback in (False, True):
        chosen = codec.for_feedback(feedback)
        options = {"residual": residual, "new_residual": new} if feedback else {}

        def encode(chosen: Codec = chosen, options: dict[str, Any] = options) -> None:
            chosen.encode(x, payloads[0], context=EncodeContext(key=0x0123456789ABCDEF), **options)

        name = f"encode {codec}{', feedback' if feedback else ''}"
        moved = (12 if feedback else 4) * n + nbytes
        rows.append((name, {"operation": "encode", "feedback": feedback}, moved, encode))
    rows.append(
        (f"decode {codec}", {"operation": "decode"}, nbytes + 4 * n, lambda: codec.decode(payloads[0], out))
    )
    for world_size in (2, 4, 8):
        facts = {"operation": "mean", "world_size": world_size}

        def mean(world_size: int = world_size) -> None:
            codec.decode_mean(payloads[:world_size], out)

        rows.append((f"mean of {world_size} {codec}", facts, world_size * nbytes + 4 * n, mean))
    return [(name, facts | {"codec": str(codec)}, moved, call) for name, facts, moved, call in rows]


def exact_rows(x: Tensor, out: Tensor) -> list[Row]:
    """The mean of several fp32 and bf16 payloads, one kernel of ours; the casts are torch's."""
    rows: list[Row] = []
    for spec in ("fp32", "bf16"):
        codec, nbytes = from_spec(spec), from_spec(spec).nbytes(x.numel())
        payloads = torch.zeros(4, nbytes, dtype=torch.uint8, device=x.device)
        for payload in payloads:
            codec.encode(x, payload, context=EncodeContext(key=0))

        def mean(codec: Codec = codec, payloads: Tensor = payloads) -> None:
            codec.decode_mean(payloads, out)

        facts: dict[str, object] = {"operation": "mean", "world_size": 4, "codec": spec}
        rows.append((f"mean of 4 {spec}", facts, 4 * nbytes + 4 * x.numel(), mean))
    return rows


def interleaved_ms(
    calls: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of every call in every round, in an order drawn anew, after a write that fills the cache.

    On a GPU by its own events; on a CPU, for a dry run, by the clock.

    Raises:
        AssertionError: a call kept device memory.
    """
    cuda = device.type == "cuda"
    flush = torch.empty(FLUSH_BYTES if cuda else 1, dtype=torch.uint8, device=device)
    for call in calls.values():  # compile, and fill the allocator's cache
        call()
    before = torch.cuda.memory_allocated() if cuda else 0
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, draw = list(calls), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            flush.zero_()
            if cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(200_000)  # the launch is enqueued before the GPU gets to it
                start.record()
                calls[name]()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end))
            else:
                began = time.perf_counter()
                calls[name]()
                times[name].append(1e3 * (time.perf_counter() - began))
    assert (torch.cuda.memory_allocated() if cuda else 0) == before, "a kernel kept memory"
    return times


def measure(x: Tensor, out: Tensor, rows: list[Row], rounds: int) -> list[dict[str, object]]:
    """Every row once a round; the copy is one of them."""
    calls: dict[str, Callable[[], object]] = {"copy": lambda: out.copy_(x)}
    calls |= {name: call for name, _, _, call in rows}
    times = interleaved_ms(calls, x.device, rounds)
    records: list[dict[str, object]] = []
    copied = 2 * x.nbytes
    for name, facts, moved in [
        ("copy", {"operation": "copy"}, copied),
        *((row[0], row[1], row[2]) for row in rows),
    ]:
        ratios = [copy / own for copy, own in zip(times["copy"], times[name], strict=True)]
        ms = statistics.median(times[name])
        records.append(
            {
                "name": name,
                **facts,
                "ratio_median": round(statistics.median(ratios), 3),
                "ratio_p20": round(percentile(ratios, 0.2), 3),
                "ratio_p80": round(percentile(ratios, 0.8), 3),
                "bandwidth_ratio_median": round(statistics.median(ratios) * moved / copied, 3),
                "bytes_moved": moved,
                "gb_per_s": round(moved / ms / 1e6, 1),
                "ms_median": round(ms, 4),
                "ms_best": round(min(times[name]), 4),
            }
        )
    return records


def main() -> None:
    """Measure, print the table, write the record."""
    arguments = parse_arguments()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device, and torch sees none; nothing was measured")
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(arguments.numel, generator=generator) * 1e-3).cuda()
    residual, new, out = x * 1e-2, torch.zeros_like(x), torch.zeros_like(x)
    rows = [row for spec in SPECS for row in codec_rows(from_spec(spec), x, residual, new, out)]
    rows = [row for row in rows + exact_rows(x, out) if re.search(arguments.only, row[0])]
    import triton

    device = torch.cuda.get_device_properties(x.device)
    facts = environment() | {"gpu": device.name, "cuda": torch.version.cuda, "triton": triton.__version__}
    facts["cpu"] = f"{facts['cpu']} with {device.name}"
    records = measure(x, out, rows, arguments.rounds)

    print(f"{device.name}, torch {facts['torch']}, triton {facts['triton']}")
    print(f"{4e-6 * arguments.numel:g} MB of fp32, {arguments.rounds} rounds\n")
    print(f"{'':44s} {'ms':>8s} {'GB/s':>8s} {'x copy':>8s}  {'p20 - p80':>11s} {'x bandwidth':>12s}")
    for r in records:
        spread = f"{r['ratio_p20']:.2f} - {r['ratio_p80']:.2f}"
        print(
            f"{r['name']:44s} {r['ms_median']:8.3f} {r['gb_per_s']:8.0f} {r['ratio_median']:8.2f}", end="  "
        )
        print(f"{spread:>11s} {r['bandwidth_ratio_median']:12.2f}")

    if arguments.record:
        settings = {"numel": arguments.numel, "rounds": arguments.rounds, "flush_bytes": FLUSH_BYTES}
        path = write_record(RESULTS, "gpu_kernels", environment=facts, settings=settings, rows=records)
        print(f"\nwrote {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
