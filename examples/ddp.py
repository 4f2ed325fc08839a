"""The shortest DistributedDataParallel script with compressed gradients: the small GPT, a plain loop.

    torchrun --nproc-per-node 2 examples/ddp.py --codec int4

All that gradq adds is the line with `gradq.compress`. Checkpoints, validation and logs: train_gpt.py.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
import torch.distributed as dist
import train_gpt
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradq


def batch(text: torch.Tensor, args: argparse.Namespace, step: int, rank: int) -> torch.Tensor:
    """Windows [B, T + 1] of the text; a function of seed, step and rank."""
    generator = torch.Generator().manual_seed(hash((args.seed, step, rank)))
    starts_B = torch.randint(len(text) - args.seq_len, (args.batch_size,), generator=generator)
    return text[starts_B[:, None] + torch.arange(args.seq_len + 1)].long()


def train(args: argparse.Namespace) -> float:
    """The training loop; returns the last loss, the mean over ranks."""
    rank, text = dist.get_rank(), train_gpt.load_text()[0]
    model = DistributedDataParallel(train_gpt.build(args.params, args.seq_len, args.seed))
    handle = gradq.compress(model, args.codec, seed=args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), fused=True)
    mean, start = float("nan"), time.perf_counter()
    for step in range(1, args.steps + 1):
        window_BT = batch(text, args, step, rank)
        logits_BTV = model(window_BT[:, :-1])
        loss = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), window_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % args.log_every == 0 or step == args.steps:
            mean = train_gpt.mean_over_ranks([loss.item()])
            if rank == 0:
                ms = 1e3 * (time.perf_counter() - start) / step
                print(f"step {step}/{args.steps}  loss {mean:.4g}  {ms:.0f} ms a step", flush=True)
    if rank == 0:
        print(f"{dist.get_world_size()} ranks over {dist.get_backend()}; {handle}")
    handle.close()
    return mean


def parse_args(description: str | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--codec", default="int4", help="gradq spec, none for plain DDP (default int4)")
    parser.add_argument("--params", default="1m", choices=train_gpt.PRESETS, help="model size (default 1m)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default 200)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a rank (default 8)")
    parser.add_argument("--seq-len", type=int, default=64, help="bytes a sequence (default 64)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default 1e-3)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and rounding (default 0)")
    parser.add_argument("--log-every", type=int, default=20, help="steps a line covers (default 20)")
    return parser.parse_args()


def main() -> None:
    """Train as the command line says."""
    args = parse_args(__doc__)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if "RANK" not in os.environ:
        raise SystemExit("ddp.py: error: start it with torchrun --nproc-per-node 2 examples/ddp.py")
    dist.init_process_group("gloo")
    try:
        train(args)
    except gradq.ConfigError as error:
        raise SystemExit(f"ddp.py: error: {error}") from None
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
