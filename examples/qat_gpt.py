"""Quantize a small GPT over bytes: float, post-training quantization, quantization-aware training.

    python examples/qat_gpt.py
    torchrun --nproc-per-node 2 examples/qat_gpt.py --codec int8 --weights int4

Model and text are those of train_gpt.py: the source of Python's standard library. Perplexities are per byte,
on held-out files; those of quantized models are the integer reference's, that is what an INT8 runtime
computes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from train_gpt import GPT, load_text

import gradq
from gradq import quant

SEQ_LEN = 64


def windows(text: Tensor, starts: np.ndarray) -> Tensor:
    """(B, T + 1) bytes."""
    return text[torch.from_numpy(starts)[:, None] + torch.arange(SEQ_LEN + 1)].long()


def loss_of(model: Any, window: Tensor) -> Tensor:
    """Mean cross-entropy in nats a byte."""
    return functional.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())


def fit(
    model: nn.Module,
    text: Tensor,
    *,
    steps: int,
    lr: float,
    seed: int,
    label: str,
    schedule: quant.RangeSchedule | None = None,
    batch_size: int = 16,
) -> None:
    """AdamW with warm-up and cosine; the batch is shared out over the ranks."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    optimizer = torch.optim.AdamW(quant.param_groups(model, lr=lr, weight_decay=0.1), betas=(0.9, 0.95))
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, [lr] * 3, steps, pct_start=0.1)
    model.train()
    start, total = time.monotonic(), 0.0
    for step in range(steps):
        starts = np.random.default_rng((seed, step)).integers(len(text) - SEQ_LEN, size=batch_size)[
            rank::world
        ]
        loss = loss_of(model, windows(text, starts))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cycle.step()
        if schedule is not None:
            schedule.step()
        total += loss.item()
        if label and rank == 0 and (step + 1) % 50 == 0:
            took = time.monotonic() - start
            print(f"{label} step {step + 1}/{steps}  loss {total / 50:.4f}  {took:.0f} s", file=sys.stderr)
            total = 0.0


@torch.no_grad()
def perplexity(model: nn.Module, text: Tensor, num_windows: int = 256) -> float:
    """Perplexity per byte over fixed windows; of a prepared model, that of its integer reference."""
    prepared = any(isinstance(m, quant.ActQuant | quant.WeightQuant) for m in model.modules())
    run: Any = quant.integer_reference(model) if prepared else model.eval()
    starts = np.linspace(0, len(text) - SEQ_LEN - 1, num_windows, dtype=np.int64)
    losses = [
        float(loss_of(run, windows(text, part))) * len(part)
        for part in np.array_split(starts, num_windows // 32)
    ]
    return math.exp(sum(losses) / num_windows)


def distribute(model: nn.Module, codec: str, seed: int) -> nn.Module:
    """DDP with compressed gradients if there are several ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return model
    wrapped = DistributedDataParallel(model)
    if codec != "none":
        gradq.compress(wrapped, codec, seed=seed)
    return wrapped


def run(args: argparse.Namespace) -> list[tuple[str, float, float, int]]:
    """Train, quantize, train again; rows of (what, perplexity, average bits, bytes)."""
    text, held_out = load_text()
    torch.manual_seed(args.seed)
    model = GPT(args.width, args.layers, 4, SEQ_LEN)
    say = (lambda what: "") if args.quiet else (lambda what: what)
    fit(
        distribute(model, "none", args.seed),
        text,
        steps=args.steps,
        lr=2e-3,
        seed=args.seed,
        label=say("fp32"),
    )
    rows = [("fp32", perplexity(model, held_out), 32.0, 4 * sum(p.numel() for p in model.parameters()))]
    if args.save:
        torch.save(model.state_dict(), args.save)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    starts = np.random.default_rng(args.seed).integers(len(text) - SEQ_LEN, size=128)[rank::world]
    samples = [windows(text, part)[:, :-1] for part in np.array_split(starts, 8)]
    config = quant.Config(weights=args.weights, activations=args.activations)
    qmodel = quant.prepare(model, samples[0][:2], config)
    quant.calibrate(qmodel, samples, show_progress=not args.quiet)
    name = f"{args.weights} weights, {args.activations} activations"
    if args.average_bits:
        whole = windows(text, np.random.default_rng(args.seed).integers(len(text) - SEQ_LEN, size=32))[:, :-1]
        report = quant.sensitivity(qmodel, [whole], show_progress=not args.quiet)
        quant.assign_bits(qmodel, report, average_bits=args.average_bits)
        name = f"mixed {args.average_bits} bits"

    def note(what: str) -> None:
        rows.append(
            (what, perplexity(qmodel, held_out), quant.average_bits(qmodel), quant.model_bytes(qmodel))
        )

    note(f"PTQ {name}")
    if args.qat_steps:
        wrapped = distribute(qmodel, args.codec, args.seed)
        schedule = quant.RangeSchedule(wrapped, freeze_at=int(0.8 * args.qat_steps))
        label = say(f"QAT ({args.codec} gradients)")
        fit(
            wrapped,
            text,
            steps=args.qat_steps,
            lr=args.qat_lr,
            seed=args.seed + 1,
            label=label,
            schedule=schedule,
        )
        note(f"QAT {name}")
    return rows


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--codec", default="none", help="gradient codec under torchrun: none, int8, int4, …")
    parser.add_argument(
        "--weights", default="int8", help="weights format, e.g. int4, nf4, int4-g32 (default int8)"
    )
    parser.add_argument(
        "--activations", default="int8", help="activations format, e.g. int8-token (default int8)"
    )
    parser.add_argument(
        "--average-bits", type=float, default=0.0, help="mixed bits by sensitivity; 0: uniform"
    )
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--qat-steps", type=int, default=150)
    parser.add_argument("--qat-lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, default=None, help="write the float model's weights here")
    parser.add_argument("--json", type=Path, default=None, help="write the rows here")
    parser.add_argument("--quiet", action="store_true", help="only the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    try:
        rows = run(args)
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"{'':42} perplexity   bits    bytes")
            for what, score, bits, size in rows:
                gain = 100 * (score / rows[0][1] - 1)
                print(
                    f"{what:42} {score:8.4f} ({gain:+.2f} %) {bits:6.2f} {size:8d}  "
                    f"({rows[0][3] / size:.1f}x smaller)"
                )
            if args.json:
                args.json.write_text(json.dumps(rows))
    except gradq.GradqError as error:
        raise SystemExit(f"qat_gpt.py: error: {error}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
