"""Train the GPT of train_gpt.py with FSDP2 and compressed gradients.

    torchrun --nproc-per-node 2 examples/fsdp2.py --codec int8
    torchrun --nproc-per-node 4 examples/fsdp2.py --replicas 2     # HSDP: the replicas' average is compressed

All that gradq adds to a usual FSDP2 script is the line with `gradq.compress`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from train_gpt import NUM_EVAL_WINDOWS, PRESETS, build, load_text, mean_over_ranks

import gradq


def shard(args: argparse.Namespace) -> nn.Module:
    """The model, every block a unit of its own; with --replicas R on a mesh of R by W / R ranks."""
    replicas, num_shards = args.replicas, dist.get_world_size() // args.replicas
    mesh = init_device_mesh("cpu", (replicas, num_shards), mesh_dim_names=("replicate", "shard"))
    mesh = mesh if replicas > 1 else mesh["shard"]
    model = build(args.params, args.seq_len, args.seed)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def loss_of(model: nn.Module, text: Tensor, starts: np.ndarray, seq_len: int) -> Tensor:
    """Mean cross-entropy, in nats a byte, of the windows of the text that begin at starts."""
    window_BT = text[torch.from_numpy(starts)[:, None] + torch.arange(seq_len + 1)].long()
    return functional.cross_entropy(model(window_BT[:, :-1]).flatten(0, 1), window_BT[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor, seq_len: int) -> float:
    """Mean loss over fixed windows of the held-out files; every rank runs as many batches as the others."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    num_windows = NUM_EVAL_WINDOWS // world_size * world_size
    starts = np.linspace(0, len(text) - seq_len - 1, num_windows, dtype=np.int64)[rank::world_size]
    losses: list[float] = []
    for batch in np.array_split(starts, math.ceil(len(starts) / 16)):
        losses += [loss_of(model, text, batch, seq_len).item()] * len(batch)
    return mean_over_ranks(losses)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * done))


def train(args: argparse.Namespace) -> dict[str, object]:
    """The training loop; returns what it measured."""
    rank = dist.get_rank()
    train_text, val_text = load_text()
    model = shard(args)
    handle = gradq.compress(model, args.codec, seed=args.seed, gather_spec=args.gather)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    losses: list[float] = []
    times_ms: list[float] = []
    for step in range(args.steps):
        start = time.perf_counter()
        rng = np.random.default_rng((args.seed, step, rank, 0))  # as in train_gpt.py
        starts = rng.integers(len(train_text) - args.seq_len, size=args.batch_size)
        loss = loss_of(model, train_text, starts, args.seq_len)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times_ms.append(1e3 * (time.perf_counter() - start))
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            mean, losses = mean_over_ranks(losses), []
            if rank == 0 and not args.quiet:
                print(f"step {step + 1}/{args.steps}  loss {mean:.4f}  {handle.stats()}", flush=True)
    stats = handle.stats()
    result = {
        "val_loss": evaluate(model, val_text, args.seq_len),
        "step_ms": statistics.median(times_ms),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "steps": stats.steps,
        "wire_bytes": stats.wire_bytes,
        "dense_bytes": stats.dense_bytes,
    }
    handle.close()
    return result


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--codec", default="int8", help="gradq spec, e.g. none, bf16, int4 (default int8)")
    parser.add_argument("--gather", default="none", help="spec of gathered parameters (default none)")
    parser.add_argument("--replicas", type=int, default=1, help="copies of the sharded model (default 1)")
    parser.add_argument("--params", default="1m", choices=PRESETS, help="model size (default 1m)")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps (default 400)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a rank (default 8)")
    parser.add_argument("--seq-len", type=int, default=64, help="bytes a sequence (default 64)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    parser.add_argument("--warmup", type=int, default=20, help="steps of warm-up (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and rounding (default 0)")
    parser.add_argument(
        "--log-every", type=int, default=10, help="steps a line of progress covers (default 10)"
    )
    parser.add_argument("--json", type=Path, default=None, help="write the result here")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    args = parser.parse_args()
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    try:
        result = train(args)
        if dist.get_rank() == 0:
            if not args.quiet:
                print(f"validation loss {result['val_loss']:.4f}")
            if args.json:
                args.json.write_text(json.dumps(result) + "\n")
    except gradq.ConfigError as error:
        raise SystemExit(f"fsdp2.py: error: {error}") from None
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
