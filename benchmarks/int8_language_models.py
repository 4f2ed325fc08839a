"""Weight-only quantization of small language models: perplexity before and after, size, latency, memory.

    python benchmarks/int8_language_models.py --models llama --steps 200
    python benchmarks/int8_language_models.py --models gpt2 --steps 600      # learns more slowly

A GPT-2-like and a Llama-like model learn bytes of the standard library. Then their linear layers take 8, 4
or 3 bits (which take 4 in the file) in groups of 32: by rounding to the nearest code, behind activation-aware
scaling (AWQ), by GPTQ, and by both. The GPT's head is its embedding, which GPTQ leaves alone. Perplexities
are per byte, on held-out text, computed by ONNX Runtime from the written file (`MatMulNBits`).
Each finished model is kept in benchmarks/results/int8_language_models.json, and the table beside it.

`--memory` adds what scaling and rounding take beyond the model, for 2 and 8 layers of width 512.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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
# what is done, by the name in the table
STEPS: dict[str, tuple[Callable[..., Any], ...]] = {
    "nearest": (), "awq": (quant.awq,), "gptq": (quant.gptq,), "awq, gptq": (quant.awq, quant.gptq),
}  # fmt: skip
ROWS = [
    ("int8-g32", "nearest"),
    *(("int4-g32", how) for how in STEPS),
    *(("int3-g32", how) for how in STEPS),
]


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
        for weights, how in ROWS:
            config = quant.Config(weights=weights, activations=None)
            qmodel = quant.prepare(model, calibration[0][:2], config)
            for step in STEPS[how]:
                step(qmodel, calibration, show_progress=False)
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
                    "model": name, "steps": args.steps, "format": title, "mb": path.stat().st_size / 1e6,
                    "perplexity": perplexity(path, held_out), "ms": times[title].median_ms,
                    "faster": times[title].ratio,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def resident(key: str) -> float:
    """Megabytes of this process: VmRSS now, VmHWM at most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def extra_memory(layers: int, how: str) -> dict[str, Any]:
    """Megabytes that one way takes at most beyond what the prepared model takes; in a process of its own."""
    torch.manual_seed(0)
    model = GPT(512, layers, TOKENS, 256).eval()
    batches = torch.randint(256, (16, TOKENS)).split(4)
    config = quant.Config(weights="int4-g32", activations=None, weight_observer="minmax")
    qmodel = quant.prepare(model, batches[0], config, keep_float=False)
    with torch.no_grad():
        qmodel(batches[0])  # what a forward needs is there already
    size = sum(p.numel() * p.element_size() for p in qmodel.parameters()) / 1e6
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    for step in STEPS[how]:
        step(qmodel, batches, show_progress=False)
    return {"layers": layers, "how": how, "model_mb": size, "extra_mb": resident("VmHWM") - before}


def table(record: dict[str, Any]) -> str:
    """The record in Markdown."""
    facts = record["environment"]
    lines = [
        "# Weight-only quantization of small language models",
        "",
        f"`python benchmarks/int8_language_models.py`, {record['date']}, {facts['cpu']}, torch "
        f"{facts['torch']}; models trained on bytes (--steps in the table); held-out perplexity per byte, "
        f"{TOKENS} tokens at batch 1 on 1 thread, in turns, the thread's own time.",
        "",
        "| model | steps | weights | MB | perplexity | against fp32 | ms | faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rows in record["models"].values():
        for r in rows:
            change = 100 * (r["perplexity"] / rows[0]["perplexity"] - 1)
            lines.append(
                f"| {r['model']} | {r['steps']} "
                f"| {r['format']} | {r['mb']:.2f} | {r['perplexity']:.4f} | {change:+.2f} % | "
                f"{r['ms']:.2f} | {r['faster']:.2f} |"
            )
    if "memory" in record:
        lines += [
            "",
            "Memory: a GPT of width 512 with its weights in groups of 4 bits, 16 sequences of 64 tokens in "
            "batches of 4; what scaling or rounding takes at most beyond the prepared model.",
            "",
            "| layers | model, MB | how | extra, MB |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {r['layers']} | {r['model_mb']:.0f} | {r['how']} | {r['extra_mb']:.0f} |"
            for r in record["memory"]
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is not recorded yet, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--memory", action="store_true", help="measure memory")
    parser.add_argument(
        "--extra", nargs=2, help=argparse.SUPPRESS
    )  # layers and how: one measurement, printed
    parser.add_argument("--again", action="store_true", help="measure what is recorded once more")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "int8_language_models.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.extra:
        print(json.dumps(extra_memory(int(args.extra[0]), args.extra[1])))
        return
    text, held_out = load_text()
    record = json.loads(args.out.read_text()) if args.out.exists() else {"models": {}}
    for name in args.models:
        if name in record["models"] and not args.again:
            continue
        record["models"][name] = measure(name, text, held_out, args)
        save(record, args.out)
    if args.memory:
        record["memory"] = []
        for how in ("awq", "gptq"):
            for layers in ("2", "8"):
                command = [sys.executable, __file__, "--extra", layers, how]
                record["memory"].append(json.loads(subprocess.check_output(command)))
                print(record["memory"][-1], flush=True)
        save(record, args.out)


def save(record: dict[str, Any], out: Path) -> None:
    """The figures, and the table beside them."""
    record |= {"date": time.strftime("%Y-%m-%d"), "environment": environment()}
    out.write_text(json.dumps(record, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(record))


if __name__ == "__main__":
    main()
