"""Accuracy on digits: fp32, PTQ and QAT at 8, 4, 3 and mixed bits, several seeds.

    python benchmarks/quant_digits.py --model cnn          # writes benchmarks/results/quant_digits_cnn.csv
    and .md

Accuracies of quantized models are those of the integer reference (what an INT8 runtime computes), on 450
held-out images: one image is 0.22 points.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

import qat_digits as digits  # noqa: E402

from gradq import quant  # noqa: E402


def qat(
    qmodel: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, seed: int, epochs: int, lr: float
) -> None:
    """Quantization-aware training as the example does it."""
    steps = epochs * (len(images) // 32)
    schedule = quant.RangeSchedule(qmodel, freeze_at=int(0.8 * steps), freeze_batch_norm_at=steps // 2)
    digits.fit(qmodel, images, labels, epochs=epochs, lr=lr, seed=seed + 1, schedule=schedule)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=("cnn", "vit"), default="cnn")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--qat-epochs", type=int, default=5)
    parser.add_argument("--qat-lr", type=float, default=5e-4)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = args.out or HERE / "results" / f"quant_digits_{args.model}.csv"
    images, labels, test, answers = digits.load_digits()
    rows: list[dict[str, object]] = []

    def note(seed: int, what: str, model: torch.nn.Module) -> None:
        is_quantized = what != "fp32"
        rows.append(
            {
                "model": args.model,
                "seed": seed,
                "what": what,
                "accuracy": round(digits.accuracy(model, test, answers), 2),
                "bits": round(quant.average_bits(model), 3) if is_quantized else 32,
                "bytes": quant.model_bytes(model)
                if is_quantized
                else 4 * sum(p.numel() for p in model.parameters()),
            }
        )
        print(rows[-1], flush=True)

    for seed in range(args.seeds):
        model = digits.train_float(args.model, images, labels, seed=seed, epochs=args.epochs)
        note(seed, "fp32", model)
        for what, weights, average in (
            ("w8a8", "int8", None),
            ("w4a8", "int4", None),
            ("w3a8", "int3", None),
            ("mixed 4", "int8", 4.0),
            ("mixed 3", "int8", 3.0),
        ):
            qmodel = quant.prepare(model, images[:2], quant.Config(weights=weights))
            quant.calibrate(qmodel, digits.batches(images), num_batches=8, show_progress=False)
            if average is not None:
                report = quant.sensitivity(qmodel, list(images.split(64)), show_progress=False)
                quant.assign_bits(qmodel, report, average_bits=average)
            note(seed, f"PTQ {what}", qmodel)
            qat(qmodel, images, labels, seed, args.qat_epochs, args.qat_lr)
            note(seed, f"QAT {what}", qmodel)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    write_table(rows, out.with_suffix(".md"), args)


def write_table(rows: list[dict[str, object]], path: Path, args: argparse.Namespace) -> None:
    """Mean, spread and difference to fp32 over the seeds."""
    whats = list(dict.fromkeys(str(r["what"]) for r in rows))
    scores = {w: [float(str(r["accuracy"])) for r in rows if r["what"] == w] for w in whats}
    base = statistics.mean(scores["fp32"])
    lines = [
        f"# {args.model} on digits, {args.seeds} seeds, integer reference",
        "",
        f"`python benchmarks/quant_digits.py --model {args.model} --seeds {args.seeds} --epochs "
        f"{args.epochs} "
        f"--qat-epochs {args.qat_epochs} --qat-lr {args.qat_lr}`, {time.strftime('%Y-%m-%d')}, torch "
        f"{torch.__version__}, "
        f"{platform.processor() or platform.machine()}, 1 thread",
        "",
        "| what | accuracy, mean of seeds | min … max | against fp32 | bits | bytes |",
        "|---|---|---|---|---|---|",
    ]
    for what in whats:
        values = scores[what]
        row = next(r for r in rows if r["what"] == what)
        lines.append(
            f"| {what} | {statistics.mean(values):.2f} | {min(values):.2f} … {max(values):.2f} "
            f"| {statistics.mean(values) - base:+.2f} | {row['bits']} | {row['bytes']} |"
        )
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
