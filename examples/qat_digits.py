"""Quantize a digit classifier: float, post-training quantization, quantization-aware training, mixed bits.

    python examples/qat_digits.py --weights int4
    torchrun --nproc-per-node 2 examples/qat_digits.py --model vit --codec int8
    python examples/qat_digits.py --average-bits 4

Data: scikit-learn's 1797 digits of 8×8 pixels; the last 450, other writers, are held out. Accuracies are
those of the integer reference, that is of what an INT8 runtime computes; the float model's is its own.
"""

from __future__ import annotations

import argparse
import json
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

import gradq
from gradq import quant

# --- models: B batch, C channels, T patches ----------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions with batch norm, added to the input."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


class CNN(nn.Module):
    """A small residual network."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.block1 = Residual(width)
        self.down, self.bn_down = nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.block2 = Residual(2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 8, 8) to logits (B, 10)."""
        x = self.block1(torch.relu(self.bn(self.stem(x))))
        x = self.block2(torch.relu(self.bn_down(self.down(x))))
        return self.head(x.mean((2, 3)))


class ViT(nn.Module):
    """A small vision transformer on 2×2 patches, of torch's own layers."""

    def __init__(self, width: int = 48, num_layers: int = 3):
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 16, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 8, 8) to logits (B, 10)."""
        x = self.patch(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.encoder(x)).mean(1))


# --- data and training -------------------------------------------------------------------------------------


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (1347, 1, 8, 8) and labels, test images (450, 1, 8, 8) and labels."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError:
        raise SystemExit(
            "this example needs scikit-learn; install it with: pip install scikit-learn"
        ) from None
    digits = load()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    return images[:-450], labels[:-450], images[-450:], labels[-450:]


def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    lr: float,
    seed: int = 0,
    batch_size: int = 32,
    schedule: quant.RangeSchedule | None = None,
    label: str = "",
) -> None:
    """Adam with a one-cycle schedule; each rank takes its share of every batch."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    optimizer = torch.optim.AdamW(quant.param_groups(model, lr=lr, weight_decay=1e-2))
    per_epoch = len(images) // batch_size
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in optimizer.param_groups], epochs * per_epoch
    )
    model.train()
    start = time.monotonic()
    for epoch in range(epochs):
        order = torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(len(images)))
        total = 0.0
        for step in range(per_epoch):
            mine = order[step * batch_size : (step + 1) * batch_size][rank::world]
            loss = functional.cross_entropy(model(images[mine]), labels[mine])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
            if schedule is not None:
                schedule.step()
            total += loss.item()
        if label and rank == 0:
            took = time.monotonic() - start
            print(
                f"{label} epoch {epoch + 1}/{epochs}  loss {total / per_epoch:.4f}  {took:.0f} s",
                file=sys.stderr,
            )


@torch.no_grad()
def accuracy(model: Any, images: Tensor, labels: Tensor) -> float:
    """Share of right answers in per cent; of a prepared model, those of its integer reference."""
    run = quant.integer_reference(model) if _is_quantized(model) else model.eval()
    return 100.0 * float((run(images).argmax(1) == labels).float().mean())


def _is_quantized(model: nn.Module) -> bool:
    return any(isinstance(m, quant.ActQuant | quant.WeightQuant) for m in model.modules())


def train_float(
    kind: str, images: Tensor, labels: Tensor, *, seed: int, epochs: int, label: str = ""
) -> nn.Module:
    """The float model, trained with plain DDP when there are several ranks."""
    torch.manual_seed(seed)
    model: nn.Module = CNN() if kind == "cnn" else ViT()
    fit(
        distribute(model, "none"),
        images,
        labels,
        epochs=epochs,
        lr=4e-3 if kind == "cnn" else 3e-3,
        seed=seed,
        label=label,
    )
    return model.eval()


def distribute(model: nn.Module, codec: str, seed: int = 0) -> nn.Module:
    """DDP with compressed gradients if there are several ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return model
    wrapped = DistributedDataParallel(model)
    if codec != "none":
        gradq.compress(wrapped, codec, seed=seed)
    return wrapped


def batches(images: Tensor, size: int = 64) -> list[Tensor]:
    """Batches for calibration; each rank takes its share."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return list(images.split(size))[rank::world]


def run(args: argparse.Namespace) -> list[tuple[str, float, float, int]]:
    """Train, quantize, train again; rows of (what, accuracy in %, average bits, bytes)."""
    images, labels, test_images, test_labels = load_digits()
    say = "" if args.quiet else "fp32"
    model = train_float(args.model, images, labels, seed=args.seed, epochs=args.epochs, label=say)
    rows = [
        (
            "fp32",
            accuracy(model, test_images, test_labels),
            32.0,
            4 * sum(p.numel() for p in model.parameters()),
        )
    ]

    def note(what: str, qmodel: nn.Module) -> None:
        score = accuracy(qmodel, test_images, test_labels)
        rows.append((what, score, quant.average_bits(qmodel), quant.model_bytes(qmodel)))

    config = quant.Config(weights=args.weights, activations=args.activations, batch_norm=args.batch_norm)
    qmodel = quant.prepare(model, images[:2], config)
    loader = batches(images)
    quant.calibrate(qmodel, loader, num_batches=8, show_progress=not args.quiet)
    name = f"{args.weights} weights, {args.activations} activations"
    if args.average_bits:
        report = quant.sensitivity(qmodel, list(images.split(64)), show_progress=not args.quiet)
        quant.assign_bits(qmodel, report, average_bits=args.average_bits)
        name = f"mixed {args.average_bits} bits"
        if not args.quiet and (not dist.is_initialized() or dist.get_rank() == 0):
            print(report, file=sys.stderr)
    note(f"PTQ {name}", qmodel)
    wrapped = distribute(qmodel, args.codec, args.seed)
    steps = args.qat_epochs * (len(images) // 32)
    schedule = quant.RangeSchedule(wrapped, freeze_at=int(0.8 * steps), freeze_batch_norm_at=int(0.5 * steps))
    say = "" if args.quiet else f"QAT ({args.codec} gradients)"
    fit(
        wrapped,
        images,
        labels,
        epochs=args.qat_epochs,
        lr=args.qat_lr,
        seed=args.seed + 1,
        schedule=schedule,
        label=say,
    )
    note(f"QAT {name}", qmodel)
    check_replicas(qmodel)
    return rows


def check_replicas(model: nn.Module) -> None:
    """Every rank must hold the same weights, scales and zero points, bit for bit."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            first = value.clone()
            dist.broadcast(first, 0)
            same = torch.tensor(int(torch.equal(first, value)))
            dist.all_reduce(same, op=dist.ReduceOp.MIN)
            if not same:
                raise SystemExit(f"replicas differ in {name}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=("cnn", "vit"), default="cnn")
    parser.add_argument("--codec", default="none", help="gradient codec under torchrun: none, int8, int4, …")
    parser.add_argument(
        "--weights", default="int8", help="weights format, e.g. int4, nf4, int4-g32 (default int8)"
    )
    parser.add_argument("--activations", default="int8", help="activations format (default int8)")
    parser.add_argument(
        "--average-bits", type=float, default=0.0, help="mixed bits by sensitivity; 0: uniform"
    )
    parser.add_argument("--batch-norm", choices=("fold", "train"), default="fold")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--qat-epochs", type=int, default=5)
    parser.add_argument("--qat-lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="write the rows here")
    parser.add_argument("--quiet", action="store_true", help="only the table")
    return parser.parse_args(argv)


def main() -> None:
    """Run and print the table."""
    args = parse_args()
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    try:
        rows = run(args)
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"{'':42} accuracy     bits    bytes")
            for what, score, bits, size in rows:
                print(f"{what:42} {score:7.2f} % {bits:8.2f} {size:8d}  ({rows[0][3] / size:.1f}x smaller)")
            if args.json:
                args.json.write_text(json.dumps(rows))
    except gradq.GradqError as error:
        raise SystemExit(f"qat_digits.py: error: {error}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
