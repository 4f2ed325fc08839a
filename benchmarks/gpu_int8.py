"""INT8 linear layers on a GPU: a `.pt2` program on `torch._int_mm` beside fp32 and bf16, in turns.

The MLP of benchmarks/int8.py with random weights, compiled by `torch.compile` and not, timed with CUDA
events; ratios are fp32's time over a row's in the same round. Refuses to run without a CUDA device.

    python benchmarks/gpu_int8.py --record
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

import int8_models as zoo  # noqa: E402

from gradq import export, quant  # noqa: E402
from gradq.bench.records import environment, percentile, write_record  # noqa: E402


def contenders() -> tuple[dict[str, Callable[[Tensor], Tensor]], Callable[[int], Tensor]]:
    """Name → model on the GPU, and batch size → input."""
    model, inputs = zoo.large("mlp", False)
    config = quant.Config.for_target("gpu")
    qmodel = quant.prepare(model, inputs(2), config)
    quant.calibrate(qmodel, [inputs(64) for _ in range(4)], show_progress=False)
    program = move_to_device_pass(export.exported_program(qmodel, operators="int_mm"), "cuda").module()
    model = model.cuda()

    def bf16(x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return model(x)

    return {
        "fp32": model,
        "bf16 autocast": bf16,
        "int_mm": program,
        "fp32, compiled": torch.compile(model),
        "bf16 autocast, compiled": torch.compile(bf16),
        "int_mm, compiled": torch.compile(program),
    }, inputs


@torch.no_grad()
def measure(calls: dict[str, Callable[[Tensor], Tensor]], x: Tensor, rounds: int) -> list[dict[str, object]]:
    """Every contender once a round, in an order drawn anew; a sample is ten calls."""
    batch = len(x)
    truth = calls["fp32"](x).double()
    outputs = {name: call(x).double() for name, call in calls.items()}
    for _ in range(3):
        for call in calls.values():
            call(x)
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, draw = list(calls), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(2_000_000)
            start.record()
            for _ in range(10):
                calls[name](x)
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 10)
    rows: list[dict[str, object]] = []
    for name, own in times.items():
        ratios = [a / b for a, b in zip(times["fp32"], own, strict=True)]
        error = (outputs[name] - truth).square().sum() / truth.square().sum()
        rows.append(
            {
                "contender": name,
                "batch": batch,
                "ms_median": round(statistics.median(own), 4),
                "faster_median": round(statistics.median(ratios), 3),
                "faster_p20": round(percentile(ratios, 0.2), 3),
                "faster_p80": round(percentile(ratios, 0.8), 3),
                "nmse": float(error),
            }
        )
        spread = f"({rows[-1]['faster_p20']} … {rows[-1]['faster_p80']})"
        figures = f"{rows[-1]['ms_median']:8.3f} ms {rows[-1]['faster_median']:6.2f}x {spread}"
        print(f"batch {batch:5} {name:24} {figures}, NMSE {float(error):.1e}", flush=True)
    return rows


def main() -> None:
    """Measure, print, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 1024, 8192])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--record", action="store_true", help="write a record to benchmarks/results/")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device, and torch sees none; nothing was measured")
    calls, inputs = contenders()
    rows = [row for batch in args.batches for row in measure(calls, inputs(batch).cuda(), args.rounds)]
    if args.record:
        facts = environment() | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        facts["cpu"] = f"{facts['cpu']} with {facts['gpu']}"
        settings = {"batches": args.batches, "rounds": args.rounds}
        print(write_record(HERE / "results", "gpu_int8", environment=facts, settings=settings, rows=rows))


if __name__ == "__main__":
    main()
