"""Train the small GPT with DiLoCo: ranks train alone and meet every --every steps.

    torchrun --nproc-per-node 2 examples/diloco.py
    torchrun --nproc-per-node 2 examples/diloco.py --codec int4 --every 30 --fragments 3 --delay 5

What gradq adds to a single-process training loop is one line, the one with `gradq.DiLoCo`; there is no
DistributedDataParallel. Data, schedule and evaluation are those of train_gpt.py, so that the losses compare:
with the same seed, ranks and steps both have seen the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import train_gpt

import gradq
from gradq.bench.records import environment


class LocalTrainer(train_gpt.Trainer):
    """train_gpt's trainer with a plain model and DiLoCo in the place of DDP and compressed gradients."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.rank, self.world_size = args, dist.get_rank(), dist.get_world_size()
        self.train_text, self.val_text = train_gpt.load_text()
        self.model = train_gpt.build(args.params, args.seq_len, args.seed)
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
        self.handle = gradq.DiLoCo(
            self.model,
            self.optimizer,
            args.codec,
            every=args.every,
            outer_lr=args.outer_lr,
            outer_momentum=args.outer_momentum,
            fragments=args.fragments,
            delay=args.delay,
            fragment_update_alpha=args.alpha,
            seed=args.seed,
        )

    def save(self, step: int) -> None:
        """Write a checkpoint: the handle's state has the model and the optimizer in it."""
        dcp.save({"gradq": self.handle.state_dict()}, checkpoint_id=self.args.checkpoint / f"step-{step:08d}")

    def load(self) -> int:
        """Load the newest checkpoint, if there is one; returns how many steps it has done."""
        if found := train_gpt.finished_checkpoints(self.args.checkpoint):
            gradq.load_checkpoint(self.handle, found[-1])
        return self.handle.inner_step


def train(args: argparse.Namespace) -> None:
    """The training loop."""
    trainer = LocalTrainer(args)
    first = trainer.load() if args.checkpoint else 0
    losses: list[float] = []
    for done in range(first + 1, args.steps + 1):
        losses.append(trainer.step(done - 1)[0])
        if done == args.steps:
            trainer.handle.synchronize()
        if done % args.log_every == 0 or done == args.steps:
            loss, ratio = train_gpt.mean_over_ranks(losses), trainer.handle.stats().ratio
            losses.clear()
            if trainer.rank == 0:
                print(f"step {done}/{args.steps}  loss {loss:.4g}  bytes {ratio:.0f}x fewer", flush=True)
        if args.checkpoint and (done % args.checkpoint_every == 0 or done == args.steps):
            trainer.save(done)
    val_loss = trainer.evaluate()
    if trainer.rank == 0:
        print(f"validation loss {val_loss:.4f}; {trainer.handle.stats()}")
        if args.log_file:
            num_parameters = sum(p.numel() for p in trainer.model.parameters())
            record = {"val_loss": val_loss, "num_parameters": num_parameters, "config": vars(args)}
            record |= {"stats": asdict(trainer.handle.stats()), "environment": environment()}
            args.log_file.write_text(json.dumps(record, default=str) + "\n")
    trainer.handle.close()


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.set_defaults(accumulate=1, precision="fp32")
    parser.add_argument("--codec", default="int4", help="of the pseudo-gradients (default int4)")
    parser.add_argument("--every", type=int, default=30, help="inner steps between averages (default 30)")
    parser.add_argument("--fragments", type=int, default=1, help="parts averaged in turn (default 1)")
    parser.add_argument("--delay", type=int, default=0, help="steps an average may take (default 0)")
    parser.add_argument("--alpha", type=float, help="own share in a delayed average (default: add own steps)")
    parser.add_argument("--outer-lr", type=float, default=0.7, help="of the outer step (default 0.7)")
    parser.add_argument("--outer-momentum", type=float, default=0.9, help="Nesterov's (default 0.9)")
    parser.add_argument("--params", default="1m", choices=train_gpt.PRESETS, help="model size (default 1m)")
    parser.add_argument("--steps", type=int, default=400, help="inner steps of the run (default 400)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a rank and step (default 8)")
    parser.add_argument("--seq-len", type=int, default=64, help="bytes a sequence (default 64)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak of the inner schedule (default 1e-3)")
    parser.add_argument("--warmup", type=int, default=20, help="steps of linear warm-up (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and rounding (default 0)")
    parser.add_argument("--log-every", type=int, default=30, help="steps a line covers (default 30)")
    parser.add_argument("--log-file", type=Path, help="write the outcome as JSON to this file")
    parser.add_argument("--checkpoint", type=Path, help="directory for checkpoints; a run there is continued")
    parser.add_argument("--checkpoint-every", type=int, default=90, help="steps (default 90)")
    return parser.parse_args()


def main() -> None:
    """Train as the command line says."""
    args = parse_args()
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    try:
        train(args)
    except gradq.ConfigError as error:
        raise SystemExit(f"diloco.py: error: {error}") from None
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
