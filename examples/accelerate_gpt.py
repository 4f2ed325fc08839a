"""Accelerate with compressed gradients: the small GPT, one line after `prepare`.

    pip install accelerate
    torchrun --nproc-per-node 2 examples/accelerate_gpt.py --codec int4      # or: accelerate launch ...

`accelerator.prepare` wraps the model in DistributedDataParallel; `gradq.compress` takes what it returns.
Gradient accumulation and clipping work as before. Save the handle's state with torch.distributed.checkpoint
on all ranks, as train_gpt.py does; without it error feedback starts again at zero.
"""

from __future__ import annotations

import argparse
import os

import ddp
import torch
import train_gpt
from torch.utils.data import DataLoader
from windows import Windows, loss_of

import gradq


def train(args: argparse.Namespace) -> float:
    """The training loop; returns the last loss, the mean over ranks."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)  # without cpu=True it takes the GPUs
    count = args.steps * args.batch_size * accelerator.num_processes
    model = train_gpt.build(args.params, args.seq_len, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    loader = DataLoader(Windows(count, args.seq_len, args.seed), batch_size=args.batch_size)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    handle = gradq.compress(model, args.codec, seed=args.seed)
    mean = float("nan")
    for step, window_BT in enumerate(loader, start=1):
        with accelerator.accumulate(model):
            loss = loss_of(model, window_BT)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if step % args.log_every == 0 or step == args.steps:
            mean = train_gpt.mean_over_ranks([loss.item()])
            accelerator.print(f"step {step}/{args.steps}  loss {mean:.4g}", flush=True)
    accelerator.print(handle)
    handle.close()
    accelerator.end_training()
    return mean


def main() -> None:
    """Train as the command line says."""
    args = ddp.parse_args(__doc__)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if "RANK" not in os.environ:
        raise SystemExit(
            "accelerate_gpt.py: error: start it with torchrun --nproc-per-node 2 examples/accelerate_gpt.py"
        )
    train(args)


if __name__ == "__main__":
    main()
