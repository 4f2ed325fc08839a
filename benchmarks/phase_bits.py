"""How many bits should phase 2 have? The error of the mean, for pairs of codecs, by number of ranks.

    python benchmarks/phase_bits.py [--out benchmarks/results/phase_bits]

Phase 1 errs W times and the mean averages that down; phase 2 errs once and all ranks see it whole. So phase 2
needs more bits, and more with more ranks. Inputs: gradients of the GPT of examples/train_gpt.py (1m) at two
points of its training, each weight of two dimensions encoded by itself, piece by piece as in two_phase.

Every row is one codec of phase 1, one of phase 2 and one W. `phase1` is ‖mean Q1(x_r) - mean x_r‖² / ‖mean
x_r‖², `total` the same of Q2(mean Q1(x_r)), and `added` is total / phase1 - 1. "feedback" rows keep residuals
as feedback="auto" does, for 5 steps, and are of the last 2; in each step every rank gets another rank's
gradients. The last column of the table is the cheapest phase 2 of the family intN that adds at most --most.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from capture import capture
from torch import Tensor

from gradq import codecs, rng, wire
from gradq.bench.records import environment
from gradq.codecs import Codec

PHASE1 = ("int4", "rot2", "int2", "int3", "rot4", "rot1", "int6", "int8")
PHASE2 = ("int2", "int3", "int4", "int5", "int6", "int7", "int8", "bf16", "fp32")
PHASE2_ROTATED = ("rot2", "rot4", "rot6", "rot4(levels=trellis)")
STEPS, SETTLED = 5, 2
LIMITS = (0.05, 0.1, 0.25, 0.5)
Totals = dict[tuple[str, str], float]


class Pair:
    """One parameter through both phases, with or without feedback, for one codec of phase 1."""

    def __init__(self, name: str, numel: int, index: int, world_size: int, codec: Codec, feedback: bool):
        self.id, self.numel, self.world_size = rng.name_id(name), numel, world_size
        self.feedback = feedback and codec.wants_feedback
        self.codec = codec.for_feedback(self.feedback)
        grain = max(4096, codec.block_size)
        pieces = [wire.shard(numel, grain, world_size, owner, index) for owner in range(world_size)]
        self.pieces = [(start, stop) for start, stop in pieces if start < stop]
        self.local = torch.zeros(world_size, numel) if self.feedback else None
        self.shard: dict[str, Tensor] = {}

    def mean(self, xs: list[Tensor], step: int) -> Tensor:
        """Phase 1: the mean of what every rank sends."""
        mean = torch.empty(self.numel)
        for start, stop in self.pieces:
            payloads = torch.empty(self.world_size, self.codec.nbytes(stop - start), dtype=torch.uint8)
            for rank, x in enumerate(xs):
                context = rng.EncodeContext(
                    key=rng.dither_key(0, step, self.id, 1),
                    shift=rng.dither_shift(rank, self.world_size),
                    first_block=start // self.codec.block_size,
                )
                residuals = {}
                if self.local is not None:
                    own = self.local[rank, start:stop]
                    residuals = {"residual": own.clone(), "new_residual": own}
                self.codec.encode(x[start:stop], payloads[rank], context=context, **residuals)
            self.codec.decode_mean(payloads, mean[start:stop])
        return mean

    def spread(self, mean: Tensor, codec: Codec, step: int) -> Tensor:
        """Phase 2: what everyone decodes."""
        feedback = self.feedback and codec.wants_feedback
        codec = codec.for_feedback(feedback)
        out = torch.empty(self.numel)
        shard = self.shard.setdefault(str(codec), torch.zeros(self.numel)) if feedback else None
        for start, stop in self.pieces:
            payload = torch.empty(codec.nbytes(stop - start), dtype=torch.uint8)
            context = rng.EncodeContext(
                key=rng.dither_key(0, step, self.id, 2), first_block=start // codec.block_size
            )
            residuals = {}
            if shard is not None:
                residuals = {"residual": shard[start:stop].clone(), "new_residual": shard[start:stop]}
            codec.encode(mean[start:stop], payload, context=context, **residuals)
            codec.decode(payload, out[start:stop])
        return out


def energy(x: Tensor) -> float:
    """Sum of squares."""
    return float(x.double().square().sum())


def measure(
    ranks: list[dict[str, Tensor]], spec: str, world_size: int, feedback: bool, totals: Totals
) -> None:
    """Add the energies of one stage to totals, by codec of phase 2; "" is phase 1 alone."""
    codec = codecs.from_spec(spec)
    seconds = PHASE2 + (PHASE2_ROTATED if spec.startswith("rot") else ())
    for index, name in enumerate(ranks[0]):
        pair = Pair(name, ranks[0][name].numel(), index, world_size, codec, feedback)
        for step in range(STEPS if feedback else 1):
            xs = [ranks[(rank + step * world_size) % len(ranks)][name] for rank in range(world_size)]
            exact, phase1 = torch.stack(xs).mean(0), pair.mean(xs, step)
            settled = not feedback or step >= STEPS - SETTLED
            if settled:
                totals["exact", ""] += energy(exact)
                totals["error", ""] += energy(phase1 - exact)
            for second in seconds:
                out = pair.spread(phase1, codecs.from_spec(second), step)
                if settled:
                    totals["error", second] += energy(out - exact)


def bits(spec: str) -> float:
    """On the wire, scales included."""
    return codecs.from_spec(spec).wire_bits_per_element(1 << 20)


def cheapest(rows: list[dict[str, Any]], most: float) -> str:
    """The phase 2 with the fewest bits that adds at most `most`."""
    fit = [row for row in rows if row["added"] <= most and not row["codec2"].startswith("rot")]
    return min(fit, key=lambda row: row["bits2"])["codec2"]


def report(totals: dict[tuple[str, int, bool], Totals], most: float, out: Path) -> None:
    """The table, OUT.csv and OUT.json."""
    rows: list[dict[str, Any]] = []
    summary: list[dict[str, Any]] = []
    print(
        f"{'phase 1':>9} {'feedback':>8} {'W':>3} {'phase 1 error':>14}  cheapest phase 2, bits more, ½ log W"
    )
    for (spec, world_size, feedback), found in totals.items():
        first = found["error", ""] / found["exact", ""]
        group = [
            {
                "codec1": spec,
                "feedback": feedback,
                "world_size": world_size,
                "codec2": second,
                "bits1": bits(spec),
                "bits2": bits(second),
                "phase1": first,
                "total": error / found["exact", ""],
                "added": error / found["error", ""] - 1,
            }
            for (kind, second), error in found.items()
            if kind == "error" and second
        ]
        rows += group
        best = cheapest(group, most)
        key = {"codec1": spec, "feedback": feedback, "world_size": world_size}
        summary.append(key | {f"most {limit}": cheapest(group, limit) for limit in LIMITS})
        print(
            f"{spec:>9} {feedback!s:>8} {world_size:>3} {first:14.3g}  {best:>5} "
            f"{bits(best) - bits(spec):+6.2f} {math.log2(world_size) / 2:6.2f}",
            flush=True,
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    setting = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(),
        "most": most,
        "cheapest": summary,
    }
    out.with_suffix(".json").write_text(json.dumps(setting, indent=1) + "\n")


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/phase_bits")
    parser.add_argument("--stages", type=int, nargs="+", default=[30, 300], help="steps of training")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 64])
    parser.add_argument("--codecs", nargs="+", default=list(PHASE1), help="of phase 1")
    parser.add_argument("--most", type=float, default=0.1, help="error that phase 2 may add (default 0.1)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    totals: dict[tuple[str, int, bool], Totals] = defaultdict(lambda: defaultdict(float))
    for stage, ranks in capture(args.stages, max(args.ranks)):
        for spec in args.codecs:
            for world_size in args.ranks:
                for feedback in (False, True) if codecs.from_spec(spec).wants_feedback else (False,):
                    measure(ranks, spec, world_size, feedback, totals[spec, world_size, feedback])
            print(f"step {stage}: {spec}", file=sys.stderr, flush=True)
        report(totals, args.most, Path(args.out))


if __name__ == "__main__":
    main()
