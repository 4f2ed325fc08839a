"""Bytes that leave a node: the hierarchical form against the flat ones, counted by the network interface.

    python benchmarks/hierarchical_bytes.py          # needs root: it makes two network namespaces

Two namespaces ("nodes") joined by one veth pair, two ranks in each. The counters of the link (/proc/net/dev)
are read on one node before and after a number of averages; headers of TCP and Ethernet are in them, and a
packet that the kernel has merged counts once. Byte counts do not depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gradq.bench.records import write_record
from gradq.options import SyncConfig
from gradq.policy import FixedPolicy, ParameterInfo, Spec
from gradq.sync.gradient_sync import GradientSync

ROOT = Path(__file__).resolve().parent.parent
NODES, LOCAL_WORLD_SIZE, PORT = 2, 2, 29571
LINK = "gq0"


def link_bytes() -> int:
    """Bytes this namespace has sent over the link."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == LINK:
            return int(counters.split()[8])
    raise SystemExit(f"no interface {LINK} here")


def worker(args: argparse.Namespace) -> None:
    """One rank: averages random gradients; rank 0 writes what its node sent."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank = dist.get_rank()
    infos = [
        ParameterInfo(name=f"p{index}", shape=shape, dtype=torch.float32, index=index)
        for index, shape in enumerate([(args.width, args.width), (args.width,)] * args.layers)
    ]
    flat = torch.randn(sum(i.numel for i in infos), generator=torch.Generator().manual_seed(rank))
    rows = {}
    for collective in ("direct", "two_phase", "hierarchical"):
        nodes = LOCAL_WORLD_SIZE if collective == "hierarchical" else 1
        config = SyncConfig(collective=collective, local_world_size=nodes)
        policy = FixedPolicy(spec=Spec.parse(args.codec))
        sync = GradientSync(infos, policy, args.codec, dist.group.WORLD, config)
        averaged = flat.clone()
        dist.barrier()
        before = link_bytes()
        for _ in range(args.steps):
            averaged.copy_(flat)
            sync.average_buckets([(averaged, [i.name for i in infos])])[0].wait()
        dist.barrier()
        sent = link_bytes() - before
        stats = sync.stats()
        rows[collective] = {
            "link_bytes_per_step": sent / args.steps,
            "rank_wire_bytes_per_step": stats.wire_bytes / args.steps,
            "rank_intra_node_bytes_per_step": stats.intra_node_bytes / args.steps,
        }
        digest = averaged.view(torch.int32).sum(dtype=torch.int64)
        everyone = [torch.zeros_like(digest) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, digest)
        assert all(int(other) == int(digest) for other in everyone), "replicas differ"
        sync.close()
    if rank == 0:
        args.json.write_text(json.dumps({"numel": flat.numel(), "rows": rows}))
    dist.barrier()
    dist.destroy_process_group()


class Network:
    """Two namespaces joined by a veth pair; gone when the process ends, whatever ends it."""

    def __init__(self) -> None:
        self.names = [f"gqh{os.getpid()}n{node}" for node in range(NODES)]
        atexit.register(self.close)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", LINK, "netns", self.names[0], "type", "veth", "peer", LINK, "netns", self.names[1])
        for node, name in enumerate(self.names):
            ip("-n", name, "address", "add", f"10.77.0.{node + 1}/24", "dev", LINK)
            ip("-n", name, "link", "set", LINK, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def close(self) -> None:
        """Remove the namespaces, and the link with them. Idempotent."""
        while self.names:
            subprocess.run(["ip", "netns", "delete", self.names.pop()], capture_output=True, check=False)


def ip(*words: str) -> None:
    """Run `ip`.

    Raises:
        SystemExit: it failed; what it said is in the message.
    """
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"ip {' '.join(words)}: {done.stderr.strip()} (this benchmark needs root)")


def run_nodes(network: Network, args: argparse.Namespace, result: Path) -> dict[str, Any]:
    """Start all ranks with torchrun's variables and wait for them."""
    processes = []
    try:
        for rank in range(NODES * LOCAL_WORLD_SIZE):
            node, local_rank = divmod(rank, LOCAL_WORLD_SIZE)
            environment = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": str(NODES * LOCAL_WORLD_SIZE),
                "LOCAL_RANK": str(local_rank),
                "LOCAL_WORLD_SIZE": str(LOCAL_WORLD_SIZE),
                "MASTER_ADDR": "10.77.0.1",
                "MASTER_PORT": str(PORT),
                "GLOO_SOCKET_IFNAME": LINK,
                "OMP_NUM_THREADS": "1",
            }
            command = ["ip", "netns", "exec", network.names[node], sys.executable, __file__, "--worker"]
            command += [f"--codec={args.codec}", f"--width={args.width}", f"--layers={args.layers}"]
            command += [f"--steps={args.steps}", f"--json={result}"]
            processes.append(subprocess.Popen(command, env=environment))
        deadline = time.monotonic() + args.timeout
        while any(process.poll() is None for process in processes):
            failed = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
            if failed or time.monotonic() > deadline:
                raise SystemExit(f"ranks {failed} failed" if failed else f"no end after {args.timeout} s")
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    read: dict[str, Any] = json.loads(result.read_text())
    return read


def main() -> None:
    """Measure, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--codec", default="int8", help="gradq spec (default int8)")
    parser.add_argument("--width", type=int, default=1024, help="of the square matrices (default 1024)")
    parser.add_argument("--layers", type=int, default=4, help="number of matrices (default 4)")
    parser.add_argument("--steps", type=int, default=5, help="averages to count (default 5)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds until all ranks are ended")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="where the record goes"
    )
    parser.add_argument("--no-record", action="store_true", help="only print")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    network = Network()
    try:
        with tempfile.TemporaryDirectory() as folder:
            measured = run_nodes(network, args, Path(folder) / "result.json")
    finally:
        network.close()
    rows = measured["rows"]
    flat = min(rows[name]["link_bytes_per_step"] for name in ("direct", "two_phase"))
    summary = {
        "nodes": NODES,
        "local_world_size": LOCAL_WORLD_SIZE,
        "codec": args.codec,
        "numel": measured["numel"],
        "hierarchical_of_flat": rows["hierarchical"]["link_bytes_per_step"] / flat,
        "rows": rows,
    }
    print(json.dumps(summary, indent=1))
    if not args.no_record:
        path = write_record(args.out, "hierarchical_bytes", **summary)
        print(f"written to {os.path.relpath(path)}", file=sys.stderr)


if __name__ == "__main__":
    main()
