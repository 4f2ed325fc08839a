"""How long the first `gradq.compress` takes on a machine that has compiled no kernels yet.

Every repeat has an empty cache folder and two real ranks (or `--world-size`), started as new processes. Timed
in each rank, from a barrier on: `gradq.compress(model, spec)`, which compiles or loads all kernels; reported
is the slowest rank's time, and the CPU time of all ranks together, which says more on a shared machine. A
second start with the same cache shows what is left when nothing is compiled.

    python benchmarks/cold_start.py --record
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gradq.bench.records import write_record

RESULTS = Path(__file__).parent / "results"
SPECS = ("int8", "int4", "rot4", "topk")

RANK = """
import json, os, resource, time
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
import gradq
rank, world_size = int(os.environ["R"]), int(os.environ["W"])
spec, store = os.environ["SPEC"], os.environ["STORE"]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
ddp = DDP(nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)))
dist.barrier()
start, cpu = time.perf_counter(), time.process_time()
handle = gradq.compress(ddp, spec)
compress, used = time.perf_counter() - start, time.process_time() - cpu
start = time.perf_counter()
ddp(torch.randn(4, 512)).square().sum().backward()
step = time.perf_counter() - start
print(json.dumps({"compress_s": compress, "cpu_s": used, "first_step_s": step}))
handle.close()
dist.destroy_process_group()
"""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--specs", nargs="+", default=SPECS, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="starts of each spec (default: 5)")
    parser.add_argument("--world-size", type=int, default=2, help="ranks (default: 2)")
    parser.add_argument("--record", action="store_true", help="write a record to benchmarks/results/")
    return parser.parse_args()


def start(spec: str, world_size: int, cache: str) -> dict[str, float]:
    """One start of all ranks: the slowest rank's times in seconds, the CPU time of all."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world_size):
            variables = {
                "R": str(rank),
                "W": str(world_size),
                "SPEC": spec,
                "STORE": f"{folder}/store",
                "NUMBA_CACHE_DIR": cache,
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
            }
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-c", RANK],
                    env=os.environ | variables,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            )
        rows = [json.loads(process.communicate(timeout=900)[0]) for process in ranks]
    return {
        "compress_s": max(row["compress_s"] for row in rows),
        "cpu_s": sum(row["cpu_s"] for row in rows),
        "first_step_s": max(row["first_step_s"] for row in rows),
    }


def main() -> None:
    """Every spec in turn, repeated, so that a slow moment of the machine meets all of them."""
    arguments = parse_arguments()
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for repeat in range(arguments.repeats):
        for spec in arguments.specs:
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):
                    row = start(spec, arguments.world_size, cache)
                    found.setdefault((spec, state), []).append(row)
                    print(f"{time.strftime('%H:%M:%S')} {repeat} {spec} {state} {row}", file=sys.stderr)
    rows = []
    print(f"{'spec':8} {'cache':5} {'compress, s':>24} {'CPU of all ranks, s':>20} {'first step, s':>14}")
    for (spec, state), values in found.items():
        row: dict[str, object] = {"spec": spec, "cache": state, "repeats": len(values)}
        for key in ("compress_s", "cpu_s", "first_step_s"):
            series = sorted(value[key] for value in values)
            row[key] = {"median": statistics.median(series), "least": series[0], "most": series[-1]}
        rows.append(row)
        wall, cpu, step = (row[key] for key in ("compress_s", "cpu_s", "first_step_s"))
        print(
            f"{spec:8} {state:5} {wall['median']:8.2f} ({wall['least']:.2f} to {wall['most']:.2f})"
            f" {cpu['median']:14.2f} {step['median']:14.3f}"
        )
    if arguments.record:
        facts = {"world_size": arguments.world_size, "rows": rows, "load": os.getloadavg()}
        print(write_record(RESULTS, "cold_start", **facts))


if __name__ == "__main__":
    main()
