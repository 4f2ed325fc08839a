"""Train a small byte-level GPT with compressed gradients.

    python examples/train_gpt.py
    torchrun --nproc-per-node 2 examples/train_gpt.py --codec int4

All that gradq adds to a usual DDP script is the line with `gradq.compress`. The text is the source of
Python's standard library, so nothing is downloaded. The batch of a step is a pure function of (seed, step,
rank): the same seed gives the same run, and a resumed run continues it bit for bit. (Except with --codec none
on more than 2 ranks, to rounding: there the order of DDP's own sums depends on its buckets.)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import gradq
from gradq.bench.data import standard_library_text
from gradq.bench.records import environment

# about as many parameters as the name says: width, layers, heads
PRESETS = {
    "tiny": (32, 2, 2),
    "1m": (128, 5, 4),
    "5m": (256, 6, 4),
    "10m": (384, 6, 6),
    "25m": (512, 8, 8),
}
NUM_TOKENS = 256  # bytes
TEXT_BYTES = 4_000_000
NUM_EVAL_WINDOWS = 256
FIXED = ("params", "seq_len", "batch_size", "accumulate", "steps", "lr", "warmup", "seed", "precision")
FEEDBACK = {"auto": "auto", "on": True, "off": False}


# --- the model: B batch, T time, C channels, H heads, c channels of a head ---------------------------------


class Block(nn.Module):
    """Attention and MLP, each after a norm and added to the stream."""

    def __init__(self, width: int, num_heads: int, num_layers: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for layer in (self.qkv, self.up, self.proj, self.down):
            into_stream = layer is self.proj or layer is self.down
            nn.init.normal_(layer.weight, std=0.02 * ((2 * num_layers) ** -0.5 if into_stream else 1.0))
            nn.init.zeros_(layer.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        qkv_BTHc = self.qkv(self.norm1(x_BTC)).unflatten(-1, (3 * self.num_heads, -1))
        q_BHTc, k_BHTc, v_BHTc = qkv_BTHc.transpose(1, 2).chunk(3, dim=1)
        mixed_BHTc = functional.scaled_dot_product_attention(q_BHTc, k_BHTc, v_BHTc, is_causal=True)
        x_BTC = x_BTC + self.proj(mixed_BHTc.transpose(1, 2).flatten(2))
        return x_BTC + self.down(functional.gelu(self.up(self.norm2(x_BTC))))


class GPT(nn.Module):
    """A decoder-only transformer over bytes, with learned positions."""

    def __init__(self, width: int, num_layers: int, num_heads: int, seq_len: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(NUM_TOKENS, width), nn.Embedding(seq_len, width)
        self.blocks = nn.ModuleList(Block(width, num_heads, num_layers) for _ in range(num_layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, NUM_TOKENS, bias=False)
        for layer in (self.tokens, self.positions, self.head):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, 256] of the next byte."""
        x_BTC = self.tokens(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.head(self.norm(x_BTC))


def build(params: str = "1m", seq_len: int = 64, seed: int = 0) -> GPT:
    """The model of a preset; the same seed gives the same weights."""
    if params not in PRESETS:
        raise ValueError(f"no model size {params!r}; choose from {', '.join(PRESETS)}")
    torch.manual_seed(seed)
    return GPT(*PRESETS[params], seq_len)


# --- the text ----------------------------------------------------------------------------------------------


def load_text() -> tuple[Tensor, Tensor]:
    """The standard library's source as bytes: for training, and every 16th file for validation."""
    return standard_library_text(TEXT_BYTES)


# --- training ----------------------------------------------------------------------------------------------


class Trainer:
    """Model, optimizer, data and gradq's handle: one optimizer step at a time."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.rank, self.world_size = args, dist.get_rank(), dist.get_world_size()
        self.fixed = {name: getattr(args, name) for name in FIXED}  # a resumed run must have the same
        self.train_text, self.val_text = load_text()
        self.model = DistributedDataParallel(build(args.params, args.seq_len, args.seed))
        feedback, self.codec = FEEDBACK[args.feedback], self.codec_of(0)
        self.handle = gradq.compress(
            self.model, rules_of(self.codec), seed=args.seed, feedback=feedback, collective=args.collective
        )
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)

    def codec_of(self, step: int) -> str:
        """The codec of a step: int8 before --codec-start."""
        return self.args.codec if step >= self.args.codec_start else "int8"

    def use_codec_of(self, step: int) -> None:
        """Change the codec if it is time."""
        if self.codec != (codec := self.codec_of(step)):
            self.handle.set_spec(rules_of(codec))
            self.codec = codec

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        peak, warmup = self.args.lr, self.args.warmup
        if step < warmup:
            return peak * (step + 1) / warmup
        return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (self.args.steps - warmup)))

    def loss(self, text: Tensor, starts: np.ndarray) -> Tensor:
        """Mean cross-entropy, in nats a byte, of the windows of the text that begin at starts."""
        window_BT = text[torch.from_numpy(starts)[:, None] + torch.arange(self.args.seq_len + 1)].long()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.precision == "bf16"):
            logits_BTV = self.model(window_BT[:, :-1])
        return functional.cross_entropy(logits_BTV.float().flatten(0, 1), window_BT[:, 1:].flatten())

    def step(self, step: int, *, communicate: bool = True) -> tuple[float, float]:
        """One optimizer step; returns this rank's loss and the milliseconds it took."""
        start, args, total = time.perf_counter(), self.args, 0.0
        for micro in range(args.accumulate):
            rng = np.random.default_rng((args.seed, step, self.rank, micro))
            starts = rng.integers(len(self.train_text) - args.seq_len, size=args.batch_size)
            exchange = communicate and micro == args.accumulate - 1
            with nullcontext() if exchange else self.model.no_sync():
                loss = self.loss(self.train_text, starts) / args.accumulate
                loss.backward()
            total += loss.item()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, 1e3 * (time.perf_counter() - start)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over fixed windows of the held-out files, shared out over the ranks."""
        last = len(self.val_text) - self.args.seq_len - 1
        starts = np.linspace(0, last, NUM_EVAL_WINDOWS, dtype=np.int64)[self.rank :: self.world_size]
        losses: list[float] = []
        for batch in np.array_split(starts, math.ceil(len(starts) / 16)):
            losses += [self.loss(self.val_text, batch).item()] * len(batch)
        return mean_over_ranks(losses)

    def save(self, step: int) -> None:
        """Write a checkpoint."""
        state = dict(zip(("model", "optimizer"), get_state_dict(self.model, self.optimizer), strict=True))
        state |= {"gradq": self.handle.state_dict(), "progress": {"step": step} | self.fixed}
        dcp.save(state, checkpoint_id=self.args.checkpoint / f"step-{step:08d}")

    def load(self) -> int:
        """Load the newest checkpoint; returns how many steps it has done."""
        path = finished_checkpoints(self.args.checkpoint)[-1]
        progress = {"step": 0} | self.fixed
        dcp.load({"progress": progress}, checkpoint_id=path)
        for name, value in self.fixed.items():
            if progress[name] != value:
                raise gradq.ConfigError(f"{path} has {name}={progress[name]}, this run {name}={value}")
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=path)
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self.use_codec_of(progress["step"] - 1)  # that of the checkpoint
        gradq.load_checkpoint(self.handle, path, key="gradq")
        if progress["step"] >= (end := self.args.stop_at or self.args.steps):
            raise gradq.ConfigError(f"{path} has done {progress['step']} steps, this run ends at {end}")
        return progress["step"]


def rules_of(codec: str) -> Any:
    """A spec as it is; {"role:embedding": "int8", "*": "int3"} as the rules it stands for."""
    return json.loads(codec) if codec.startswith("{") else codec


def mean_over_ranks(values: list[float]) -> float:
    """The mean of all ranks' values."""
    pair = torch.tensor([sum(values), len(values)], dtype=torch.float64)
    dist.all_reduce(pair)
    return float(pair[0] / pair[1])


def finished_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in a directory, oldest first."""
    return sorted(done.parent for done in directory.glob("step-*/.metadata"))


def train(args: argparse.Namespace) -> None:
    """The training loop."""
    trainer = Trainer(args)
    first, last = trainer.load() if args.resume else 0, args.stop_at or args.steps
    num_parameters = sum(p.numel() for p in trainer.model.parameters())
    with Report(args, trainer.rank, first, last) as report:
        settings = {"config": vars(args), "environment": environment() | {"world_size": trainer.world_size}}
        report.record("header", **settings, num_parameters=num_parameters, first_step=first)
        losses: list[float] = []
        times_ms: list[float] = []
        for done in range(first + 1, last + 1):
            trainer.use_codec_of(done - 1)
            loss, time_ms = trainer.step(done - 1)
            losses.append(loss)
            times_ms.append(time_ms)
            evaluate = done == last or (args.eval_every and done % args.eval_every == 0)
            if evaluate or done % args.log_every == 0:
                values = {"loss": mean_over_ranks(losses)}
                losses.clear()
                if evaluate:
                    values["val_loss"] = trainer.evaluate()
                stats = trainer.handle.stats()
                report.record("step", step=done, seconds=sum(times_ms) / 1e3, **values, **asdict(stats))
                values["ms/step"], values["ratio"] = statistics.median(times_ms[-20:]), stats.ratio
                report.show(done, "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
            else:
                report.show(done)
            if args.checkpoint and (
                done == last or (args.checkpoint_every and done % args.checkpoint_every == 0)
            ):
                trainer.save(done)
        # the very last, because replicas drift apart without communication
        alone_ms = [trainer.step(last - 1, communicate=False)[1] for _ in range(args.time_compute)]
        timing = {"step_ms": median_ms(times_ms), "compute_ms": median_ms(alone_ms)}
        report.record("summary", step=last, **timing, val_loss=values["val_loss"], stats=asdict(stats))
    trainer.handle.close()


# --- logging and the command line --------------------------------------------------------------------------


class Report:
    """Rank 0's log file and progress: a bar on a terminal, lines elsewhere, nothing with --quiet."""

    def __init__(self, args: argparse.Namespace, rank: int, first: int, last: int):
        self.last, self.loud, self.bar = last, rank == 0 and not args.quiet, None
        mode = "a" if args.resume else "w"
        self.file = args.log_file.open(mode, buffering=1) if args.log_file and rank == 0 else None
        if self.loud and sys.stdout.isatty() and find_spec("rich"):
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), "{task.description}")
            self.bar = Progress(args.codec, *columns)
            self.task = self.bar.add_task("", total=last, completed=first)

    def __enter__(self) -> Report:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()
        if self.file:
            self.file.close()

    def record(self, kind: str, **fields: Any) -> None:
        """Append one JSON line to the log."""
        if self.file:
            print(json.dumps({"record": kind} | fields, default=str), file=self.file)

    def show(self, done: int, news: str = "") -> None:
        """Show how far it is, and the latest numbers."""
        if self.bar:
            self.bar.update(self.task, completed=done, **({"description": news} if news else {}))
        elif self.loud and news:
            print(f"step {done}/{self.last}  {news}", flush=True)


def median_ms(times_ms: list[float]) -> float | None:
    """The median without the first steps, in which DDP rebuilds its buckets."""
    return statistics.median(times_ms[3:] or times_ms) if times_ms else None


def parse_args() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)

    def add(name: str, default: Any, text: str, **options: Any) -> None:
        if default is not None and not isinstance(default, bool):
            text, options = f"{text} (default {default})", {"type": type(default)} | options
        parser.add_argument(name, default=default, help=text, **options)

    add("--codec", "int4", "gradq spec: none, bf16, int8, rot4, topk, powersgd:4, ...; or rules as JSON")
    add("--codec-start", 0, "steps in int8 before --codec; 1 to 3 bits need a tenth of --steps")
    add("--feedback", "auto", "error feedback", choices=FEEDBACK)
    add("--collective", "auto", "how it is averaged: auto, direct, two_phase, ...")
    add("--params", "1m", "model size", choices=PRESETS)
    add("--steps", 400, "optimizer steps of the whole run")
    add("--stop-at", 0, "end after this step; the schedule still spans --steps; 0: run all")
    add("--batch-size", 8, "sequences a rank and batch")
    add("--seq-len", 64, "bytes a sequence")
    add("--accumulate", 1, "batches a step, with one exchange for all")
    add("--lr", 1e-3, "peak learning rate")
    add("--warmup", 20, "steps of linear warm-up")
    add("--precision", "fp32", "bf16 means autocast", choices=("fp32", "bf16"))
    add("--seed", 0, "of weights, data and rounding")
    add("--eval-every", 50, "steps between validations; 0: only at the end")
    add("--log-file", None, "write JSON lines to this file", type=Path)
    add("--log-every", 10, "steps a log record covers")
    add("--checkpoint", None, "directory for checkpoints; one is written at the end", type=Path)
    add("--checkpoint-every", 0, "steps between checkpoints; 0: only at the end")
    add("--resume", False, "continue from the newest checkpoint in --checkpoint", action="store_true")
    add("--time-compute", 0, "at the end, time this many steps without communication")
    add("--quiet", False, "print nothing", action="store_true")
    args = parser.parse_args()
    for name, value in vars(args).items():
        least = name in ("steps", "batch_size", "seq_len", "accumulate", "log_every")
        if isinstance(value, int) and value < least:
            parser.error(f"{name} is {value}; it must be at least {int(least)}")
    try:
        rules_of(args.codec)
    except json.JSONDecodeError as error:
        parser.error(f"--codec {args.codec}: rules are JSON, and this is not: {error}")
    if args.stop_at > args.steps:
        parser.error(f"--stop-at {args.stop_at} lies beyond --steps {args.steps}")
    if (args.resume or args.checkpoint_every) and not args.checkpoint:
        parser.error("--resume and --checkpoint-every need --checkpoint DIR")
    found = finished_checkpoints(args.checkpoint) if args.checkpoint else []
    if args.resume and not found:
        parser.error(f"--resume: there is no finished checkpoint in {args.checkpoint}")
    if found and not args.resume:
        parser.error(f"{args.checkpoint} already has checkpoints; add --resume or name another directory")
    return args


def main() -> None:
    """Train as the command line says."""
    args = parse_args()
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    try:
        train(args)
    except gradq.ConfigError as error:
        raise SystemExit(f"train_gpt.py: error: {error}") from None
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
