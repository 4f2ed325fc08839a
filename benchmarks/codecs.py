"""The frontier of the codecs: error against bits on the wire, error of the mean over ranks, speed.

    python benchmarks/codecs.py [--codecs rot4,trellis4] [--out benchmarks/results/codecs] [--no-speed]

Writes a table to the terminal, OUT.csv, OUT.json (with the setting) and, with matplotlib, OUT.png.

Inputs: 2**18 numbers, Gaussian, Laplace and Student-t (3 degrees of freedom); and gradients of the GPT of
examples/train_gpt.py (size 1m, 60 steps of Adam, then one batch of 16 windows a rank): its weights of two
dimensions, each encoded by itself. NMSE = ‖x - Q(x)‖² / ‖x‖². Error of the mean over W ranks: ‖mean Q(x_r) -
mean x_r‖² / ‖mean x_r‖², without feedback, one phase, averaged over 3 seeds. The floor is 2**(-2 bits), the
least error of any code for Gaussian data. Speed: 25 MB, one thread, CPU time, the least of 15 interleaved
runs, as a fraction of memcpy.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from train_gpt import build, load_text

import gradq
from gradq import codecs, rng
from gradq.codecs import Codec

NUM_SAMPLES = 1 << 18
SPEED_NUMEL = 25 * (1 << 20) // 4
SEEDS = 3
WORLD_SIZES = (2, 8, 64)


def synthetic() -> dict[str, Tensor]:
    """Samples by distribution."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(5, NUM_SAMPLES, generator=generator)
    uniform = torch.rand(2, NUM_SAMPLES, generator=generator).clamp_min(1e-12)
    return {
        "gaussian": normal[0],
        "laplace": uniform[0].log() - uniform[1].log(),
        "student-t": normal[1] / (normal[2:5].square().sum(0) / 3).sqrt(),
    }


def gradients(num_ranks: int, steps: int = 60) -> list[list[Tensor]]:
    """Gradients of the two-dimensional weights of the GPT, by rank."""
    text, _ = load_text()
    model, seq_len = build("1m", 64, 0), 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)

    def backward() -> None:
        starts = torch.randint(len(text) - seq_len - 1, (16,), generator=generator)
        windows = torch.stack([text[s : s + seq_len + 1] for s in starts.tolist()]).long()
        logits = model(windows[:, :-1])
        model.zero_grad()
        functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()

    for _ in range(steps):
        backward()
        optimizer.step()
    ranks = []
    for _ in range(num_ranks):
        backward()
        ranks.append([p.grad.flatten().clone() for p in model.parameters() if p.dim() > 1])
    return ranks


def nmse(codec: Codec, x: Tensor) -> float:
    """Of one tensor."""
    return float((codec.roundtrip(x) - x).double().square().sum() / x.double().square().sum())


def error_of_mean(codec: Codec, ranks: list[list[Tensor]]) -> float:
    """Without feedback, in one phase."""
    world_size, error, energy = len(ranks), 0.0, 0.0
    for seed in range(SEEDS):
        for index, tensors in enumerate(zip(*ranks, strict=True)):
            numel = tensors[0].numel()
            payloads = torch.empty(world_size, codec.nbytes(numel), dtype=torch.uint8)
            key = rng.dither_key(seed, 0, index, 1)
            for rank, x in enumerate(tensors):
                context = rng.EncodeContext(key=key, shift=rng.dither_shift(rank, world_size))
                codec.encode(x, payloads[rank], context=context)
            mean, out = torch.stack(tensors).mean(0), torch.empty(numel)
            codec.decode_mean(payloads, out)
            error += float((out - mean).double().square().sum())
            energy += float(mean.double().square().sum())
    return error / energy


def speed(codec: Codec) -> tuple[float, float]:
    """Encode with feedback (without, if the codec has none) and decode, as fractions of memcpy."""
    x, out = torch.randn(SPEED_NUMEL), torch.zeros(SPEED_NUMEL)
    old, new = torch.zeros(SPEED_NUMEL), torch.zeros(SPEED_NUMEL)
    payload = torch.zeros(codec.nbytes(SPEED_NUMEL), dtype=torch.uint8)
    context = rng.EncodeContext(key=rng.dither_key(0, 0, 0, 1))
    residuals = {"residual": old, "new_residual": new} if codec.wants_feedback else {}
    works = [
        lambda: out.copy_(x),
        lambda: codec.encode(x, payload, context=context, **residuals),
        lambda: codec.decode(payload, out),
    ]
    best = [float("inf")] * len(works)
    for turn in range(16):
        for index, work in enumerate(works):
            start = time.thread_time()
            work()
            if turn:
                best[index] = min(best[index], time.thread_time() - start)
        if turn and sum(best) > 0.1:
            break  # too slow to be in doubt
    return best[0] / best[1], best[0] / best[2]


def default_codecs() -> list[Codec]:
    """Every name as it is without feedback, and, where it differs, with."""
    chosen = []
    for name in codecs.names():
        codec = codecs.from_spec(name)
        if not isinstance(codec, codecs.ExactCodec) or name == "bf16":
            for feedback in (False, True):
                decided = codec.for_feedback(feedback)
                if decided not in chosen:
                    chosen.append(decided)
    return chosen


def measure(
    codec: Codec, data: dict[str, Tensor], real: list[list[Tensor]], with_speed: bool
) -> dict[str, Any]:
    """One row."""
    bits = codec.wire_bits_per_element(NUM_SAMPLES)
    row: dict[str, Any] = {"codec": str(codec), "bits": bits, "floor": 2.0 ** (-2 * bits)}
    row |= {name: nmse(codec, x) for name, x in data.items()}
    lost = sum(float((codec.roundtrip(x) - x).double().square().sum()) for x in real[0])
    row["gradients"] = lost / sum(float(x.double().square().sum()) for x in real[0])
    row |= {f"mean_of_{n}": error_of_mean(codec, real[:n]) for n in WORLD_SIZES if n <= len(real)}
    if with_speed:
        row["encode"], row["decode"] = speed(codec)
    return row


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Error on gradients against bits, with the floor."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6))
    for row in rows:
        axes.plot(row["bits"], row["gradients"], "o", markersize=4)
        axes.annotate(row["codec"], (row["bits"], row["gradients"]), fontsize=6)
    bits = [0.1 * k for k in range(10, 90)]
    axes.plot(bits, [2 ** (-2 * b) for b in bits], "k--", label="floor 2^(-2 bits)")
    axes.set(yscale="log", xlim=(0.9, 8.6), ylim=(1e-5, 2.0))
    axes.set(xlabel="bits an element on the wire", ylabel="NMSE on gradients of the GPT")
    axes.legend()
    figure.savefig(file, dpi=150, bbox_inches="tight")


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--codecs", default="", help="specs, separated by ; or ,  (default: all)")
    parser.add_argument("--out", default="benchmarks/results/codecs")
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--no-speed", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    specs = [s for s in args.codecs.split(";" if ";" in args.codecs else ",") if s]
    chosen = [codecs.from_spec(s) for s in specs] or default_codecs()
    data, real = synthetic(), gradients(args.ranks)
    rows = []
    for codec in chosen:
        rows.append(measure(codec, data, real, not args.no_speed))
        if len(rows) == 1:
            print("  ".join(f"{name:>10}" for name in rows[0]))
        print(
            "  ".join(f"{v:10.4g}" if isinstance(v, float) else f"{v:>10}" for v in rows[-1].values()),
            flush=True,
        )
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    setting = {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {
            "gradq": gradq.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": platform.processor() or platform.machine(),
    }
    out.with_suffix(".json").write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    try:
        plot(rows, out.with_suffix(".png"))
    except ImportError:
        print("no picture: pip install 'gradq[plot]'")


if __name__ == "__main__":
    main()
