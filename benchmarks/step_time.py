"""What a training step costs with each codec on this machine's loopback, relative to plain DDP.

    python benchmarks/step_time.py --ranks 2 --model mlp

Loopback is the fastest link there is, so this is where compression is expected not to pay. This is
`gradq bench` on this machine with the README's settings and a record in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path

from gradq.bench.records import environment, hardware_slug
from gradq.bench.runners.local import LocalRunner
from gradq.bench.scenario import Scenario
from gradq.cli.bench_run import measure_scenario

ROOT = Path(__file__).resolve().parent.parent
MODELS = {"mlp": ("mlp-25m", 32), "gpt": ("gpt-5m", 8)}  # with the samples of a batch


def main() -> None:
    """Measure, print the table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--model", choices=MODELS, default="mlp", help="(default mlp)")
    parser.add_argument(
        "--codecs", nargs="+", default=["torch-fp16", "int8", "int4", "int4+int4"], help="specs"
    )
    parser.add_argument("--rounds", type=int, default=20, help="turns of every codec (default 20)")
    parser.add_argument("--block", type=int, default=2, help="steps a turn (default 2)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="for the record")
    args = parser.parse_args()
    model, batch_size = MODELS[args.model]
    scenario = Scenario(
        name=f"step_time_{args.model}_{args.ranks}ranks",
        model=model,
        batch_size=batch_size,
        codecs=tuple(args.codecs),
        ranks_per_node=args.ranks,
        steps=(args.rounds + 2) * args.block,
        block=args.block,
        evaluate=False,
    )
    slug = f"{hardware_slug(environment())}_{date.today().isoformat()}"
    measure_scenario(LocalRunner(scenario), args.out / f"{scenario.name}_{slug}.jsonl")


if __name__ == "__main__":
    main()
