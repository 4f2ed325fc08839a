"""What a training step costs with each codec on this machine's loopback, relative to plain DDP.

    python benchmarks/step_time.py --ranks 2 --model mlp

Loopback is the fastest link there is, so this is where compression is expected not to pay. The models take
turns, a few steps each, in one run: plain DDP, torch's fp16 hook (its bf16 hook refuses Gloo), and one for
each codec. A ratio compares blocks of the same turn. Forward, backward and averaging are timed; there is no
optimizer.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import gradq
from gradq.bench.records import environment, percentile, write_record
from gradq.testing import run_ranks

ROOT = Path(__file__).resolve().parent.parent
PLAIN, TORCH_FP16 = "plain DDP", "torch fp16 hook"


def build(model: str) -> tuple[nn.Module, Tensor]:
    """A model and a batch: an MLP of 25 M parameters, or the example's GPT of 5 M."""
    torch.manual_seed(0)
    if model == "mlp":
        width = 2048
        layers = [layer for _ in range(6) for layer in (nn.Linear(width, width, bias=False), nn.ReLU())]
        return nn.Sequential(*layers), torch.randn(32, width)
    sys.path.insert(0, str(ROOT / "examples"))
    import train_gpt

    return train_gpt.build("5m"), torch.randint(0, 256, (8, 64))


def measure(rank: int, model: str, codecs: list[str], rounds: int, block: int) -> dict[str, list[float]]:
    """Milliseconds a step of every block, by codec."""
    names = [PLAIN, TORCH_FP16, *codecs]
    models, handles = {}, []
    for name in names:
        module, batch = build(model)
        models[name] = DistributedDataParallel(module)
        if name == TORCH_FP16:
            models[name].register_comm_hook(None, fp16_compress_hook)
        elif name != PLAIN:
            handles.append(gradq.compress(models[name], name))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            dist.barrier()
            start = time.perf_counter()
            for _ in range(block):
                models[name](batch).float().square().mean().backward()
                models[name].zero_grad()
            if turn:  # the first turn warms up: buckets are rebuilt, buffers made
                times[name].append(1e3 * (time.perf_counter() - start) / block)
    for handle in handles:
        handle.close()
    return times


def main() -> None:
    """Measure, print the table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--model", choices=("mlp", "gpt"), default="mlp", help="(default mlp)")
    parser.add_argument("--codecs", nargs="+", default=["bf16", "int8", "int4", "int4+int4"], help="specs")
    parser.add_argument("--rounds", type=int, default=20, help="turns of every codec (default 20)")
    parser.add_argument("--block", type=int, default=2, help="steps a turn (default 2)")
    args = parser.parse_args()
    before = environment()
    every_rank = run_ranks(
        measure, args.ranks, args.model, args.codecs, args.rounds, args.block, timeout=1500.0
    )
    slowest = {
        name: [max(r[name][i] for r in every_rank) for i in range(args.rounds)] for name in every_rank[0]
    }
    rows = []
    print(f"{args.model}, {args.ranks} ranks on {before['cores']} cores of {before['cpu']}, loopback")
    print(f"{'':16s} {'ms a step':>10s} {'x plain DDP':>12s}  {'p20 - p80':>12s}")
    for name, times in slowest.items():
        ratios = [own / plain for own, plain in zip(times, slowest[PLAIN], strict=True)]
        low, median, high = (percentile(ratios, fraction) for fraction in (0.2, 0.5, 0.8))
        row = {"codec": name, "ms_median": percentile(times, 0.5), "ratio": median, "p20": low, "p80": high}
        rows.append(
            {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
        )
        print(f"{name:16s} {row['ms_median']:10.1f} {median:12.2f}  {low:5.2f} - {high:.2f}")
    path = write_record(
        ROOT / "benchmarks" / "results",
        f"step_time_{args.model}_{args.ranks}ranks",
        environment=before,
        settings={"rounds": args.rounds, "block": args.block, "link": "loopback"},
        rows=rows,
    )
    print(f"written to {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
