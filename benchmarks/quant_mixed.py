"""Mixed bits by sensitivity against uniform bits, on a deep network where few bits hurt.

    python benchmarks/quant_mixed.py                 # writes benchmarks/results/quant_mixed.csv and .md

The network has ResNet-50's layout (16 bottlenecks, 53 convolutions) with a quarter of its width, trained on
digits.
Accuracies are those of the integer reference, on 450 held-out images.
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
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

import qat_digits as digits  # noqa: E402

from gradq import quant  # noqa: E402


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1, added to the (projected) input."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        project = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.down = nn.Identity() if same else nn.Sequential(*project)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, 4·width, …)."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + self.down(x))


class DeepCNN(nn.Module):
    """ResNet-50's layout."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        layers: list[nn.Module] = []
        inputs = width
        for stage, (count, w) in enumerate(
            zip((3, 4, 6, 3), (width, 2 * width, 4 * width, 8 * width), strict=True)
        ):
            for i in range(count):
                layers.append(Bottleneck(inputs, w, 2 if i == 0 and stage in (1, 2) else 1))
                inputs = 4 * w
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 8, 8) to logits (B, 10)."""
        return self.head(self.layers(torch.relu(self.bn(self.stem(x)))).mean((2, 3)))


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--qat-epochs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "quant_mixed.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    images, labels, test, answers = digits.load_digits()
    rows: list[tuple[int, str, float, float, int]] = []

    def note(seed: int, what: str, model: nn.Module, bits: float, size: int) -> None:
        rows.append((seed, what, round(digits.accuracy(model, test, answers), 2), round(bits, 3), size))
        print(rows[-1], flush=True)

    def ptq(model: nn.Module, weights: str, observer: str) -> nn.Module:
        config = quant.Config(weights=weights, weight_observer=observer)
        qmodel = quant.prepare(model, images[:2], config)
        return quant.calibrate(qmodel, digits.batches(images), num_batches=4, show_progress=False)

    for seed in range(args.seeds):
        torch.manual_seed(seed)
        model = DeepCNN()
        digits.fit(model, images, labels, epochs=args.epochs, lr=2e-3, seed=seed)
        model.eval()
        note(seed, "fp32", model, 32, 4 * sum(p.numel() for p in model.parameters()))
        for observer in ("mse", "minmax"):
            for bits in (8, 4, 3):
                qmodel = ptq(model, f"int{bits}", observer)
                note(seed, f"uniform {bits}, {observer} scales", qmodel, bits, quant.model_bytes(qmodel))
        loader = list(images[:128].split(64))
        for observer in ("mse", "minmax"):
            qmodel = ptq(model, "int3", observer)
            quant.correct_bias(qmodel, loader, show_progress=False)
            note(
                seed, f"uniform 3, {observer} scales, biases corrected", qmodel, 3, quant.model_bytes(qmodel)
            )
            qmodel = ptq(model, "int8", observer)
            report = quant.sensitivity(qmodel, loader, show_progress=False)
            if seed == 0 and observer == "mse":
                report.to_csv(args.out.with_name("quant_sensitivity.csv"))
                report.plot(args.out.with_name("quant_sensitivity.png"))
            for budget in (4.0, 3.0):
                quant.assign_bits(qmodel, report, average_bits=budget)
                what = f"mixed {budget:g}, {observer} scales"
                note(seed, what, qmodel, quant.average_bits(qmodel), quant.model_bytes(qmodel))
            quant.correct_bias(qmodel, loader, show_progress=False)
            what = f"mixed 3, {observer} scales, biases corrected"
            note(seed, what, qmodel, quant.average_bits(qmodel), quant.model_bytes(qmodel))
        digits.fit(qmodel, images, labels, epochs=args.qat_epochs, lr=2e-4, seed=seed + 1)
        note(
            seed,
            "mixed 3, minmax scales, biases corrected, QAT",
            qmodel,
            quant.average_bits(qmodel),
            quant.model_bytes(qmodel),
        )
        with args.out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["seed", "what", "accuracy", "bits", "bytes"])
            writer.writerows(rows)
    lines = [
        f"# Mixed bits on a deep CNN (ResNet-50's layout, {args.seeds} seeds), integer reference",
        "",
        f"`python benchmarks/quant_mixed.py --seeds {args.seeds} --epochs {args.epochs}`, "
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {platform.machine()}. "
        "Before training, but for the last row.",
        "",
        "| weights | accuracy, mean | min … max | bits | bytes |",
        "|---|---|---|---|---|",
    ]
    for what in dict.fromkeys(r[1] for r in rows):
        found = [r for r in rows if r[1] == what]
        values = [r[2] for r in found]
        lines.append(
            f"| {what} | {statistics.mean(values):.2f} | {min(values):.2f} … {max(values):.2f} "
            f"| {found[0][3]} | {found[0][4]} |"
        )
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
