"""Lightning with compressed gradients: the small GPT, a callback of three lines.

    pip install lightning
    python examples/lightning_gpt.py --codec int4                    # starts 2 ranks itself

Lightning's own `ddp_comm_hook=` asks for the hook's state before there is a process group, so a callback
calls `gradq.compress` when training starts: the strategy has wrapped the model then. Lightning's checkpoints
are of rank 0 only; save the handle's state with torch.distributed.checkpoint on all ranks, as train_gpt.py
does, or error feedback starts again at zero.
"""

from __future__ import annotations

import argparse
from typing import Any

import ddp
import torch
import train_gpt
from torch.utils.data import DataLoader
from windows import Windows, loss_of

import gradq


def train(args: argparse.Namespace) -> None:
    """Train on two ranks."""
    import lightning
    from lightning.pytorch.strategies import DDPStrategy

    class Compress(lightning.Callback):
        """Compress the gradients of whatever the strategy has wrapped."""

        def on_train_start(self, trainer: Any, module: Any) -> None:
            """All ranks come here before the first step."""
            self.handle = gradq.compress(trainer.strategy.model, args.codec, seed=args.seed)

        def on_train_end(self, trainer: Any, module: Any) -> None:
            """Say what was saved."""
            if trainer.is_global_zero:
                print(self.handle)
            self.handle.close()

    class Module(lightning.LightningModule):
        """The GPT as Lightning wants it."""

        def __init__(self) -> None:
            super().__init__()
            self.gpt = train_gpt.build(args.params, args.seq_len, args.seed)

        def training_step(self, window_BT: torch.Tensor, index: int) -> torch.Tensor:
            """The loss of a batch."""
            loss = loss_of(self.gpt, window_BT)
            if (index + 1) % args.log_every == 0:
                mean = train_gpt.mean_over_ranks([loss.item()])
                if self.global_rank == 0:
                    print(f"step {index + 1}/{args.steps}  loss {mean:.4g}", flush=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            """AdamW."""
            return torch.optim.AdamW(self.parameters(), lr=args.lr, betas=(0.9, 0.95))

    torch.set_num_threads(1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_steps=args.steps,
        gradient_clip_val=1.0,
        callbacks=[Compress()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    windows = Windows(args.steps * args.batch_size * 2, args.seq_len, args.seed)
    trainer.fit(Module(), DataLoader(windows, batch_size=args.batch_size))


def main() -> None:
    """Train as the command line says."""
    train(ddp.parse_args(__doc__))


if __name__ == "__main__":
    main()
