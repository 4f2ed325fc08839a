"""Does DiLoCo learn as much with a hundredth of the bytes? The GPT example at equal tokens, over seeds.

    python benchmarks/diloco.py

Every run trains `examples/diloco.py` on real ranks: the same data, schedule, learning rate and tokens as
plain DDP, whose losses come from a record of `benchmarks/accuracy_ddp.py` (--synchronous) or are measured
here. The criterion: the mean validation loss within 1 % of synchronous training, with at least 100 times
fewer bytes than dense all-reduces in every step, in fp32 (the gradients' own dtype) and in bf16.

The losses do not depend on timing. Finished runs are kept in --partial and not repeated, so an interrupted
benchmark continues where it was. The outer learning rate and momentum, and the inner learning rate, were
chosen on seed 0; what was tried is in the record (--tuning names the file).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradq.bench.records import git_commit, write_record

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LR, OUTER_LR, OUTER_MOMENTUM = 2e-3, 0.9, 0.5  # chosen on seed 0
WITHIN = 0.01  # of the synchronous loss
FEWER_BYTES = 100

Record = dict[str, Any]

# name: how it differs from the defaults below
VARIANTS: dict[str, Record] = {
    "int4": {},
    "fp32": {"codec": "fp32"},
    "int4, 3 fragments, delay 5": {"fragments": 3, "delay": 5},
    "int4, 3 fragments, delay 10": {"fragments": 3, "delay": 10},
    "int4, 3 fragments, delay 10, alpha 0": {"fragments": 3, "delay": 10, "alpha": 0.0},
    "int4, 3 fragments, delay 10, alpha 0.5": {"fragments": 3, "delay": 10, "alpha": 0.5},
}
DEFAULTS: Record = {"codec": "int4", "every": 30, "fragments": 1, "delay": 0}


def read(path: Path) -> list[Record]:
    """The complete lines of a JSON-lines file."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def start(script: str, settings: Record, ranks: int) -> list[Record]:
    """Run an example on ranks of this machine; returns its log.

    Raises:
        SystemExit: it failed; its last words are in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), str(ROOT / "examples" / script), f"--log-file={log}"]
        command += [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | os.environ
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{script} {settings} failed:\n{done.stderr[-3000:]}")
        return read(log)


def run(settings: Record, ranks: int) -> Record:
    """One DiLoCo run."""
    (outcome,) = start("diloco.py", settings, ranks)
    stats = outcome["stats"]
    return settings | {
        "ranks": ranks,
        "val_loss": outcome["val_loss"],
        "wire_bytes": stats["wire_bytes"],
        "dense_fp32_bytes": stats["dense_bytes"],
        "num_parameters": outcome["num_parameters"],
        "environment": outcome["environment"],
        "commit": git_commit(ROOT),
    }


def run_synchronous(settings: Record, ranks: int) -> Record:
    """One run of train_gpt.py with plain DDP."""
    *_, summary = start("train_gpt.py", settings | {"eval-every": 0}, ranks)
    return settings | {
        "ranks": ranks,
        "val_loss": summary["val_loss"],
        "commit": git_commit(ROOT),
    }


def recorded(path: Path, args: argparse.Namespace) -> dict[int, float]:
    """The synchronous losses of a record by seed; none if it is of other runs."""
    runs = [r for r in json.loads(path.read_text())["runs"] if r["codec"] == "none"] if path.exists() else []
    names = ("steps", "params", "ranks", "batch_size", "lr")
    return {r["seed"]: r["val_loss"] for r in runs if all(r[name] == getattr(args, name) for name in names)}


def compare(name: str, runs: list[Record], synchronous: dict[int, float]) -> Record:
    """A row of the table."""
    losses = {r["seed"]: r["val_loss"] for r in runs}
    sync = statistics.mean(synchronous[seed] for seed in losses)
    mean = statistics.mean(losses.values())
    fewer = runs[0]["dense_fp32_bytes"] / runs[0]["wire_bytes"]
    return {
        "variant": name,
        "val_loss_mean": mean,
        "val_loss_sd": statistics.stdev(losses.values()) if len(losses) > 1 else None,
        "synchronous_mean": sync,
        "excess": mean / sync - 1,
        "excess_by_seed": {seed: loss / synchronous[seed] - 1 for seed, loss in losses.items()},
        "within_1_percent": mean <= (1 + WITHIN) * sync,
        "fewer_bytes_than_fp32": fewer,
        "fewer_bytes_than_bf16": fewer / 2,
        "at_least_100_times_fewer_than_bf16": fewer / 2 >= FEWER_BYTES,
    }


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    newest = max(RESULTS.glob("accuracy_ddp_*.json"), default=Path("accuracy_ddp.json"))
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="(default all)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default 0 1 2)")
    parser.add_argument("--steps", type=int, default=750, help="inner steps of a run (default 750)")
    parser.add_argument("--ranks", type=int, default=2, help="processes on this machine (default 2)")
    parser.add_argument("--params", default="1m", help="model size of train_gpt.py (default 1m)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a rank (default 8)")
    parser.add_argument("--lr", type=float, default=LR, help=f"inner peak learning rate (default {LR})")
    parser.add_argument("--outer-lr", type=float, default=OUTER_LR, help=f"(default {OUTER_LR})")
    parser.add_argument(
        "--outer-momentum", type=float, default=OUTER_MOMENTUM, help=f"(default {OUTER_MOMENTUM})"
    )
    parser.add_argument("--synchronous", type=Path, default=newest, help="record of accuracy_ddp.py")
    parser.add_argument("--tuning", type=Path, help="JSON list of the settings tried, for the record")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the record goes")
    parser.add_argument("--partial", type=Path, default=ROOT / "out" / "diloco.jsonl", help="finished runs")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    synchronous = recorded(args.synchronous, args)
    args.partial.parent.mkdir(parents=True, exist_ok=True)
    finished = read(args.partial)

    def once(key: Record, train: Callable[[Record, int], Record]) -> Record:
        """A run, unless it was finished before."""
        for record in finished:
            if all(record.get(name) == value for name, value in (key | {"ranks": args.ranks}).items()):
                return record
        record = train(key, args.ranks)
        with args.partial.open("a") as file:
            file.write(json.dumps(record) + "\n")
        return record

    common = {name: getattr(args, name) for name in ("steps", "params", "batch_size", "lr")}
    fixed = common | {name: getattr(args, name) for name in ("outer_lr", "outer_momentum")}
    rows, runs, baselines = [], [], []
    for seed in args.seeds:
        if seed not in synchronous:
            baselines.append(once(common | {"codec": "none", "seed": seed}, run_synchronous))
            synchronous[seed] = baselines[-1]["val_loss"]
            print(f"seed {seed} synchronous: loss {synchronous[seed]:.4f}", flush=True)
        for variant in args.variants:
            record = once(fixed | DEFAULTS | VARIANTS[variant] | {"seed": seed}, run)
            runs.append(record | {"variant": variant})
            excess = record["val_loss"] / synchronous[seed] - 1
            print(f"seed {seed} {variant}: loss {record['val_loss']:.4f}, {excess:+.2%}", flush=True)
    for variant in args.variants:
        rows.append(compare(variant, [r for r in runs if r["variant"] == variant], synchronous))
        row = rows[-1]
        print(
            f"{variant:30s} {row['val_loss_mean']:.4f} against {row['synchronous_mean']:.4f} "
            f"({row['excess']:+.2%}), {row['fewer_bytes_than_fp32']:.0f}x fewer bytes than fp32, "
            f"{row['fewer_bytes_than_bf16']:.0f}x than bf16"
        )
    commits = sorted({r["commit"] for r in runs})
    path = write_record(
        args.out,
        "diloco" if args.steps == 750 else f"diloco_{args.steps}_steps",
        environment=runs[0]["environment"],
        commit=commits[0] if len(commits) == 1 else commits,
        settings=fixed | DEFAULTS | {"ranks": args.ranks, "seeds": args.seeds},
        synchronous={seed: synchronous[seed] for seed in args.seeds},
        synchronous_from="runs of this benchmark" if baselines else args.synchronous.name,
        tuning=json.loads(args.tuning.read_text()) if args.tuning else None,
        results=rows,
        runs=[{k: v for k, v in r.items() if k != "environment"} for r in runs],
    )
    print(f"written to {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
