"""QAT under DDP with compressed gradients against QAT without: same float model, same data, 2 ranks.

    python benchmarks/quant_ddp.py                      # writes benchmarks/results/quant_ddp.csv and .md

Each rank calibrates on its own half of the batches; scales, zero points, observers' results and weights must
be equal on both ranks bit for bit at the end. Held-out loss and accuracy are those of the integer reference.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

import qat_digits as digits  # noqa: E402

from gradq import quant  # noqa: E402

CODECS = ("none", "int8", "int4")


def train_rank(
    rank: int, world: int, store: str, state: dict[str, Any], seed: int, options: dict[str, Any], results: Any
) -> None:
    """One rank: calibrate, train with each codec, check the replicas, report from rank 0."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    images, labels, test, answers = digits.load_digits()
    model = digits.CNN()
    model.load_state_dict(state)
    model.eval()
    for codec in options["codecs"]:
        qmodel = quant.prepare(model, images[:2], quant.Config(weights=options["weights"]))
        quant.calibrate(qmodel, digits.batches(images), num_batches=4, show_progress=False)
        digits.check_replicas(qmodel)
        wrapped = digits.distribute(qmodel, codec, seed)
        steps = options["epochs"] * (len(images) // 32)
        schedule = quant.RangeSchedule(wrapped, freeze_at=int(0.8 * steps))
        digits.fit(
            wrapped,
            images,
            labels,
            epochs=options["epochs"],
            lr=options["lr"],
            seed=seed + 1,
            schedule=schedule,
        )
        digits.check_replicas(qmodel)
        if rank == 0:
            with torch.no_grad():
                logits = quant.integer_reference(qmodel)(test)
            accuracy = 100 * float((logits.argmax(1) == answers).float().mean())
            loss = float(functional.cross_entropy(logits, answers))
            results.put((seed, codec, round(accuracy, 2), round(loss, 5)))
        dist.barrier()
    dist.destroy_process_group()


def measure(seeds: int, options: dict[str, Any], say: Any = print) -> list[tuple[int, str, float, float]]:
    """Rows of (seed, codec, accuracy in %, held-out loss)."""
    torch.set_num_threads(1)
    images, labels, _, _ = digits.load_digits()
    context = torch.multiprocessing.get_context("spawn")
    rows: list[tuple[int, str, float, float]] = []
    for seed in range(seeds):
        model = digits.train_float("cnn", images, labels, seed=seed, epochs=options["float_epochs"])
        results = context.SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            arguments = (2, f"{folder}/store", model.state_dict(), seed, options, results)
            torch.multiprocessing.spawn(train_rank, arguments, nprocs=2)
        for _ in options["codecs"]:
            rows.append(results.get())
            say(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--float-epochs", type=int, default=20)
    parser.add_argument("--qat-epochs", type=int, default=3)
    parser.add_argument("--qat-lr", type=float, default=5e-4)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "quant_ddp.csv")
    args = parser.parse_args()
    options = {
        "weights": args.weights,
        "float_epochs": args.float_epochs,
        "epochs": args.qat_epochs,
        "lr": args.qat_lr,
        "codecs": CODECS,
    }
    rows = measure(args.seeds, options)
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "gradient codec", "accuracy", "held-out loss"])
        writer.writerows(rows)
    lines = [
        f"# QAT ({args.weights} weights, 8-bit activations) under DDP, 2 ranks, {args.seeds} seeds, CNN on "
        "digits",
        "",
        f"`python benchmarks/quant_ddp.py --seeds {args.seeds} --weights {args.weights} --qat-epochs "
        f"{args.qat_epochs}`, "
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}. Replicas were bit-identical in every run, "
        "after "
        "calibration and after training.",
        "",
        "| gradients | accuracy, mean ± sd | held-out loss, mean ± sd | loss against none, in sd of none |",
        "|---|---|---|---|",
    ]
    base = [r[3] for r in rows if r[1] == "none"]
    for codec in CODECS:
        accuracies, losses = [r[2] for r in rows if r[1] == codec], [r[3] for r in rows if r[1] == codec]
        shift = (statistics.mean(losses) - statistics.mean(base)) / statistics.stdev(base)
        lines.append(
            f"| {codec} | {statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f} "
            f"| {statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f} | {shift:+.2f} |"
        )
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
