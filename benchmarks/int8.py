"""INT8 against fp32 in ONNX Runtime: size, latency and accuracy of four kinds of models.

    python benchmarks/int8.py                          # everything; 1 thread, about 40 minutes
    python benchmarks/int8.py --models mlp --seconds 5
    python benchmarks/int8.py --smoke                  # tiny models, under two minutes

Contenders, all in one process and in turns of 50 ms or one call: fp32; gradq's exports;
onnxruntime.quantization (static U8S8, and dynamic where it applies); torchao PT2E if --torchao names a
Python that has it. Sizes are bytes of files, latencies medians over rounds, ratios (to fp32, and to the
fastest file of onnxruntime.quantization) medians of the rounds' own ratios. A turn counts with the later
half of its calls, as a service calls a session again and again; "cold" is the first call of a turn, after
the other contenders have emptied the caches. Accuracy is that of small models of the same kind trained on
scikit-learn's digits, computed by ONNX Runtime on 450 held-out images.

Writes benchmarks/results/int8.csv, .md, .png and a JSON record.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

import int8_models as zoo  # noqa: E402
import int8_peers as peers  # noqa: E402

from gradq import export, quant  # noqa: E402
from gradq.bench.records import environment, write_record  # noqa: E402
from gradq.export.timing import interleave, summarize  # noqa: E402

PATHS = ("out", "torchao")  # of this machine: not for the record


@dataclass
class Row:
    """One contender on one model."""

    model: str
    contender: str
    size_mb: float
    smaller: float
    batch: int
    median_ms: float
    low_ms: float
    high_ms: float
    faster: float
    faster_low: float
    faster_high: float
    cold_ms: float
    cold_faster: float
    rounds: int
    peer: float  # the fastest onnxruntime.quantization file's time over its time, round by round
    peer_low: float
    peer_high: float
    nmse: float
    float_products: int


def configs(kind: str, target: str, *, large: bool) -> dict[str, quant.Config]:
    """What gradq exports of a kind of model: name → configuration.

    Large models have random weights: how ranges are chosen does not matter, so the quickest way will do.
    """
    how: dict[str, Any] = {"observer": "minmax", "weight_observer": "minmax"} if large else {}
    wide = "int8" if target != "x86-avx2" else "int7"  # without VNNI products of 8-bit weights overflow
    out = {f"gradq w{wide[3:]}a8": quant.Config(weights=wide, **how)}
    if kind in ("cnn", "mobile"):
        out["gradq w4a8"] = quant.Config(weights="int4", **how)
    if kind == "cnn" and not large:
        out["gradq codebook4"] = quant.Config(weights="codebook4", **how)
    if kind in ("transformer", "mlp"):
        out["gradq dynamic"] = quant.Config(weights=wide, activations="int8-batch", **how)
    if kind == "mlp":
        for bits in (8, 4):
            groups = f"int{bits}-g{128 if large else 32}"
            config = quant.Config(weights=groups, activations="int8-token", **how)
            out[f"gradq w{bits} MatMulNBits"] = config
    return out


def contenders(kind: str, smoke: bool, folder: Path, torchao: str | None) -> tuple[dict[str, Path], Any]:
    """Files of every contender for the large model of a kind, and a function batch size → input."""
    model, inputs = zoo.large(kind, smoke)
    calibration = [inputs(4) for _ in range(2)]
    target = quant.detect_target()
    files: dict[str, Path] = {}
    for name, config in configs(kind, target, large=True).items():
        started = time.perf_counter()
        qmodel = quant.prepare(model, inputs(2), config)
        quant.calibrate(qmodel, calibration, show_progress=False)
        if "fp32" not in files:
            files["fp32"] = folder / f"{kind}-fp32.onnx"
            export.float_onnx(qmodel, files["fp32"])
        files[name] = folder / f"{kind}-{len(files)}.onnx"
        report = export.onnx(qmodel, files[name])
        print(f"{report} ({time.perf_counter() - started:.0f} s)", flush=True)
    name = export.session(files["fp32"]).get_inputs()[0].name
    feeds = [{name: x.numpy()} for x in calibration]
    linear = kind in ("transformer", "mlp")
    files |= peers.onnxruntime_files(kind, files["fp32"], feeds, folder, target, linear=linear)
    if torchao is not None:
        files |= peers.torchao_files(kind, torchao, folder, smoke, target)
    return files, inputs


def measure(
    kind: str, files: dict[str, Path], inputs: Callable[[int], torch.Tensor], args: argparse.Namespace
) -> list[Row]:
    """Latencies in turns, sizes, and how far each output is from fp32's."""
    clock = time.thread_time if args.clock == "cpu" else time.perf_counter
    sessions = {}
    for name, path in files.items():
        # peers run as their users run them: with the default kernel
        sessions[name] = export.session(path, precise=None if name.startswith("gradq") else False)
    floats = {name: len(export.operators(path).float_products) for name, path in files.items()}
    rows = []
    for batch in args.batches:
        x = inputs(batch).numpy()
        feeds = {n: {s.get_inputs()[0].name: x} for n, s in sessions.items()}
        outputs = {n: s.run(None, feeds[n])[0] for n, s in sessions.items()}
        calls = {n: lambda s=s, f=feeds[n]: s.run(None, f) for n, s in sessions.items()}
        raw = interleave(calls, seconds=args.seconds, min_rounds=7, clock=clock)
        times, cold = summarize(raw, "fp32"), summarize(raw, "fp32", first=True)
        best = min((n for n in times if n.startswith("onnxruntime")), key=lambda n: times[n].median_ms)
        peers_times = summarize(raw, best)
        truth = outputs["fp32"].astype(np.float64)
        for name, latency in times.items():
            error = outputs[name].astype(np.float64) - truth
            size, base = files[name].stat().st_size, files["fp32"].stat().st_size
            rows.append(
                Row(
                    kind, name, size / 1e6, base / size, batch, latency.median_ms, latency.low_ms,
                    latency.high_ms, latency.ratio, latency.ratio_low, latency.ratio_high,
                    cold[name].median_ms, cold[name].ratio, latency.rounds,
                    peers_times[name].ratio, peers_times[name].ratio_low, peers_times[name].ratio_high,
                    float((error**2).sum() / (truth**2).sum()), floats[name],
                )
            )  # fmt: skip
            print(
                f"{kind:12} batch {batch:3} {name:28} {size / 1e6:7.2f} MB {base / size:5.2f}x smaller "
                f"{latency.median_ms:9.3f} ms {latency.ratio:5.2f}x faster "
                f"({latency.ratio_low:.2f} … {latency.ratio_high:.2f}; cold {cold[name].ratio:.2f}), "
                f"{peers_times[name].ratio:.2f}x as fast as {best}",
                flush=True,
            )
    return rows


def accuracies(kind: str, seeds: int, smoke: bool, folder: Path) -> list[dict[str, Any]]:
    """Digits: accuracy of fp32 and of every gradq export, in ONNX Runtime."""
    out = []
    for seed in range(seeds):
        model, calibration, images, labels = zoo.trained(kind, seed, smoke)
        with torch.no_grad():  # before biases are corrected, which changes the model in float as well
            fp32 = 100 * float((model(images).argmax(-1) == labels).double().mean())
        for name, config in configs(kind, quant.detect_target(), large=False).items():
            qmodel = quant.prepare(model, images[:2], config)
            quant.calibrate(qmodel, calibration, show_progress=False)
            quant.correct_bias(qmodel, calibration, show_progress=False)
            path = folder / "digits.onnx"
            export.onnx(qmodel, path)
            report = export.verify(
                path,
                qmodel,
                [(images, labels)],
                batch_sizes=(),
                strict=False,
                show_progress=False,
                max_accuracy_loss=100,
            )
            out.append(
                {
                    "model": kind, "seed": seed, "contender": name, "fp32": round(fp32, 2),
                    "int8": round(report.accuracy["int8"], 2), "equal": report.agreement.equal,
                    "failures": report.failures,
                }
            )  # fmt: skip
            print(out[-1], flush=True)
    return out


def write(rows: list[Row], digits: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """CSV, table, plot and record."""
    out = args.out
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])) if rows else ["model"])
        writer.writeheader()
        writer.writerows(asdict(r) for r in rows)
    facts = environment()
    lines = [
        "# INT8 against fp32 in ONNX Runtime",
        "",
        f"`python benchmarks/int8.py {' '.join(sys.argv[1:])}`, {time.strftime('%Y-%m-%d')}, {facts['cpu']} "
        f"({quant.detect_target()}), torch {facts['torch']}, 1 thread, in turns, {args.clock} time.",
        "",
        "| model | contender | MB | smaller | batch | ms (10 … 90 %) | faster (10 … 90 %) | cold: ms, faster "
        "| against the best onnxruntime.quantization (10 … 90 %) | error (NMSE) | float products |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.model} | {r.contender} | {r.size_mb:.2f} | {r.smaller:.2f} | {r.batch} | "
            f"{r.median_ms:.3g} ({r.low_ms:.3g} … {r.high_ms:.3g}) | "
            f"{r.faster:.2f} ({r.faster_low:.2f} … {r.faster_high:.2f}) | "
            f"{r.cold_ms:.3g}, {r.cold_faster:.2f} | "
            f"{r.peer:.2f} ({r.peer_low:.2f} … {r.peer_high:.2f}) | {r.nmse:.1e} | {r.float_products} |"
        )
    if digits:
        lines += [
            "",
            "Small models of the same kinds on digits, 450 held-out images (one image is 0.22 points); "
            "biases corrected, no training after quantization.",
            "",
            "| model | contender | fp32, % | quantized, % | points | equal to the integer reference |",
            "|---|---|---|---|---|---|",
        ]
        for kind, name in dict.fromkeys((d["model"], d["contender"]) for d in digits):
            found = [d for d in digits if d["model"] == kind and d["contender"] == name]
            fp32, int8 = (sum(d[k] for d in found) / len(found) for k in ("fp32", "int8"))
            equal = min(d["equal"] for d in found)
            shown = "every bit" if equal == 1 else f"{100 * equal:.2f} % of the outputs"
            lines.append(f"| {kind} | {name} | {fp32:.2f} | {int8:.2f} | {int8 - fp32:+.2f} | {shown} |")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if rows:
        zoo.plot(rows, out.with_suffix(".png"))
    write_record(
        out.parent, out.stem, settings={k: str(v) for k, v in vars(args).items() if k not in PATHS},
        environment=facts, target=quant.detect_target(), rows=[asdict(r) for r in rows], digits=digits,
    )  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(zoo.KINDS), choices=zoo.KINDS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--seconds", type=float, default=60.0, help="per model and batch size")
    parser.add_argument("--seeds", type=int, default=3, help="trainings on digits; 0 for none")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--torchao", help="a Python with torch, torchao and onnxscript")
    parser.add_argument("--smoke", action="store_true", help="tiny models")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "int8.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rows: list[Row] = []
    digits: list[dict[str, Any]] = []
    for kind in args.models:
        with tempfile.TemporaryDirectory() as folder:
            files, inputs = contenders(kind, args.smoke, Path(folder), args.torchao)
            rows += measure(kind, files, inputs, args)
            digits += accuracies(kind, args.seeds, args.smoke, Path(folder))
        write(rows, digits, args)


if __name__ == "__main__":
    main()
