"""Bytes a rank sends in a step, relative to a ring all-reduce in fp32, for a GPT of 5 M parameters.

    python benchmarks/wire_bytes.py

Headers, scales, padding and the exact small parameters are counted; TCP's own headers are not. The count is
what `handle.stats()` says; tests/distributed/test_wire_bytes.py holds it to what the process group is given.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from gradq.bench.records import write_record
from gradq.options import SyncConfig
from gradq.policy import FixedPolicy, ParameterInfo, Spec
from gradq.sync.gradient_sync import GradientSync
from gradq.testing import run_ranks

ROOT = Path(__file__).resolve().parent.parent


def one_step(rank: int, spec: str) -> tuple[int, int, int]:
    """Bytes sent, bytes of the ring, and parameters."""
    sys.path.insert(0, str(ROOT / "examples"))
    import train_gpt

    infos = [
        ParameterInfo(name=name, shape=tuple(p.shape), dtype=p.dtype, index=index)
        for index, (name, p) in enumerate(train_gpt.build("5m").named_parameters())
    ]
    sync = GradientSync(infos, FixedPolicy(spec=Spec.parse(spec)), spec, dist.group.WORLD, SyncConfig())
    flat = torch.randn(sum(info.numel for info in infos))
    sync.average_buckets([(flat, [info.name for info in infos])])[0].wait()
    stats = sync.stats()
    sync.close()
    return stats.wire_bytes, stats.dense_bytes, flat.numel()


def main() -> None:
    """Measure, print the table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--codecs", nargs="+", default=["bf16", "int8", "int4", "int4+int4", "rot4"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    args = parser.parse_args()
    rows = []
    for spec in args.codecs:
        for ranks in args.ranks:
            results = run_ranks(one_step, ranks, spec, timeout=120.0)
            sent, dense = sum(r[0] for r in results), sum(r[1] for r in results)
            rows.append(
                {"codec": spec, "ranks": ranks, "relative_bytes": sent / dense, "numel": results[0][2]}
            )
            print(f"{spec:10s} {ranks} ranks: {sent / dense:.4f}", flush=True)
    path = write_record(ROOT / "benchmarks" / "results", "wire_bytes", rows=rows)
    print(f"written to {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
