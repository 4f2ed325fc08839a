"""Does compression under FSDP2 change what is learned? The GPT example, at equal steps, over several seeds.

    python benchmarks/accuracy_fsdp.py

Every codec trains `examples/fsdp2.py` on real ranks, with the seeds in common. The baseline is FSDP2's own
fp32 reduce-scatter ("none"). A codec is *within 2 sd* if its mean validation loss differs from the baseline's
by at most two pooled standard deviations over seeds. Bytes are those of the reduce-scatter. Finished runs are
kept in --partial and not repeated, so an interrupted benchmark continues where it was. Nothing in the record
but step_ms depends on how busy the machine is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gradq.bench.records import git_commit, write_record

ROOT = Path(__file__).resolve().parent.parent
BASELINE = "none"
KEY = ("codec", "seed", "steps", "params", "ranks", "batch_size", "lr")

Record = dict[str, Any]


def run(key: Record) -> Record:
    """One training run.

    Raises:
        SystemExit: it failed; its last words are in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(key["ranks"]), str(ROOT / "examples" / "fsdp2.py"), "--quiet"]
        command += [f"--{name.replace('_', '-')}={key[name]}" for name in KEY if name != "ranks"]
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | os.environ
        done = subprocess.run(
            [*command, f"--json={result}"], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{key} failed:\n{(done.stdout + done.stderr)[-3000:]}")
        return key | json.loads(result.read_text()) | {"commit": git_commit(ROOT)}


def compare(runs: list[Record], codecs: list[str], seeds: list[int]) -> list[Record]:
    """A row for each codec, against the baseline."""
    losses = {(r["codec"], r["seed"]): r["val_loss"] for r in runs}
    base = [losses[BASELINE, seed] for seed in seeds]
    rows = []
    for codec in codecs:
        own = [losses[codec, seed] for seed in seeds]
        of_codec = [r for r in runs if r["codec"] == codec]
        difference = statistics.mean(own) - statistics.mean(base)
        pooled = math.sqrt((statistics.variance(own) + statistics.variance(base)) / 2)
        rows.append(
            {
                "codec": codec,
                "val_loss_mean": statistics.mean(own),
                "val_loss_sd": statistics.stdev(own),
                "difference": difference,
                "pooled_sd": pooled,
                "within_2_sd": abs(difference) <= 2 * pooled,
                "paired_differences": [a - b for a, b in zip(own, base, strict=True)],
                "bytes_of_dense": sum(r["wire_bytes"] for r in of_codec)
                / sum(r["dense_bytes"] for r in of_codec),
            }
        )
    return rows


def parse_args() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--codecs", nargs="+", default=["int8"], help="gradq specs (default int8)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a run (default 300)")
    parser.add_argument("--ranks", type=int, default=2, help="processes on this machine (default 2)")
    parser.add_argument("--params", default="1m", help="model size of train_gpt.py (default 1m)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a rank (default 8)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="where the record goes"
    )
    parser.add_argument(
        "--partial", type=Path, default=ROOT / "out" / "accuracy_fsdp.jsonl", help="finished runs"
    )
    args = parser.parse_args()
    args.codecs = list(dict.fromkeys([BASELINE, *args.codecs]))
    args.seeds = list(dict.fromkeys(args.seeds))
    if len(args.seeds) < 2:
        parser.error("--seeds: at least 2 different ones are needed for a standard deviation")
    return args


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    fixed = {name: getattr(args, name) for name in ("steps", "params", "ranks", "batch_size", "lr")}
    keys = [{"codec": codec, "seed": seed} | fixed for seed in args.seeds for codec in args.codecs]
    lines = args.partial.read_text().splitlines() if args.partial.exists() else []
    finished = {tuple(r[name] for name in KEY): r for r in map(json.loads, lines)}
    args.partial.parent.mkdir(parents=True, exist_ok=True)
    for number, key in enumerate(keys, 1):
        identity = tuple(key[name] for name in KEY)
        if identity not in finished:
            finished[identity] = run(key)
            with args.partial.open("a") as file:
                file.write(json.dumps(finished[identity]) + "\n")
        loss = finished[identity]["val_loss"]
        print(f"{number}/{len(keys)}  seed {key['seed']} {key['codec']}: loss {loss:.4f}", flush=True)
    runs = [finished[tuple(key[name] for name in KEY)] for key in keys]
    rows = compare(runs, args.codecs, args.seeds)
    for row in rows:
        verdict = "baseline" if row["codec"] == BASELINE else f"within 2 sd: {row['within_2_sd']}"
        print(
            f"{row['codec']:8} loss {row['val_loss_mean']:.4f} ± {row['val_loss_sd']:.4f}  "
            f"{row['difference']:+.4f}  {verdict}  bytes {row['bytes_of_dense']:.4f} of dense"
        )
    commits = sorted({r["commit"] for r in runs})
    path = write_record(
        args.out,
        "accuracy_fsdp",
        commit=commits[-1] if len(commits) == 1 else commits,
        settings=fixed | {"seeds": args.seeds, "baseline": BASELINE},
        results=rows,
        runs=runs,
    )
    print(f"written to {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
