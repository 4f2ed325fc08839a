"""The Hugging Face Trainer with compressed gradients: a small GPT-2 on bytes, a callback of three lines.

    pip install transformers accelerate
    torchrun --nproc-per-node 2 examples/hf_trainer.py --codec int4

The Trainer wraps the model in DistributedDataParallel just before `on_train_begin`, where the callback
compresses it. Save the handle's state with torch.distributed.checkpoint on all ranks, as train_gpt.py does;
without it error feedback starts again at zero.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

import ddp
import torch
from windows import Windows

import gradq


def train(args: argparse.Namespace) -> None:
    """Train with the Trainer's own loop."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    class Compress(TrainerCallback):
        """Compress the gradients of the model that a Trainer has wrapped."""

        def __init__(self, trainer: Trainer) -> None:
            self.trainer = trainer

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            """All ranks come here before the first step."""
            self.handle = gradq.compress(self.trainer.model_wrapped, args.codec, seed=args.seed)

        def on_train_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            """Say what was saved."""
            if state.is_world_process_zero:
                print(self.handle)
            self.handle.close()

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(args.seed)
    config = GPT2Config(
        vocab_size=256,
        n_positions=args.seq_len,
        n_embd=128,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    count = args.steps * args.batch_size * int(os.environ["WORLD_SIZE"])
    windows = [
        {"input_ids": window[:-1], "labels": window[:-1]}  # the model shifts its labels itself
        for window in Windows(count, args.seq_len, args.seed)
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=GPT2LMHeadModel(config),
            args=TrainingArguments(
                folder,
                use_cpu=True,
                ddp_backend="gloo",
                ddp_find_unused_parameters=False,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch_size,
                learning_rate=args.lr,
                logging_steps=args.log_every,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=windows,
        )
        trainer.add_callback(Compress(trainer))
        trainer.train()


def main() -> None:
    """Train as the command line says."""
    args = ddp.parse_args(__doc__)
    if "RANK" not in os.environ:
        raise SystemExit(
            "hf_trainer.py: error: start it with torchrun --nproc-per-node 2 examples/hf_trainer.py"
        )
    train(args)


if __name__ == "__main__":
    main()
