"""Do bits given where they pay beat the same bits for all? Error and loss at equal bytes.

    python benchmarks/bit_allocation.py [--loss] [--out benchmarks/results/bit_allocation]

Error: gradients of the GPT of examples/train_gpt.py (1m), 4 ranks, at several steps of its training. For
every spec and stage, `allocate_bits` spends the spec's bytes by what was measured at the stage *before* (as
`gradq.BitAllocation` does) and, as the best it could do, by what is measured at the stage itself. `nmse` is
the error of all ranks' gradients over their energy, without residuals, `mean` that of their mean in one
phase.
A plan's bytes are never more than the spec's.

Loss (--loss): trains the example on 2 real ranks with the spec and with BitAllocation(bytes_of=spec), with
both weightings, several seeds; a seed decides weights, data and rounding. Finished runs are kept in --partial
and not repeated.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from capture import capture
from torch import Tensor

import gradq
from gradq import rng
from gradq.bench.records import environment
from gradq.codecs import Codec
from gradq.policy import FixedPolicy, GradientStatistics, Spec, allocate_bits
from gradq.testing import run_ranks

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = {
    "int": tuple(f"int{bits}" for bits in range(2, 9)),
    "rot": (*(f"rot{bits}" for bits in range(1, 7)), "int8"),
    "both": (*(f"rot{bits}" for bits in range(1, 5)), *(f"int{bits}" for bits in range(4, 9))),
}
SPECS = {"int": ("int3", "int4", "int5", "int6"), "rot": ("rot2", "rot3", "rot4"), "both": ("rot3", "int5")}
STAGES = (10, 30, 100, 200, 400, 800)
RANKS = 4

Gradients = list[dict[str, Tensor]]
Record = dict[str, Any]


def decided(spec: str) -> Codec:
    """The codec as feedback="auto" makes it travel."""
    return FixedPolicy(spec=Spec.parse(spec)).assignment().phase1


def energy(x: Tensor) -> float:
    """Sum of squares."""
    return float(x.double().square().sum())


class Errors:
    """The errors of codecs on one stage's gradients, each measured once."""

    def __init__(self, ranks: Gradients, stage: int) -> None:
        self.ranks, self.stage = ranks, stage
        self._found: dict[tuple[str, str], tuple[float, float]] = {}

    def of(self, name: str, spec: str) -> tuple[float, float]:
        """The summed error of the ranks' gradients, and the error of their mean."""
        if (name, spec) not in self._found:
            codec, error = decided(spec), 0.0
            mean = torch.zeros_like(self.ranks[0][name])
            for rank, gradients in enumerate(self.ranks):
                x = gradients[name]
                context = rng.EncodeContext(
                    key=rng.dither_key(0, self.stage, rng.name_id(name), 1),
                    shift=rng.dither_shift(rank, len(self.ranks)),
                )
                payload, out = torch.empty(codec.nbytes(x.numel()), dtype=torch.uint8), torch.empty_like(x)
                codec.encode(x, payload, context=context)
                codec.decode(payload, out)
                error += energy(out - x)
                mean += (out - x) / len(self.ranks)
            self._found[name, spec] = error, energy(mean)
        return self._found[name, spec]

    def statistics(self, specs: tuple[str, ...]) -> dict[str, GradientStatistics]:
        """For `allocate_bits`."""
        return {
            name: GradientStatistics(
                numel=x.numel(),
                energy=sum(energy(gradients[name]) for gradients in self.ranks),
                errors={spec: self.of(name, spec)[0] for spec in specs},
            )
            for name, x in self.ranks[0].items()
        }

    def total(self, plan: Mapping[str, str]) -> dict[str, float]:
        """NMSE of the gradients and of their mean under a plan."""
        signal = sum(energy(x) for gradients in self.ranks for x in gradients.values())
        mean = sum(energy(sum(g[name] for g in self.ranks) / len(self.ranks)) for name in plan)
        return {
            "nmse": sum(self.of(name, spec)[0] for name, spec in plan.items()) / signal,
            "mean": sum(self.of(name, spec)[1] for name, spec in plan.items()) / mean,
        }


def nbytes(plan: Mapping[str, str], ranks: Gradients) -> int:
    """Payload of one rank."""
    return sum(gradq.codecs.from_spec(spec).nbytes(ranks[0][name].numel()) for name, spec in plan.items())


def errors() -> list[Record]:
    """A row for every stage and spec."""
    rows: list[Record] = []
    before: dict[str, dict[str, GradientStatistics]] = {}
    for stage, ranks in capture(STAGES, RANKS):
        found = Errors(ranks, stage)
        for family, candidates in FAMILIES.items():
            now = found.statistics(candidates)
            for spec in SPECS[family] if family in before else ():
                single = dict.fromkeys(ranks[0], spec)
                budget = nbytes(single, ranks)
                plans = {
                    "single": single,
                    "allocated": allocate_bits(before[family], candidates, budget_bytes=budget).specs,
                    "hindsight": allocate_bits(now, candidates, budget_bytes=budget).specs,
                }
                row: Record = {"step": stage, "family": family, "spec": spec, "bytes": budget}
                for kind, plan in plans.items():
                    assert nbytes(plan, ranks) <= budget
                    row |= {f"{kind}_{name}": value for name, value in found.total(plan).items()}
                row["gain"] = row["single_nmse"] / row["allocated_nmse"]
                row["gain_of_mean"] = row["single_mean"] / row["allocated_mean"]
                rows.append(row)
                print(f"step {stage:4d}  {family:5} {spec:5}", end="")
                print(f"  nmse {row['single_nmse']:.3e} -> {row['allocated_nmse']:.3e}", end="")
                print(f"  {row['gain']:.2f}x less, mean {row['gain_of_mean']:.2f}x", flush=True)
            before[family] = now
    return rows


def train(rank: int, key: Record) -> Record | None:
    """One training run on this rank."""
    from train_gpt import Trainer

    args = argparse.Namespace(
        params=key["params"],
        batch_size=8,
        seq_len=64,
        accumulate=1,
        lr=1e-3,
        warmup=20,
        precision="fp32",
        feedback="auto",
        checkpoint=None,
        quiet=True,
        log_file=None,
        steps=key["steps"],
        seed=key["seed"],
        codec=key["spec"],
    )
    if key["weighting"]:
        options = {"every": key["every"], "weighting": key["weighting"]}
        args.codec = gradq.BitAllocation(
            bytes_of=key["spec"], candidates=FAMILIES[key["spec"][:3]], **options
        )
    trainer = Trainer(args)
    losses = [trainer.step(step)[0] for step in range(args.steps)]
    val_loss, stats = trainer.evaluate(), trainer.handle.stats()
    plan = args.codec.allocation if key["weighting"] else {}
    trainer.handle.close()
    if rank:
        return None
    ends = {"val_loss": val_loss, "train_loss": statistics.mean(losses[-20:])}
    return key | ends | {"wire_bytes_per_step": stats.wire_bytes / stats.steps, "plan": plan}


def losses(args: argparse.Namespace) -> list[Record]:
    """All training runs, the finished ones from a file."""
    args.partial.parent.mkdir(parents=True, exist_ok=True)
    args.partial.touch()
    settings = {name: getattr(args, name) for name in ("params", "steps", "every", "ranks")}
    keys = [
        {"spec": spec, "weighting": weighting, "seed": seed} | settings
        for seed in args.seeds
        for spec in args.specs
        for weighting in ("", "energy", "relative")
    ]
    todo = [key for key in keys if find(key, read(args.partial)) is None]
    if todo:
        run_ranks(train_all, args.ranks, todo, str(args.partial), timeout=36_000, group_timeout=1800)
    runs = read(args.partial)
    return [run for key in keys if (run := find(key, runs))]


def train_all(rank: int, keys: list[Record], partial: str) -> None:
    """All runs, one after another, on the same processes."""
    for key in keys:
        run = train(rank, key)
        if run is not None:
            with Path(partial).open("a") as file:
                file.write(json.dumps(run) + "\n")
            print({name: value for name, value in run.items() if name != "plan"}, flush=True)


def read(partial: Path) -> list[Record]:
    """The finished runs."""
    return [json.loads(line) for line in partial.read_text().splitlines()]


def find(key: Record, runs: list[Record]) -> Record | None:
    """The run of a key."""
    return next((r for r in runs if all(r.get(name) == value for name, value in key.items())), None)


def summary(runs: list[Record]) -> list[Record]:
    """By spec and weighting: mean and standard deviation over seeds of the loss, and of the difference."""
    rows: list[Record] = []
    for spec, weighting in dict.fromkeys((run["spec"], run["weighting"]) for run in runs):
        own = {r["seed"]: r for r in runs if (r["spec"], r["weighting"]) == (spec, weighting)}
        single = {r["seed"]: r["val_loss"] for r in runs if (r["spec"], r["weighting"]) == (spec, "")}
        differences = [own[seed]["val_loss"] - single[seed] for seed in own]
        row = {"spec": spec, "weighting": weighting or "single", "seeds": len(own)}
        row["val_loss"] = statistics.mean(run["val_loss"] for run in own.values())
        row["difference"] = statistics.mean(differences)
        row["difference_sd"] = statistics.stdev(differences) if len(own) > 1 else float("nan")
        row["wire_bytes_per_step"] = statistics.mean(run["wire_bytes_per_step"] for run in own.values())
        rows.append(row)
        print(row, flush=True)
    return rows


def plot(rows: list[Record], file: Path) -> None:
    """How much less error, by step."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for family, specs in SPECS.items():
        for spec in specs:
            own = [row for row in rows if (row["family"], row["spec"]) == (family, spec)]
            label = f"bytes of {spec}, candidates: {family}"
            axes.plot([row["step"] for row in own], [row["gain"] for row in own], "o-", label=label)
    axes.axhline(1.0, color="black", linestyle="--")
    axes.set(
        xscale="log", xlabel="step of training", ylabel="error of one spec / error allocated, same bytes"
    )
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150, bbox_inches="tight")


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "bit_allocation")
    parser.add_argument("--loss", action="store_true", help="train too")
    parser.add_argument("--specs", nargs="+", default=["int3", "int4", "rot2"], help="to train with")
    parser.add_argument("--params", default="1m", help="model size of the example, of --loss")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=50, help="steps between plans")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--partial", type=Path, default=ROOT / "out" / "bit_allocation.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    setting = {"command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d")}
    setting |= {"environment": environment(), "stages": STAGES, "ranks": RANKS, "families": FAMILIES}
    record: Record = {"setting": setting}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.loss:
        record["runs"] = losses(args)
        record["summary"] = summary(record["runs"])
        args.out.with_name(args.out.name + "_loss.json").write_text(json.dumps(record, indent=1) + "\n")
        return
    rows = record["rows"] = errors()
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    with args.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
