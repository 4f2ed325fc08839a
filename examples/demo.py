"""Train the same small GPT with four codecs on two ranks of this machine; print what each one saved.

    python examples/demo.py

Dense, bf16, int8 and int4 runs start from the same seed and see the same data. The table shows what was
measured here, and the step times to expect over slower and faster links: computing, encoding and decoding as
measured, plus bytes / rate, one after the other (`gradq.policy.cost`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"the demo needs {error.name}: pip install 'gradq[plot]'") from None

from gradq.bench.follow import follow_torchrun
from gradq.errors import BenchError
from gradq.policy.cost import expected_step_ms

CODECS = ("none", "bf16", "int8", "int4")
COLORS = ("#444444", "#c98500", "#1f77b4", "#c2185b")
LINKS_GBPS = (1, 10, 25, 100)
NUM_RANKS = 2
WORTH_IT = 0.97  # a codec must save 3 % of a step before we recommend it over plain DDP

Record = dict[str, Any]


def train(codec: str, args: argparse.Namespace, progress: Progress) -> list[Record]:
    """Train with one codec, show how far it is, and return the records of its log.

    Raises:
        SystemExit: the training failed; its last words are in the message.
    """
    options = {"codec": codec, "steps": args.steps, "seed": args.seed, "time_compute": 25}
    options |= {"eval_every": max(1, args.steps // 16)}
    task = progress.add_task(codec, total=args.steps, news="starting")

    def show(lines: list[Record]) -> None:
        if steps := [line for line in lines if line["record"] == "step"]:
            step = steps[-1]
            news = f"loss {step['loss']:.2f}  {1e3 * step['seconds'] / step['step']:.0f} ms/step"
            progress.update(task, completed=step["step"], news=news)

    script, log = Path(__file__).with_name("train_gpt.py"), args.out / f"{codec}.jsonl"
    try:
        records = follow_torchrun(script, options, num_ranks=NUM_RANKS, log=log, flags=["--quiet"], show=show)
    except BenchError as error:
        raise SystemExit(str(error)) from None
    news = f"validation loss {records[-1]['val_loss']:.3f}"
    progress.update(task, completed=args.steps, news=news)
    if not progress.console.is_terminal:
        progress.console.print(f"{codec}: {args.steps} steps, {news}")
    return records


def measure(records: list[Record]) -> Record:
    """The numbers of one run that the table needs, per step."""
    steps, summary = [r for r in records if r["record"] == "step"], records[-1]
    pairs = list(itertools.pairwise(steps)) or [(dict.fromkeys(steps[0], 0), steps[0])]

    def per_step(*fields: str) -> float:
        return statistics.median(
            sum(after[f] - before[f] for f in fields) / (after["step"] - before["step"])
            for before, after in pairs
        )

    return {
        "codec": records[0]["config"]["codec"],
        "val_loss": summary["val_loss"],
        "wire_bytes": per_step("wire_bytes"),
        "ratio": per_step("dense_bytes") / per_step("wire_bytes"),
        "step_ms": summary["step_ms"],
        "codec_ms": per_step("encode_ms", "decode_ms"),
        "compute_ms": summary["compute_ms"],
        "curve": [(r["wire_bytes"], r["val_loss"]) for r in steps if "val_loss" in r],
    }


def expect(rows: list[Record]) -> None:
    """Add to each row the step times to expect; computing costs the same whatever the codec."""
    compute_ms = statistics.median(row["compute_ms"] for row in rows)
    for row in rows:
        row["expected_ms"] = {
            str(gbps): expected_step_ms(compute_ms, row["codec_ms"], row["wire_bytes"], gbps)
            for gbps in LINKS_GBPS
        }


def verdict(rows: list[Record], gbps: int) -> tuple[str, str]:
    """The best codec on a link, and the sentence that says so."""
    times = {row["codec"]: row["expected_ms"][str(gbps)] for row in rows}
    best = min(times, key=times.__getitem__)
    if times[best] > WORTH_IT * times["none"]:
        return "none", "plain DDP is best here: no codec saves more than 3 % of a step"
    against = f"{times['none'] / times[best]:.2f}x as fast as plain DDP"
    if best != "bf16":
        against += f", {times['bf16'] / times[best]:.2f}x as fast as bf16"
    return best, f"{best} is best: {times[best]:.0f} ms a step, {against}"


def show(rows: list[Record], console: Console) -> None:
    """The table and a sentence for each link."""
    compute_ms = statistics.median(row["compute_ms"] for row in rows)
    caption = (
        "The codec none is plain DDP. Times are medians in ms; the runs followed one another, so on a noisy "
        "machine 'step here' differs for that alone. Under Gb/s: the step to expect over such a link = "
        f"computing ({compute_ms:.0f}) + codec (encode and decode) + bytes / rate, nothing overlapped."
    )
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False)
    table.add_column("codec")
    for title in ("val.\nloss", "MB a\nstep", "ratio", "codec\nms", "step\nhere"):
        table.add_column(title, justify="right")
    for gbps in LINKS_GBPS:
        table.add_column(f"{gbps}\nGb/s", justify="right")
    best = {str(gbps): verdict(rows, gbps)[0] for gbps in LINKS_GBPS}
    for row in rows:
        expected = [
            f"[bold green]{ms:.1f}[/]" if best[gbps] == row["codec"] else f"{ms:.1f}"
            for gbps, ms in row["expected_ms"].items()
        ]
        measured = (f"{row['val_loss']:.3f}", f"{row['wire_bytes'] / 1e6:.3f}", f"{row['ratio']:.2f}")
        table.add_row(row["codec"], *measured, f"{row['codec_ms']:.1f}", f"{row['step_ms']:.0f}", *expected)
    console.print(table)
    for gbps in LINKS_GBPS:
        console.print(f"{gbps:>4} Gbit/s  {verdict(rows, gbps)[1]}", highlight=False, soft_wrap=True)


def plot(rows: list[Record], title: str, path: Path) -> None:
    """Validation loss against the bytes a rank has sent, a line for each codec."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for row, color in zip(rows, COLORS, strict=True):
        megabytes, losses = zip(*((sent / 1e6, loss) for sent, loss in row["curve"]), strict=True)
        axes.plot(megabytes, losses, color=color, linewidth=2)
        axes.plot(megabytes[-1], losses[-1], "o", color=color, markersize=5)
        name = "plain DDP" if row["codec"] == "none" else row["codec"]
        axes.annotate(
            f"{name}\n{losses[-1]:.3f}",
            (megabytes[-1], losses[-1]),
            xytext=(0, -8),
            textcoords="offset points",
            ha="center",
            va="top",
            color=color,
            weight="bold",
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("MB sent by each rank so far (log scale)")
    axes.set_ylabel("validation loss, nats a byte")
    axes.set_title(title, loc="left", fontsize=11)
    axes.margins(x=0.08, y=0.16)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="of all runs (default 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="where results go (default out/demo)"
    )
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 100)
    start = time.perf_counter()
    columns = ("{task.description:>5}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, "{task.fields[news]}", console=console) as progress:
        runs = [train(codec, args, progress) for codec in CODECS]
    rows = [measure(records) for records in runs]
    expect(rows)
    show(rows, console)
    header = runs[0][0]
    title = f"GPT of {header['num_parameters'] / 1e6:.1f} M parameters, {NUM_RANKS} ranks, {args.steps} steps"
    plot(rows, title, args.out / "loss_vs_bytes.png")
    environment = header["environment"]
    summary = {"environment": environment, "steps": args.steps, "seed": args.seed, "rows": rows}
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    files = ["loss_vs_bytes.png", "summary.json", *(f"{codec}.jsonl" for codec in CODECS)]
    seconds = time.perf_counter() - start
    console.print(f"\n{seconds:.0f} s. In {args.out}: {', '.join(files)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
