"""Observers on real activations, formats on real weights, and refinements of PTQ, in three tables.

    python benchmarks/quant_observers.py             # writes benchmarks/results/quant_observers.md

Activations and weights are those of the CNN and the ViT of examples/qat_digits.py, trained on digits.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

import qat_digits as digits  # noqa: E402

from gradq import quant  # noqa: E402
from gradq.quant.calibrate import quantizers, weights  # noqa: E402
from gradq.quant.observers import OBSERVERS  # noqa: E402

FORMATS = ("int4", "nf4", "codebook4", "pot4", "int4-g32", "nf4-g32", "int3", "codebook3", "int8")


def activation_errors(
    model: Any, images: torch.Tensor, held_out: torch.Tensor, bits: int
) -> dict[str, float]:
    """Geometric mean over tensors of the NMSE on held-out activations, by observer."""
    errors = {}
    for name in OBSERVERS:
        config = quant.Config(activations=f"int{bits}", observer=name, weights="int8")
        qmodel = quant.prepare(model, images[:2], config)
        quant.calibrate(qmodel, list(images[:512].split(64)), show_progress=False)
        found: list[float] = []

        def hook(m: Any, inputs: Any, out: torch.Tensor, found: list[float] = found) -> None:
            x = inputs[0].double()
            found.append(float((out.double() - x).square().sum() / x.square().sum()))

        hooks = [q.register_forward_hook(hook) for q in quantizers(qmodel).values()]
        with torch.no_grad():
            qmodel(held_out)
        for handle in hooks:
            handle.remove()
        errors[name] = statistics.geometric_mean(found)
    return errors


def weight_errors(model: Any, images: torch.Tensor) -> dict[str, float]:
    """NMSE over all weights together, by format."""
    errors = {}
    for spec in FORMATS:
        qmodel = quant.prepare(model, images[:2], quant.Config(weights=spec, activations=None))
        error = power = 0.0
        for weight, quantizer in weights(qmodel).values():
            w = weight.detach().double()
            error += float((quantizer(weight).detach().double() - w).square().sum())
            power += float(w.square().sum())
        errors[spec] = error / power
    return errors


def refinements(model: Any, data: Any) -> list[tuple[str, str, float, float]]:
    """(weights, refinement, accuracy in %, KL of the outputs) of PTQ."""
    images, _, test, answers = data
    loader = list(images[:256].split(64))
    rows = []
    for spec in ("int4", "int3"):
        for what in ("none", "equalize", "bias", "rounding", "rounding + bias"):
            config = quant.Config(weights=spec, equalize=what == "equalize")
            qmodel = quant.prepare(model, images[:2], config)
            quant.calibrate(qmodel, loader, show_progress=False)
            if "rounding" in what:
                quant.round_weights(qmodel, loader, show_progress=False)
            if "bias" in what:
                quant.correct_bias(qmodel, loader, show_progress=False)
            with torch.no_grad():
                reference = model(test)
                out = quant.integer_reference(qmodel)(test)
            kl = quant.divergence([reference], [out])
            rows.append((spec, what, 100 * float((out.argmax(1) == answers).float().mean()), kl))
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "quant_observers.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = digits.load_digits()
    images, labels, test, _ = data
    models = {
        (kind, seed): digits.train_float(kind, images, labels, seed=seed, epochs=args.epochs)
        for kind in ("cnn", "vit")
        for seed in range(args.seeds)
    }
    lines = [
        "# Observers, formats and refinements of PTQ on trained models",
        "",
        f"`python benchmarks/quant_observers.py --seeds {args.seeds}`, {time.strftime('%Y-%m-%d')}, torch "
        f"{torch.__version__}, {platform.machine()}. Means over {args.seeds} seeds.",
        "",
        "## Observers: NMSE of held-out activations, geometric mean over tensors",
        "",
        "| model, bits | " + " | ".join(OBSERVERS) + " |",
        "|---|" + "---|" * len(OBSERVERS),
    ]
    for kind in ("cnn", "vit"):
        for bits in (8, 4):
            runs = [activation_errors(models[kind, s], images, test, bits) for s in range(args.seeds)]
            means = [statistics.mean(r[name] for r in runs) for name in OBSERVERS]
            lines.append(f"| {kind}, {bits} | " + " | ".join(f"{m:.3g}" for m in means) + " |")
            print(lines[-1], flush=True)
    lines += ["", "## Formats: NMSE of the weights", "", "| model | " + " | ".join(FORMATS) + " |"]
    lines.append("|---|" + "---|" * len(FORMATS))
    for kind in ("cnn", "vit"):
        runs = [weight_errors(models[kind, s], images) for s in range(args.seeds)]
        means = [statistics.mean(r[name] for r in runs) for name in FORMATS]
        lines.append(f"| {kind} | " + " | ".join(f"{m:.3g}" for m in means) + " |")
        print(lines[-1], flush=True)
    lines += [
        "",
        "## Refinements of PTQ, CNN, without labels",
        "",
        "| weights | refinement | accuracy | KL |",
        "|---|---|---|---|",
    ]
    every = [refinements(models["cnn", s], data) for s in range(args.seeds)]
    for rows in zip(*every, strict=True):
        spec, what = rows[0][:2]
        lines.append(
            f"| {spec} | {what} | {statistics.mean(r[2] for r in rows):.2f} "
            f"| {statistics.mean(r[3] for r in rows):.4f} |"
        )
    args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
