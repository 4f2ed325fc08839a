"""The speed of the CPU kernels, as a fraction of memcpy of the same buffer, measured side by side.

One thread, persistent buffers, every row once per round in a new order; a round's ratio is its memcpy time
over its kernel time, so a slow moment of the machine weighs on both. Reported: the median over the rounds and
the 20th and 80th percentile. A ratio of 1 means: as fast as copying the gradient once. On a shared machine
`--clock thread` (the default) leaves out the time in which the thread did not run; `wall` does not.

    python benchmarks/kernels.py --record
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from llvmlite import binding
from torch import Tensor

from gradq.bench.records import environment, write_record
from gradq.codecs.exact import cpu as cpu_exact
from gradq.codecs.exact.format import ExactFormat
from gradq.codecs.rotated import cpu as cpu_rotated
from gradq.codecs.rotated.format import RotatedFormat
from gradq.codecs.topk import cpu as cpu_topk
from gradq.codecs.topk.format import TopKFormat
from gradq.codecs.uniform import cpu
from gradq.codecs.uniform.format import UniformFormat
from gradq.collectives.low_rank import cpu as cpu_low_rank
from gradq.rng import EncodeContext

SCALE_DTYPE = torch.bfloat16
CONTEXT = EncodeContext(key=0x0123456789ABCDEF)
MAX_ROWS = 8
BLOCKS = {8: (256, 1024), 4: (256, 1024), 3: (64,), 2: (256,)}  # the default first
CLOCKS = {"thread": time.thread_time, "wall": time.perf_counter}
RESULTS = Path(__file__).parent / "results"

Row = tuple[str, dict[str, object], Callable[[], object]]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numel", type=int, default=6_250_000, help="fp32 elements (default: 25 MB)")
    parser.add_argument("--rounds", type=int, default=41, help="rounds over all rows (default: 41)")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="thread", help="(default: thread)")
    parser.add_argument("--only", default="", help="regular expression: the rows to run, by name")
    parser.add_argument("--record", action="store_true", help="write a record to benchmarks/results/")
    return parser.parse_args()


def faster_copy(x: Tensor, out: Tensor, clock: Callable[[], float]) -> tuple[str, Callable[[], object]]:
    """The fastest of the copies at hand: what memcpy means here."""
    source, target = x.numpy(), out.numpy()
    copies: dict[str, Callable[[], object]] = {
        "torch": lambda: out.copy_(x),
        "numpy": lambda: np.copyto(target, source),
    }
    best = {name: min(seconds(copy, clock) for _ in range(15)) for name, copy in copies.items()}
    name = min(best, key=lambda name: best[name])
    return name, copies[name]


def seconds(function: Callable[[], object], clock: Callable[[], float]) -> float:
    """One call's time."""
    start = clock()
    function()
    return clock() - start


def encode_rows(x: Tensor, payload: Tensor, residual: Tensor, new_residual: Tensor) -> list[Row]:
    """Bits, rounding, where the residual goes, sizes of blocks."""
    rows: list[Row] = []
    feedbacks: dict[str, tuple[Tensor | None, Tensor | None]] = {
        "no feedback": (None, None),
        "feedback": (residual, new_residual),
        "feedback in place": (residual, residual),
    }
    for num_bits, block_sizes in BLOCKS.items():
        for stochastic in (True, False):
            for feedback, (old, new) in feedbacks.items():
                for block_size in block_sizes:
                    rounding = "stochastic" if stochastic else "nearest"
                    facts = {
                        "operation": "encode",
                        "num_bits": num_bits,
                        "rounding": rounding,
                        "feedback": feedback,
                        "block_size": block_size,
                    }

                    form = UniformFormat(num_bits, block_size, SCALE_DTYPE, stochastic)

                    def call(
                        form: UniformFormat = form, old: Tensor | None = old, new: Tensor | None = new
                    ) -> None:
                        cpu.encode(x, payload, form, CONTEXT, old, new)

                    name = f"encode int{num_bits} {rounding}, {feedback}, block {block_size}"
                    rows.append((name, facts, call))
    return rows


def decode_rows(x: Tensor, payloads: dict[int, Tensor], out: Tensor) -> list[Row]:
    """Decode, and the mean of several peers, from real payloads."""
    rows: list[Row] = []
    for num_bits, payload in payloads.items():
        block_size = BLOCKS[num_bits][0]
        form = UniformFormat(num_bits, block_size, SCALE_DTYPE)
        facts: dict[str, object] = {"num_bits": num_bits, "block_size": block_size}
        for rank in range(MAX_ROWS):
            cpu.encode(x, payload[rank], form, EncodeContext(key=rank))
        rows.append(
            (
                f"decode int{num_bits}, block {block_size}",
                facts | {"operation": "decode"},
                lambda payload=payload, form=form: cpu.decode(payload[0], out, form),
            )
        )
        for world_size in (2, 4, 8):
            rows.append(
                (
                    f"mean of {world_size} int{num_bits}, block {block_size}",
                    facts | {"operation": "mean", "world_size": world_size},
                    lambda payload=payload, form=form, world_size=world_size: cpu.decode_mean(
                        payload[:world_size], out, form
                    ),
                )
            )
    return rows


def exact_rows(x: Tensor, out: Tensor) -> list[Row]:
    """The exact codec in fp32 and bf16."""
    rows: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        form = ExactFormat(dtype)
        payloads = torch.empty(4, form.nbytes(x.numel()), dtype=torch.uint8)
        for row in payloads:
            cpu_exact.encode(x, row, form, CONTEXT)
        calls: dict[str, Callable[[], object]] = {
            "encode": lambda p=payloads, f=form: cpu_exact.encode(x, p[0], f, CONTEXT),
            "decode": lambda p=payloads, f=form: cpu_exact.decode(p[0], out, f),
            "mean of 2": lambda p=payloads, f=form: cpu_exact.decode_mean(p[:2], out, f),
            "mean of 4": lambda p=payloads, f=form: cpu_exact.decode_mean(p, out, f),
        }
        for operation, call in calls.items():
            facts = {"operation": operation, "wire_dtype": name}
            rows.append((f"exact {operation} {name}", facts, call))
    return rows


def topk_rows(x: Tensor, residual: Tensor, new_residual: Tensor, out: Tensor) -> list[Row]:
    """Top-k at several densities."""
    rows: list[Row] = []
    for percent in (0.1, 1.0, 10.0):
        form = TopKFormat(percent, num_bits=4, block_size=4096)
        payloads = torch.empty(4, form.nbytes(x.numel()), dtype=torch.uint8)
        for row in payloads:
            cpu_topk.encode(x, row, form, CONTEXT)
        calls: dict[str, Callable[[], object]] = {
            "encode": lambda p=payloads, f=form: cpu_topk.encode(x, p[0], f, CONTEXT, residual, new_residual),
            "decode": lambda p=payloads, f=form: cpu_topk.decode(p[0], out, f),
            "mean of 4": lambda p=payloads, f=form: cpu_topk.decode_mean(p, out, f),
        }
        for operation, call in calls.items():
            facts = {"operation": operation, "percent": percent}
            feedback = ", feedback" if operation == "encode" else ""
            rows.append((f"topk {operation} {percent:g} %{feedback}", facts, call))
    return rows


def rotated_rows(x: Tensor, residual: Tensor, new_residual: Tensor, out: Tensor) -> list[Row]:
    """Rotated codecs: alone, unbiased; with feedback, with the scale of least error."""
    rows: list[Row] = []
    for num_bits in (4, 2):
        unbiased, mse = (RotatedFormat(num_bits, trellis=False, unbiased=how) for how in (True, False))
        payloads = torch.empty(4, mse.nbytes(x.numel()), dtype=torch.uint8)
        for rank, payload in enumerate(payloads):
            cpu_rotated.encode(x, payload, unbiased, EncodeContext(key=rank))
        calls: dict[str, Callable[[], object]] = {
            "encode": lambda p=payloads, f=unbiased: cpu_rotated.encode(x, p[0], f, CONTEXT),
            "encode, feedback": lambda p=payloads, f=mse: cpu_rotated.encode(
                x, p[0], f, CONTEXT, residual, new_residual
            ),
            "decode": lambda p=payloads, f=mse: cpu_rotated.decode(p[0], out, f),
            "mean of 4": lambda p=payloads, f=mse: cpu_rotated.decode_mean(p, out, f),
        }
        for operation, call in calls.items():
            rows.append((f"rot{num_bits} {operation}", {"operation": operation, "num_bits": num_bits}, call))
    return rows


def low_rank_rows(x: Tensor, residual: Tensor, new_residual: Tensor, out: Tensor) -> list[Row]:
    """Low rank on a square matrix."""
    rows: list[Row] = []
    side = math.isqrt(x.numel())
    x, residual, value, out = (t[: side * side] for t in (x, residual, new_residual, out))
    for rank in (1, 4, 16):
        basis, factor = torch.randn(rank, side), torch.empty(rank, side)
        lost = torch.zeros(side * side)
        calls: dict[str, Callable[[], object]] = {
            "project right": lambda b=basis, f=factor: cpu_low_rank.project(
                x, residual, value, b, f, left=False, loss_scale=1.0
            ),
            "project left": lambda b=basis, f=factor: cpu_low_rank.project(
                x, residual, value, b, f, left=True, loss_scale=1.0
            ),
            "residual": lambda b=basis, f=factor, v=lost: cpu_low_rank.remove(b, f, v, loss_scale=1.0),
            "reconstruct": lambda b=basis, f=factor: cpu_low_rank.reconstruct(b, f, out),
            "orthonormalize": lambda b=basis, f=factor: cpu_low_rank.orthonormalize(b, f, key=0),
        }
        for operation, call in calls.items():
            facts = {"operation": operation, "low_rank": rank, "side": side}
            rows.append((f"low rank {rank} {operation}", facts, call))
    return rows


def measure(
    memcpy: Callable[[], object], rows: list[Row], rounds: int, clock: Callable[[], float]
) -> list[dict[str, object]]:
    """Every row once a round, in an order drawn anew; memcpy is one of them."""
    calls = {"memcpy": memcpy} | {name: call for name, _, call in rows}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    order, draw = list(calls), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            times[name].append(seconds(calls[name], clock))
    records: list[dict[str, object]] = []
    for name, facts in [("memcpy", {"operation": "memcpy"}), *((row[0], row[1]) for row in rows)]:
        ratios = sorted(copy / own for copy, own in zip(times["memcpy"], times[name], strict=True))
        low, high = ratios[int(0.2 * (rounds - 1))], ratios[round(0.8 * (rounds - 1))]
        records.append(
            {
                "name": name,
                **facts,
                "ratio_median": round(statistics.median(ratios), 3),
                "ratio_p20": round(low, 3),
                "ratio_p80": round(high, 3),
                "ratio_of_best": round(min(times["memcpy"]) / min(times[name]), 3),
                "ms_median": round(1e3 * statistics.median(times[name]), 3),
                "ms_best": round(1e3 * min(times[name]), 3),
            }
        )
    return records


def main() -> None:
    """Measure, print the table, write the record."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    n = arguments.numel
    x = torch.randn(n, generator=generator) * 1e-3
    residual = torch.randn(n, generator=generator) * 1e-5
    out, new_residual = torch.zeros(n), torch.zeros(n)
    payloads = {
        b: torch.zeros(MAX_ROWS, n * b // 8 + 2 * (n // 64 + 2) + 64, dtype=torch.uint8) for b in (8, 4, 3)
    }
    widest = torch.zeros(payloads[8].shape[1], dtype=torch.uint8)
    facts, clock = environment() | {"cpu_target": binding.get_host_cpu_name()}, CLOCKS[arguments.clock]
    copy_name, memcpy = faster_copy(x, out, clock)
    rows = encode_rows(x, widest, residual, new_residual) + decode_rows(x, payloads, out) + exact_rows(x, out)
    rows += rotated_rows(x, residual, new_residual, out)
    rows += topk_rows(x, residual, new_residual, out) + low_rank_rows(x, residual, new_residual, out)
    rows = [row for row in rows if re.search(arguments.only, row[0])]
    records = measure(memcpy, rows, arguments.rounds, clock)
    facts["load_average_after"] = os.getloadavg()[0]

    print(f"{facts['cpu']} ({facts['cpu_target']}), {facts['cores']} cores, one thread")
    print(f"torch {facts['torch']}, numba {facts['numba']}, numpy {facts['numpy']}, python {facts['python']}")
    print(
        f"{4e-6 * n:g} MB of fp32, {arguments.rounds} rounds, {arguments.clock} clock, memcpy by {copy_name}"
    )
    print(f"load average {facts['load_average']:.1f} before, {facts['load_average_after']:.1f} after\n")
    print(f"{'':54s} {'ms':>7s} {'x memcpy':>9s}  {'p20 - p80':>11s} {'best/best':>10s}")
    for r in records:
        spread = f"{r['ratio_p20']:.2f} - {r['ratio_p80']:.2f}"
        print(f"{r['name']:54s} {r['ms_median']:7.2f} {r['ratio_median']:9.2f}", end="  ")
        print(f"{spread:>11s} {r['ratio_of_best']:10.2f}")

    if arguments.record:
        path = write_record(
            RESULTS,
            "kernels",
            environment=facts,
            settings={
                "numel": n,
                "rounds": arguments.rounds,
                "memcpy": copy_name,
                "clock": arguments.clock,
                "scale_dtype": "bfloat16",
            },
            rows=records,
        )
        print(f"\nwrote {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
