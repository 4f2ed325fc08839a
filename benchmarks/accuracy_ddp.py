"""Does compression change what is learned? The GPT example, at equal steps, over several seeds.

    python benchmarks/accuracy_ddp.py
    python benchmarks/accuracy_ddp.py --codecs int3@two_phase sign --reuse benchmarks/results/...json

Every codec trains `examples/train_gpt.py` on real ranks, with the seeds in common: a seed decides the initial
weights, the data and the rounding. A codec is any gradq spec, with "@collective" after it to choose one: on 2
ranks "auto" is direct, where the codec of phase 2 has nothing to do, so "@two_phase" shows what it costs.
"@75" sends int8 in the first 75 steps: there a model learns fastest and very few bits cost most. "@feedback"
and "@nofeedback" turn error feedback on and off.

The baseline is bf16. A codec is *within 2 sd* if its mean validation loss differs from the baseline's by at
most two pooled standard deviations over seeds, and *within 1 %* if by at most that part of the baseline's
loss; the paired difference (same seed, same data) is shown too, because it is the sharper test. Finished
runs are kept in --partial and not repeated, so an interrupted benchmark continues where it was; --reuse takes
the runs of an older record with the same settings.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from gradq.bench.records import git_commit, write_record

ROOT = Path(__file__).resolve().parent.parent
BASELINE = "bf16"
KEY = (
    "codec",
    "collective",
    "codec_start",
    "feedback",
    "seed",
    "steps",
    "params",
    "ranks",
    "batch_size",
    "lr",
)
DEFAULTS = {"collective": "auto", "codec_start": 0, "feedback": "auto"}  # older records lack some
FEEDBACK = {"feedback": "on", "nofeedback": "off"}

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """The complete lines of a JSON-lines file that may still grow."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def key_of(run: Record) -> tuple[Any, ...]:
    """What decides a run's outcome."""
    return tuple((DEFAULTS | run)[name] for name in KEY)


def label_of(run: Record) -> str:
    """The row a run belongs to, as on the command line."""
    run = DEFAULTS | run
    words = {value: word for word, value in FEEDBACK.items()}
    parts = [run["collective"], run["codec_start"], words.get(run["feedback"], run["feedback"])]
    return "@".join([run["codec"], *(str(part) for part in parts if part not in ("auto", 0))])


def choice_of(label: str) -> Record:
    """What a row's label says.

    Raises:
        SystemExit: a label of another form.
    """
    codec, *others = label.split("@")
    choice: Record = {}
    for part in others:
        if part.isdigit():
            name, value = "codec_start", int(part)
        elif part in FEEDBACK:
            name, value = "feedback", FEEDBACK[part]
        else:
            name, value = "collective", part
        if name in choice:
            raise SystemExit(
                f"--codecs {label}: {name} is there twice; the form is spec@collective@step@feedback"
            )
        choice[name] = value
    return {"codec": codec} | DEFAULTS | choice


def run(key: Record, progress: Progress, task: Any, stop: threading.Event) -> Record:
    """One training run, until it ends or stop is set.

    Raises:
        SystemExit: it failed; its last words are in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        log, errors = Path(folder) / "log.jsonl", Path(folder) / "stderr"
        options = {name.replace("_", "-"): value for name, value in key.items() if name != "ranks"}
        options |= {"log-file": log, "eval-every": 0}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(key["ranks"]), str(ROOT / "examples" / "train_gpt.py"), "--quiet"]
        command += [f"--{name}={value}" for name, value in options.items()]
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | os.environ
        shown = 0
        with (
            errors.open("w") as stderr,
            subprocess.Popen(command, env=environment, stdout=stderr, stderr=stderr) as process,
        ):
            try:
                while process.poll() is None and not stop.wait(0.5):
                    done = max((r["step"] for r in read(log) if r["record"] == "step"), default=0)
                    progress.advance(task, done - shown)
                    shown = done
            finally:
                process.terminate()
        progress.advance(task, key["steps"] - shown)
        if process.returncode:
            raise SystemExit(f"{key} failed:\n{errors.read_text()[-3000:]}")
        header, *_, summary = read(log)
    stats = summary["stats"]
    return key | {
        "val_loss": summary["val_loss"],
        "step_ms": summary["step_ms"],
        "wire_bytes_per_step": stats["wire_bytes"] / stats["steps"],
        "ratio": stats["dense_bytes"] / stats["wire_bytes"] if stats["wire_bytes"] else 1.0,
        "environment": header["environment"],
        "num_parameters": header["num_parameters"],
        "commit": git_commit(ROOT),
    }


def compare(runs: list[Record], codecs: list[str], seeds: list[int]) -> list[Record]:
    """A row for each codec, against the baseline."""
    losses = {(label_of(r), r["seed"]): r["val_loss"] for r in runs}
    base = [losses[BASELINE, seed] for seed in seeds]
    rows = []
    for codec in codecs:
        own = [losses[codec, seed] for seed in seeds]
        differences = [mine - theirs for mine, theirs in zip(own, base, strict=True)]
        difference = statistics.mean(own) - statistics.mean(base)
        pooled = math.sqrt((statistics.variance(own) + statistics.variance(base)) / 2)
        rows.append(
            {
                "codec": codec,
                "val_loss_mean": statistics.mean(own),
                "val_loss_sd": statistics.stdev(own),
                "difference_to_bf16": difference,
                "pooled_sd": pooled,
                "within_2_sd": abs(difference) <= 2 * pooled,
                "percent_of_bf16": 100 * difference / statistics.mean(base),
                "within_1_percent": abs(difference) <= 0.01 * statistics.mean(base),
                "paired_differences": differences,
                "paired_sd": statistics.stdev(differences),
                "ratio": statistics.mean(r["ratio"] for r in runs if label_of(r) == codec),
            }
        )
    return rows


def show(rows: list[Record], title: str, console: Console) -> None:
    """The table."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("codec")
    for column in ("validation loss", "to bf16", "%", "within 2 sd", "paired difference", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        paired = statistics.mean(row["paired_differences"])
        is_baseline = row["codec"] == BASELINE
        table.add_row(
            row["codec"],
            f"{row['val_loss_mean']:.4f} ± {row['val_loss_sd']:.4f}",
            "baseline" if is_baseline else f"{row['difference_to_bf16']:+.4f}",
            "" if is_baseline else f"{row['percent_of_bf16']:+.2f}",
            "" if is_baseline else "yes" if row["within_2_sd"] else "[red]no[/]",
            "" if is_baseline else f"{paired:+.4f} ± {row['paired_sd']:.4f}",
            f"{row['ratio']:.2f}",
        )
    console.print(table)


def parse_args() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    codecs = ["bf16", "none", "int8", "int4"]
    parser.add_argument(
        "--codecs",
        nargs="+",
        default=codecs,
        help=f"spec, with @collective, @first-step, @nofeedback if wanted (default {' '.join(codecs)})",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--steps", type=int, default=750, help="optimizer steps of a run (default 750)")
    parser.add_argument("--ranks", type=int, default=2, help="processes on this machine (default 2)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--params", default="1m", help="model size of train_gpt.py (default 1m)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a rank (default 8)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="where the record goes"
    )
    parser.add_argument(
        "--partial", type=Path, default=ROOT / "out" / "accuracy_ddp.jsonl", help="finished runs"
    )
    parser.add_argument("--reuse", type=Path, nargs="*", default=[], help="records whose runs to take over")
    args = parser.parse_args()
    args.codecs = list(dict.fromkeys([BASELINE, *args.codecs]))
    args.seeds = list(dict.fromkeys(args.seeds))
    if len(args.seeds) < 2:
        parser.error("--seeds: at least 2 different ones are needed for a standard deviation")
    return args


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # and with it the run under way
    console = Console(width=None if sys.stdout.isatty() else 110)
    fixed = {name: getattr(args, name) for name in ("steps", "params", "ranks", "batch_size", "lr")}
    keys = []
    for seed in args.seeds:
        for label in args.codecs:
            keys.append(choice_of(label) | {"seed": seed} | fixed)
    recorded = [r for path in args.reuse for r in json.loads(path.read_text())["runs"]]
    finished = {key_of(r): r for r in [*recorded, *read(args.partial)]}
    todo = [key for key in keys if key_of(key) not in finished]
    args.partial.parent.mkdir(parents=True, exist_ok=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=console) as progress:
        task = progress.add_task(
            "", total=len(keys) * args.steps, completed=(len(keys) - len(todo)) * args.steps
        )

        def one(key: Record) -> Record:
            progress.update(task, description=f"seed {key['seed']} {label_of(key)}")
            return run(key, progress, task, stop)

        stop = threading.Event()
        with ThreadPoolExecutor(args.jobs) as pool:
            try:
                for future in as_completed([pool.submit(one, key) for key in todo]):
                    record = future.result()
                    finished[key_of(record)] = record
                    with args.partial.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                    if not console.is_terminal:
                        said = f"seed {record['seed']} {label_of(record)}"
                        console.print(f"{said}: validation loss {record['val_loss']:.4f}")
            except BaseException:  # a run failed, or Ctrl-C: neither waits for the others
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    runs = [finished[key_of(key)] for key in keys]
    rows = compare(runs, args.codecs, args.seeds)
    title = (
        f"GPT of {runs[0]['num_parameters'] / 1e6:.1f} M parameters, {args.ranks} ranks, {args.steps} steps"
    )
    show(rows, f"{title}, {len(args.seeds)} seeds", console)
    if len(commits := sorted({r["commit"] for r in runs})) > 1:
        console.print(f"note: the runs are of different commits: {', '.join(commits)}")

    path = write_record(
        args.out,
        "accuracy_ddp",
        commit=commits[-1] if len(commits) == 1 else commits,
        settings=fixed | {"seeds": args.seeds, "baseline": BASELINE},
        results=rows,
        runs=[{name: value for name, value in r.items() if name != "environment"} for r in runs],
    )
    console.print(f"written to {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
