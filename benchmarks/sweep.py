"""Step time of every codec over links from 50 Mbit/s to unshaped, at 2 and 4 ranks, for an MLP and a GPT.

    sudo .venv/bin/python benchmarks/sweep.py --budget-minutes 45
    .venv/bin/python benchmarks/sweep.py --losses          # not timed: final losses over 3 seeds
    gradq report out/sweep --open

A cell is a model, a number of ranks and a rate; it has a record of its own, and a finished one is not
measured again. The models of a group of cells (same model and ranks) are made and warmed up once, then the
link is changed from cell to cell, measured with raw TCP, and the codecs take turns. Slow links need few
samples: every cell gets at least `--min-turns`, the time that is left goes to the cells where a turn is
cheap. Groups with the targets come first. Ctrl-C keeps all finished cells. A rank takes 8 samples a step:
then computing takes about as much of plain DDP's step as on the machine where the targets were set (.11 at
1 Gbit/s and 4 ranks). At two ranks one phase suffices, so int4+int4 would be int4 again and is left out.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from gradq.bench.link import Link, parse_rate
from gradq.bench.recording import Recorder, finished_seeds
from gradq.bench.report import write_report
from gradq.bench.runners.base import execute
from gradq.bench.runners.local import LocalRunner
from gradq.bench.runners.namespaces import SweepRunner
from gradq.bench.scenario import COMPUTE, Scenario
from gradq.errors import GradqError

ROOT = Path(__file__).resolve().parent.parent
RATES = ("50mbit", "100mbit", "250mbit", "500mbit", "1gbit", "2.5gbit", "10gbit", "unshaped")
MODELS = {"mlp": "mlp-25m", "gpt": "gpt-10m"}
CODECS = (
    "none",
    "bf16",
    "torch-powersgd:1",
    "torch-powersgd:4",
    "int8",
    "int4",
    "int4+int4",
    "rot4",
    "free:int4",
)
# the targets: MLP at 100 and 500 Mbit/s with 2 ranks, 1 and 10 Gbit/s with 4; GPT at 10 Gbit/s with 2
GROUPS = (("mlp", 2), ("mlp", 4), ("gpt", 2), ("gpt", 4))
FIRST = ("100mbit", "500mbit", "1gbit", "10gbit")

# for the plan only: MB a step of plain DDP's ring at 2 ranks, seconds of a step without a link
DENSE_MB = {"mlp": 100.7, "gpt": 43.7}
STEP_S = {("mlp", 2): 0.15, ("mlp", 4): 0.4, ("gpt", 2): 0.8, ("gpt", 4): 1.7}
# bytes relative to plain DDP's, at 2 and at 4 ranks
RELATIVE = {
    "none": (1.0, 1.0),
    "bf16": (0.5, 0.5),
    "torch-powersgd:1": (0.01, 0.01),
    "torch-powersgd:4": (0.03, 0.03),
    "int8": (0.255, 0.255),
    "int4": (0.131, 0.193),
    "int4+int4": (0.131, 0.131),
    "rot4": (0.131, 0.193),
    "free:int4": (0.131, 0.193),
    COMPUTE: (0.0, 0.0),
}
SETUP_S, VERIFY_S = 30.0, 1.5


def cells(args: argparse.Namespace) -> Iterator[tuple[str, int, list[Scenario]]]:
    """A group of scenarios for each model and number of ranks; important rates first."""
    for model, ranks in GROUPS:
        if model not in args.models or ranks not in args.ranks:
            continue
        codecs = tuple(codec for codec in args.codecs if not (ranks == 2 and codec == "int4+int4"))
        rates = sorted(args.rates, key=lambda rate: (rate not in FIRST, args.rates.index(rate)))
        yield (
            model,
            ranks,
            [
                Scenario(
                    name=f"sweep_{model}_{ranks}ranks_{rate.replace('.', 'p')}",
                    model=MODELS[model] if not args.tiny else f"{model}-tiny",
                    codecs=codecs,
                    nodes=ranks,
                    ranks_per_node=1,
                    link=Link(rate_bps=None if rate == "unshaped" else parse_rate(rate)),
                    steps=args.max_turns + 3,
                    block=1,
                    warmup=3,
                    min_turns=args.min_turns,
                    batch_size=8,
                    evaluate=False,
                )
                for rate in rates
            ],
        )


def turn_s(model: str, ranks: int, scenario: Scenario) -> float:
    """About how long a turn of all codecs takes."""
    ring_mb = DENSE_MB[model] * 2 * (ranks - 1) / ranks
    rate = scenario.link.rate_bps or 2e10
    total = 0.0
    for codec in scenario.contenders:
        relative = RELATIVE.get(codec, (0.3, 0.3))[ranks > 2]
        total += max(
            STEP_S[model, ranks], STEP_S[model, ranks] / 2 + 8e6 * ring_mb * relative / (0.95 * rate)
        )
    return total


def plan(groups: list[tuple[str, int, list[Scenario]]], args: argparse.Namespace) -> dict[str, float]:
    """Seconds to measure each cell for, by name, so that all fit the budget."""
    turns = {s.name: turn_s(model, ranks, s) for model, ranks, group in groups for s in group}
    fixed = sum(
        SETUP_S + len(group) * ranks * VERIFY_S + 3 * STEP_S[model, ranks] * len(group[0].contenders)
        for model, ranks, group in groups
    )

    def seconds(share: float) -> dict[str, float]:
        return {
            name: max(args.min_turns * turn, min(share, args.max_turns * turn))
            for name, turn in turns.items()
        }

    if args.budget_minutes is None:
        return seconds(60.0)
    low, high = 0.0, 3600.0
    for _ in range(40):
        middle = (low + high) / 2
        fits = fixed + sum(seconds(middle).values()) <= 60 * args.budget_minutes
        low, high = (middle, high) if fits else (low, middle)
    return seconds(low)


def measure(
    model: str,
    ranks: int,
    group: list[Scenario],
    budgets: dict[str, float],
    args: argparse.Namespace,
    console: Console,
) -> None:
    """All unfinished cells of a group."""
    paths = {s.name: args.out / f"{s.name}.jsonl" for s in group}
    todo = [s for s in group if not finished_seeds(paths[s.name], s)]
    if not todo:
        console.print(f"{model}, {ranks} ranks: finished before")
        return
    for scenario in todo:
        paths[scenario.name].unlink(missing_ok=True)  # a part of a cell, from before an interruption
    console.print(f"{model}, {ranks} ranks: {len(todo)} cells, building and warming up")
    recorder, start, preamble = None, time.monotonic(), []
    with SweepRunner(todo, [budgets[s.name] - turn_s(model, ranks, s) for s in todo]) as runner:
        facts = runner.open()
        try:
            for rank, record in runner.run(0):
                if record["record"] in ("refused", "start") and rank == 0:
                    preamble.append(record)
                if record["record"] == "warm":
                    if recorder is not None:
                        recorder.write("end", {"seed": 0})
                        recorder.close()
                    scenario = todo[record["phase"]]
                    facts = {"runner": "namespaces", **runner.facts[record["phase"]]}
                    link = facts["link"]
                    rates = ", ".join(f"{pair['mbit_s']:.0f}" for pair in link["measured"])
                    verified = {True: "verified", False: "NOT within 5 %", None: ""}[link["verified"]]
                    console.print(
                        f"  {time.monotonic() - start:6.0f} s  {scenario.link}: {rates} Mbit/s {verified}; "
                        f"about {budgets[scenario.name]:.0f} s"
                    )
                    recorder = Recorder(paths[scenario.name], scenario, facts)
                    for kept in preamble:
                        recorder.take(0, 0, kept)
                if recorder is not None and not (record["record"] == "block" and record["warmup"]):
                    recorder.take(0, rank, record)
            assert recorder is not None
            recorder.write("end", {"seed": 0})
        finally:
            if recorder is not None:
                recorder.close()


def losses(args: argparse.Namespace, console: Console) -> None:
    """Final losses over three seeds. They do not depend on the link or on the load, so loopback does."""
    for model, ranks in GROUPS:
        if model in args.models and ranks in args.ranks:
            codecs = tuple(
                c for c in args.codecs if not (c.startswith("free:") or (ranks == 2 and c == "int4+int4"))
            )
            scenario = Scenario(
                name=f"loss_{model}_{ranks}ranks",
                model=MODELS[model] if not args.tiny else f"{model}-tiny",
                codecs=codecs,
                ranks_per_node=ranks,
                seeds=(0, 1, 2),
                steps=args.loss_steps,
                batch_size=8,
            )
            console.print(f"{scenario.name}: 3 seeds of {args.loss_steps} steps with {len(codecs)} codecs")
            execute(LocalRunner(scenario), args.out / f"{scenario.name}.jsonl")


def main() -> None:
    """Plan, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "sweep", help="records (default out/sweep)"
    )
    parser.add_argument("--budget-minutes", type=float, help="fit all cells into this; else 60 s a cell")
    parser.add_argument("--min-turns", type=int, default=3, help="samples of a slow cell (default 3)")
    parser.add_argument("--max-turns", type=int, default=25, help="samples of a fast cell (default 25)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, choices=(2, 4), default=[2, 4])
    parser.add_argument("--rates", nargs="+", default=list(RATES), help="(default %(default)s)")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), help="(default %(default)s)")
    parser.add_argument("--losses", action="store_true", help="final losses instead of times")
    parser.add_argument("--loss-steps", type=int, default=40, help="(default 40)")
    parser.add_argument("--plan", action="store_true", help="show the plan only")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    args = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    try:
        if args.losses:
            losses(args, console)
        else:
            groups = list(cells(args))
            budgets = plan(groups, args)
            for model, ranks, group in groups:
                parts = [f"{s.link} {budgets[s.name]:.0f} s" for s in group]
                console.print(f"{model}, {ranks} ranks: {', '.join(parts)}")
            setups = sum(SETUP_S + len(group) * ranks * VERIFY_S for _, ranks, group in groups)
            console.print(f"expected: {(sum(budgets.values()) + setups) / 60:.0f} minutes")
            if args.plan:
                return
            for model, ranks, group in groups:
                measure(model, ranks, group, budgets, args, console)
        console.print(f"report: {write_report(args.out)}")
    except KeyboardInterrupt:
        raise SystemExit("stopped; finished cells are kept, the same command continues") from None
    except GradqError as error:
        raise SystemExit(f"sweep.py: {error}") from None


if __name__ == "__main__":
    main()
