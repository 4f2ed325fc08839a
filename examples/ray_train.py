"""Train the small GPT with Ray Train and compressed gradients; a lost worker resumes from a checkpoint.

    python examples/ray_train.py                                 # a Ray of its own on this machine
    ray job submit --working-dir . -- python examples/ray_train.py --address auto   # a cluster;
    launch/ray_job.sh

All that gradq adds is `gradq.compress` after `prepare_model`, and its state in the checkpoint. Every rank
writes its part of the checkpoint (torch.distributed.checkpoint), Ray Train puts the parts together, so a run
that lost a worker ends with the very numbers of one that did not.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")  # else every report takes 1.7 s


def train_loop(config: dict[str, Any]) -> None:
    """What every worker runs."""
    import ray.train
    import ray.train.torch
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    import train_gpt
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.nn import functional

    import gradq

    torch.set_num_threads(1)
    rank, seq_len = ray.train.get_context().get_world_rank(), config["seq_len"]
    model = ray.train.torch.prepare_model(train_gpt.build(config["params"], seq_len, config["seed"]))
    handle = gradq.compress(model, config["codec"], seed=config["seed"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
    text, _ = train_gpt.load_text()

    first = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            progress = {"progress": {"step": 0}}
            dcp.load(states | progress, checkpoint_id=folder)
            set_state_dict(
                model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
            )
            gradq.load_checkpoint(handle, folder)
            first = progress["progress"]["step"]
    for step in range(first, config["steps"]):
        if rank == 1 and step == config["kill_at"] and first == 0:
            ray.train.get_all_reported_checkpoints()  # returns when Ray has them
            os.kill(os.getpid(), signal.SIGKILL)  # what the fault test asks for
        generator = torch.Generator().manual_seed(config["seed"] * 1_000_003 + step * 1009 + rank)
        starts = torch.randint(len(text) - seq_len, (config["batch_size"],), generator=generator)
        window_BT = text[starts[:, None] + torch.arange(seq_len + 1)].long()
        logits_BTV = model(window_BT[:, :-1])
        loss = functional.cross_entropy(logits_BTV.flatten(0, 1), window_BT[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % config["checkpoint_every"] and step + 1 < config["steps"]:
            continue
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        metrics = {"step": step + 1, "loss": float(mean) / dist.get_world_size(), "resumed_from": first}
        metrics["ratio"] = handle.stats().ratio
        with tempfile.TemporaryDirectory() as folder:
            states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            states |= {"gradq": handle.state_dict(), "progress": {"step": step + 1}}
            dcp.save(states, checkpoint_id=folder)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
    handle.close()


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train on a cluster and return the last metrics."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    here = str(Path(__file__).resolve().parent)
    runtime = {"env_vars": {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}}
    options = {"num_cpus": args.workers + 1, "include_dashboard": False} if args.address == "local" else {}
    ray.init(address=args.address, runtime_env=runtime, log_to_driver=False, **options)
    try:
        trainer = TorchTrainer(
            train_loop,
            train_loop_config=vars(args) | {"out": ""},
            scaling_config=ScalingConfig(num_workers=args.workers),
            run_config=RunConfig(
                name=args.name,
                storage_path=str(args.out.resolve()),
                failure_config=FailureConfig(max_failures=3),
            ),
        )
        result = trainer.fit()
        if result.error:
            raise SystemExit(f"training failed: {result.error}")
        return dict(result.metrics)
    finally:
        ray.shutdown()


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--address", default="local", help="of the cluster, or local (default local)")
    parser.add_argument("--workers", type=int, default=2, help="ranks (default 2)")
    parser.add_argument("--codec", default="int4", help="gradq spec (default int4)")
    parser.add_argument("--params", default="1m", help="size of the model (default 1m)")
    parser.add_argument("--steps", type=int, default=60, help="(default 60)")
    parser.add_argument("--checkpoint-every", type=int, default=20, help="steps (default 20)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a rank (default 8)")
    parser.add_argument("--seq-len", type=int, default=64, help="bytes a sequence (default 64)")
    parser.add_argument("--lr", type=float, default=1e-3, help="(default 1e-3)")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    parser.add_argument("--kill-at", type=int, default=-1, help="rank 1 kills itself before this step, once")
    parser.add_argument("--name", default="gpt", help="of the run (default gpt)")
    parser.add_argument("--out", type=Path, default=Path("out/ray_train"), help="for checkpoints")
    print(json.dumps(train(parser.parse_args())))


if __name__ == "__main__":
    main()
