"""Weight-only quantization of small language models: perplexity before and after, size, latency at batch 1.

    python benchmarks/int8_language_models.py                     # about 10 minutes
    python benchmarks/int8_language_models.py --steps 100

A GPT-2-like and a Llama-like model learn bytes of Python's standard library. Then their linear layers take 8,
4 or 3 bits (which take 4 in the file) in groups of 32, by rounding to the nearest code and by GPTQ.
Perplexities are per byte, on held-out text, computed by ONNX Runtime from the written file (`MatMulNBits`).
Each finished model is kept in benchmarks/results/int8_language_models.json, and the table beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

from int8_zoo import GPT, Llama  # noqa: E402
from train_gpt import load_text  # noqa: E402

from gradq import export, quant  # noqa: E402
from gradq.bench.records import environment  # noqa: E402
from gradq.export.timing import interleave, summarize  # noqa: E402

TOKENS = 64
MODELS = {
    "gpt2": lambda: GPT(192, 4, TOKENS, 256),
    "llama": lambda: Llama(192, 4, TOKENS, 256),
}


def windows(text: Tensor, count: int, seed: int) -> Tensor:
    """(count, TOKENS + 1) bytes."""
    starts = np.random.default_rng(seed).integers(len(text) - TOKENS, size=count)
    return text[torch.from_numpy(starts)[:, None] + torch.arange(TOKENS + 1)].long()


def fit(model: nn.Module, text: Tensor, steps: int) -> nn.Module:
    """AdamW with warm-up and cosine."""
    optimizer = torch.optim.AdamW(quant.param_groups(model, lr=2e-3, weight_decay=0.1), betas=(0.9, 0.95))
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, [2e-3] * 3, steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        batch = windows(text, 16, step)
        loss = functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cycle.step()
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.3f}", file=sys.stderr)
    return model.eval()


def perplexity(path: Path, held_out: Tensor) -> float:
    """Per byte, by ONNX Runtime."""
    session = export.session(path)
    name = session.get_inputs()[0].name
    total = 0.0
    for batch in windows(held_out, 256, 10_000).split(32):
        logits = torch.from_numpy(session.run(None, {name: batch[:, :-1].numpy()})[0])
        total += float(functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
    return math.exp(total / 8)


def measure(name: str, text: Tensor, held_out: Tensor, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One model in all its formats."""
    torch.manual_seed(0)
    model = MODELS[name]()
    if isinstance(model, GPT):  # its embedding is its head, too: torch's own start gives logits of 100
        nn.init.normal_(model.embed.weight, std=0.02)
        nn.init.normal_(model.positions.weight, std=0.02)
    fit(model, text, args.steps)
    calibration = [b[:, :-1] for b in windows(text, 64, 5_000).split(16)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Path] = {}
        for weights in ("int8-g32", "int4-g32", "int3-g32"):
            for how in ("nearest", "gptq"):
                config = quant.Config(weights=weights, activations=None)
                qmodel = quant.prepare(model, calibration[0][:2], config)
                if how == "gptq":
                    quant.gptq(qmodel, calibration, show_progress=False)
                if not files:
                    files["fp32"] = Path(folder) / "fp32.onnx"
                    export.float_onnx(qmodel, files["fp32"])
                title = f"{weights}, {how}"
                files[title] = Path(folder) / f"{len(files)}.onnx"
                export.onnx(qmodel, files[title])
        x = calibration[0][:1].numpy()
        sessions = {title: export.session(path) for title, path in files.items()}
        calls = {t: lambda s=s: s.run(None, {s.get_inputs()[0].name: x}) for t, s in sessions.items()}
        times = summarize(interleave(calls, seconds=args.seconds, clock=time.thread_time), "fp32")
        for title, path in files.items():
            rows.append(
                {
                    "model": name, "format": title, "mb": path.stat().st_size / 1e6,
                    "perplexity": perplexity(path, held_out), "ms": times[title].median_ms,
                    "faster": times[title].ratio,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def table(record: dict[str, Any]) -> str:
    """The record in Markdown."""
    facts = record["environment"]
    lines = [
        "# Weight-only quantization of small language models",
        "",
        f"`python benchmarks/int8_language_models.py`, {record['date']}, {facts['cpu']}, torch "
        f"{facts['torch']}, {record['steps']} steps of training on bytes; held-out perplexity per byte, "
        f"{TOKENS} tokens at batch 1 on 1 thread, in turns, the thread's own time.",
        "",
        "| model | weights | MB | perplexity | against fp32 | ms | faster |",
        "|---|---|---|---|---|---|---|",
    ]
    for rows in record["models"].values():
        for r in rows:
            change = 100 * (r["perplexity"] / rows[0]["perplexity"] - 1)
            lines.append(
                f"| {r['model']} | {r['format']} | {r['mb']:.2f} | {r['perplexity']:.4f} | {change:+.2f} % | "
                f"{r['ms']:.2f} | {r['faster']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is not recorded yet, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--again", action="store_true", help="measure what is recorded once more")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "int8_language_models.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text, held_out = load_text()
    record = json.loads(args.out.read_text()) if args.out.exists() else {"models": {}}
    for name in args.models:
        if name in record["models"] and not args.again:
            continue
        record["models"][name] = measure(name, text, held_out, args)
        record |= {"date": time.strftime("%Y-%m-%d"), "environment": environment(), "steps": args.steps}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(record))


if __name__ == "__main__":
    main()
