"""Tokens a second at batch 1 in ONNX Runtime, decoding with a cache of keys and values: fp32, int8 and int4.

    python benchmarks/int8_decoding.py                      # about 10 minutes
    python benchmarks/int8_decoding.py --width 192 --layers 2 --vocabulary 256

A GPT-2-like and a Llama-like model of 60 M parameters (random weights: they do not matter to the time) are
written as one file that takes tokens and the keys and values of those before them, and gives logits and all
keys and values so far: a prompt and single tokens run through the same file, with any number of either.
Every file's logits, token by token through the cache, are compared with those of one whole pass without a
cache. Then all files decode in turns. The figures stand in benchmarks/results/int8_decoding.json, and a table
of them beside it.
"""

from __future__ import annotations

import argparse
import json
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

from int8_zoo import GPT, Llama, turn  # noqa: E402

from gradq import export, quant  # noqa: E402
from gradq.bench.records import environment  # noqa: E402
from gradq.export.timing import interleave, summarize  # noqa: E402

LENGTH = 256
MODELS = {"gpt2": GPT, "llama": Llama}
FORMATS: dict[str, tuple[str | None, str | None]] = {
    "fp32": (None, None),
    "int8-g32": ("int8-g32", None),
    "int8-g32, int8-token": ("int8-g32", "int8-token"),
    "int4-g32": ("int4-g32", None),
    "int4-g32, int8-token": ("int4-g32", "int8-token"),
}
Cache = tuple[Tensor, ...]


class Decoder(nn.Module):
    """A language model of the zoo with a cache, on the very layers of the model.

    Args:
        model: GPT or Llama.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.rotary = model, isinstance(model, Llama)

    def forward(self, ids: Tensor, past: Cache) -> tuple[Tensor, Cache]:
        """(B, T) ids to logits (B, T, vocabulary); the cache's tensors, two a layer, grow by T.

        Each is (B, heads, tokens, size).
        """
        before, count = past[0].shape[2], ids.shape[1]
        at = torch.arange(before, before + count, device=ids.device)
        seen = torch.arange(before + count, device=ids.device)[None] <= at[:, None]
        x = self.model.embed(ids)
        if not self.rotary:
            x = x + self.model.positions(at)
        angles = self.model.angles[before : before + count] if self.rotary else None
        new: list[Tensor] = []
        for i, block in enumerate(self.model.blocks):
            y, k, v = self.attend(block.attention, block.norm1(x), angles, past[2 * i : 2 * i + 2], seen)
            x, new = x + y, [*new, k, v]
            y = block.norm2(x)
            if self.rotary:
                x = x + block.down(functional.silu(block.gate(y)) * block.up(y))
            else:
                x = x + block.narrow(functional.gelu(block.wide(y), approximate="tanh"))
        return self.model.head(self.model.norm(x)), tuple(new)

    @staticmethod
    def attend(
        layer: Any, x: Tensor, angles: Tensor | None, past: Cache, seen: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output, and the keys and values so far."""
        q, k, v = (
            part(x).view(x.shape[0], x.shape[1], -1, layer.size).transpose(1, 2)
            for part in (layer.query, layer.key, layer.value)
        )
        if angles is not None:
            q, k = turn(q, angles), turn(k, angles)
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        wide = [t.repeat_interleave(layer.shared, 1) if layer.shared > 1 else t for t in (k, v)]
        y = functional.scaled_dot_product_attention(q, *wide, attn_mask=seen)
        return layer.out(y.transpose(1, 2).reshape(x.shape)), k, v


def empty_cache(model: nn.Module, length: int, batch: int = 1) -> Cache:
    """A cache of `length` tokens, zeros."""
    made = []
    for block in model.blocks:  # type: ignore[union-attr]
        layer = block.attention
        shape = (batch, layer.heads // layer.shared, length, layer.size)
        made += [torch.zeros(shape), torch.zeros(shape)]
    return tuple(made)


class Session:
    """A file that decodes.

    Args:
        path: from `write`.
        cache: the empty cache to begin with, of length 0.
    """

    def __init__(self, path: Path, cache: Cache):
        self.session, self.cache = export.session(path), [t.numpy() for t in cache]
        self.names = [i.name for i in self.session.get_inputs()]

    def step(self, ids: np.ndarray[Any, Any], cache: list[Any]) -> tuple[np.ndarray[Any, Any], list[Any]]:
        """(1, T) ids → logits (1, T, vocabulary), and the cache with them."""
        logits, *cache = self.session.run(None, dict(zip(self.names, [ids, *cache], strict=True)))
        return logits, cache

    def decode(self, prompt: np.ndarray[Any, Any], cache: list[Any], count: int) -> None:
        """Greedily, behind a prompt of one token."""
        for _ in range(count):
            logits, cache = self.step(prompt, cache)
            prompt = logits[:, -1:].argmax(-1)


def write(decoder: Decoder, weights: str | None, activations: str | None, path: Path) -> None:
    """One file."""
    example = (torch.zeros(2, 3, dtype=torch.int64), empty_cache(decoder.model, 5, 2))
    config = quant.Config(
        weights=weights or "int8", activations=activations, embeddings=None, weight_observer="minmax"
    )
    qmodel = quant.prepare(decoder, example, config)
    axes = {"ids": {1: "tokens"}} | {f"past.{i}": {2: "past"} for i in range(len(example[1]))}
    if weights is None:
        export.float_onnx(qmodel, path, dynamic_axes=axes)
    else:
        export.onnx(qmodel, path, dynamic_axes=axes)


def decibels(got: Any, truth: Any) -> float:
    """Signal to noise."""
    return float(10 * np.log10(np.square(truth).sum() / (np.square(got - truth).sum() + 1e-30)))


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One model in fp32, int8 and int4."""
    torch.manual_seed(0)
    model = MODELS[name](args.width, args.layers, LENGTH, args.vocabulary).eval()
    decoder, nothing = Decoder(model).eval(), empty_cache(model, 0)
    parameters = sum(p.numel() for p in model.parameters())
    ids = torch.randint(args.vocabulary, (1, 24))
    with torch.no_grad():
        truth = model(ids).numpy()
    rows: dict[str, dict[str, Any]] = {}
    sessions: dict[str, Session] = {}
    caches: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for title, (weights, activations) in FORMATS.items():
            path = (args.folder or Path(temporary)) / f"{name} {title}.onnx"
            if not path.exists():
                write(decoder, weights, activations, path)
            session = sessions[title] = Session(path, nothing)
            whole, _ = session.step(ids.numpy(), session.cache)
            cache, steps = session.cache, []
            for i in range(ids.shape[1]):
                logits, cache = session.step(ids[:, i : i + 1].numpy(), cache)
                steps.append(logits)
            _, caches[title] = session.step(np.zeros((1, args.past), np.int64), session.cache)
            rows[title] = {
                "format": title, "parameters": parameters, "mb": path.stat().st_size / 1e6,
                "steps_against_whole_db": decibels(np.concatenate(steps, 1), whole),
                "against_model_db": decibels(whole, truth),
            }  # fmt: skip
            print(name, rows[title], flush=True)
        first = np.zeros((1, 1), np.int64)
        calls: dict[str, Callable[[], object]] = {
            t: lambda s=s, c=caches[t]: s.decode(first, c, args.tokens)  # type: ignore[misc]
            for t, s in sessions.items()
        }
        times = summarize(interleave(calls, seconds=args.seconds, clock=time.thread_time), "fp32")
    for title, t in times.items():
        rows[title] |= {
            "tokens_a_second": 1e3 * args.tokens / t.median_ms,
            "tokens_low": 1e3 * args.tokens / t.high_ms, "tokens_high": 1e3 * args.tokens / t.low_ms,
            "faster": t.ratio, "faster_low": t.ratio_low, "faster_high": t.ratio_high, "rounds": t.rounds,
        }  # fmt: skip
    return list(rows.values())


def table(record: dict[str, Any]) -> str:
    """The record in Markdown."""
    facts, args = record["environment"], record["arguments"]
    lines = [
        "# Tokens a second with a cache of keys and values",
        "",
        f"`python benchmarks/int8_decoding.py`, {record['date']}, {facts['cpu']}, torch {facts['torch']}: "
        f"ONNX Runtime on 1 thread, batch 1, {args['tokens']} tokens behind a cache of {args['past']}, in "
        "turns, the thread's own time; medians, the middle 80 % in brackets. Linear layers in groups of 32 "
        "(`MatMulNBits`), embeddings in float; with int8-token the runtime quantizes the layers' inputs, "
        "too. Steps: the logits token by token through the cache, compared with those of one whole pass of "
        "the same file. Model: the file compared with the float model in torch (the weights are random: what "
        "few bits cost a trained model stands in int8_language_models.md). 8-bit groups with float inputs "
        "are dequantized at load: as `MatMulNBits` they decoded 2.4 and 2.6 tokens a second, .07 and .08 of "
        "fp32.",
        "",
        "| model | parameters | weights | MB | tokens a second | against fp32 | steps, dB | model, dB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in record["models"].items():
        for r in rows:
            speed = f"{r['tokens_a_second']:.1f} ({r['tokens_low']:.1f} to {r['tokens_high']:.1f})"
            ratio = f"{r['faster']:.2f} ({r['faster_low']:.2f} to {r['faster_high']:.2f})"
            what = f"{name} | {r['parameters'] / 1e6:.1f} M | {r['format']} | {r['mb']:.1f}"
            lines.append(
                f"| {what} | {speed} | {ratio} "
                f"| {r['steps_against_whole_db']:.0f} | {r['against_model_db']:.1f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--past", type=int, default=64, help="tokens in the cache when decoding begins")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of a timed call")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--folder", type=Path, help="keep the files here, and take those that stand here")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "int8_decoding.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = json.loads(args.out.read_text()) if args.out.exists() else {"models": {}}
    kept = {k: v for k, v in vars(args).items() if k not in ("out", "models", "folder")}
    for name in args.models:
        record["models"][name] = measure(name, args)
        record |= {"date": time.strftime("%Y-%m-%d"), "environment": environment(), "arguments": kept}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(record))


if __name__ == "__main__":
    main()
