"""A real Ray cluster of three nodes on one machine, over shaped links, that loses a worker. Needs root.

    sudo .venv/bin/python benchmarks/ray_cluster.py

Every node is a raylet in a network namespace with an address of its own; the links between them are shaped in
both directions and measured. `gradq bench --cluster` runs on the first node as it would on any cluster. When
the first seed is half way, one rank is killed (SIGKILL); the run must go on from its checkpoint. Ends with
the report.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gradq.bench.link import Link, parse_delay, parse_rate
from gradq.bench.network import Network
from gradq.bench.reading import read_lines
from gradq.bench.report import write_report
from gradq.bench.summary import summarise
from gradq.errors import BenchError, GradqError

ROOT = Path(__file__).resolve().parent.parent
PORT = 6379


class Cluster:
    """Raylets in namespaces. `close` ends them and removes the namespaces."""

    def __init__(self, num_nodes: int, link: Link) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"gradq-bench-{os.getpid()}-"))
        self.nodes: list[subprocess.Popen[bytes]] = []
        # a token of its own: without one Ray would use, or make, the user's
        (self.folder / "token").write_text(secrets.token_hex(32))
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
        }
        self.network = Network(num_nodes, link)
        try:
            self.network.shape()
            self.link = self.network.verify()
            for index in range(num_nodes):
                self._start(index)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """Of the head."""
        return f"{self.network.address(0)}:{PORT}"

    def _start(self, index: int) -> None:
        ray = shutil.which("ray", path=str(Path(sys.executable).parent)) or "ray"
        command = [*self.network.inside(index), ray, "start", "--block", "--num-cpus", "1"]
        command += ["--node-ip-address", self.network.address(index), "--disable-usage-stats"]
        if index == 0:
            command += [
                "--head",
                "--port",
                str(PORT),
                "--include-dashboard=false",
                "--temp-dir",
                str(self.folder / "r"),
            ]
        else:
            command += ["--address", self.address]
        log = (self.folder / f"node{index}.log").open("wb")
        self.nodes.append(
            subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, start_new_session=True)
        )
        log.close()
        deadline = time.monotonic() + 180
        while b"Ray runtime started" not in (text := (self.folder / f"node{index}.log").read_bytes()):
            if self.nodes[-1].poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"node {index} does not start:\n{text.decode()[-1500:]}")
            time.sleep(0.2)

    def close(self) -> None:
        """End everything."""
        for node in reversed(self.nodes):
            if node.poll() is None:
                node.terminate()
        for node in self.nodes:
            try:
                node.wait(15)
            except subprocess.TimeoutExpired:
                node.kill()
                node.wait()
        self.network.close()  # whatever a raylet left behind in its namespace ends here
        shutil.rmtree(self.folder, ignore_errors=True)


def run(cluster: Cluster, args: argparse.Namespace, kill: bool) -> None:
    """`gradq bench` on the head, killing a rank on the way.

    Raises:
        BenchError: it failed.
    """
    record = args.out / f"{args.name}.jsonl"
    facts = cluster.folder / "link.json"
    facts.write_text(json.dumps(cluster.link))
    command = [
        *cluster.network.inside(0),
        sys.executable,
        "-c",
        "from gradq.cli import main; main()",
        "bench",
    ]
    command += ["--cluster", cluster.address, "--nodes", str(args.nodes), "--link-record", str(facts)]
    for name in ("model", "codecs", "seeds", "steps", "block", "name", "link", "delay", "out", "batch_size"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    process = subprocess.Popen(command, env=cluster.environment)
    try:
        while process.poll() is None:
            time.sleep(0.5)
            if kill and (victim := _victim(record, args)):
                print(f"killing the worker of rank 1, process {victim}", flush=True)
                os.kill(victim, signal.SIGKILL)
                kill = False
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()
    if process.returncode:
        raise BenchError(f"gradq bench ended with {process.returncode}; what it measured is in {record}")
    if kill:
        raise BenchError("the run was over before a worker could be killed: give it more --steps")


def _victim(record: Path, args: argparse.Namespace) -> int | None:
    """The process of rank 1, once the first seed is half way."""
    lines = read_lines(record)
    turns = [line["turn"] for line in lines if line["record"] == "block"]
    if not turns or max(turns) < args.steps // args.block // 2:
        return None
    pids = [line["ranks"][1]["pid"] for line in lines if line["record"] == "nodes"]
    return int(pids[-1])


def main() -> None:
    """Make the cluster, run, kill, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--nodes", type=int, default=3, help="(default 3)")
    parser.add_argument("--link", default="500mbit", help="rate of each node's link (default 500mbit)")
    parser.add_argument("--delay", default="0ms", help="one way (default 0ms)")
    parser.add_argument("--model", default="gpt-1m", help="(default gpt-1m)")
    parser.add_argument("--codecs", default="none,bf16,int8,int4,int4+int4", help="(default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(default 3)")
    parser.add_argument("--steps", type=int, default=60, help="of each codec (default 60)")
    parser.add_argument("--block", type=int, default=2, help="steps a turn (default 2)")
    parser.add_argument("--batch-size", type=int, default=8, help="(default 8)")
    parser.add_argument("--name", default="ray_gpt_3nodes", help="of the record (default %(default)s)")
    parser.add_argument("--no-kill", action="store_true", help="let all workers live")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "ray_cluster", help="(default out/ray_cluster)"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    try:
        link = Link(rate_bps=parse_rate(args.link), delay_ms=parse_delay(args.delay))
        print(f"making {args.nodes} nodes, {link}", flush=True)
        cluster = Cluster(args.nodes, link)
        try:
            for pair in cluster.link["measured"]:
                print(f"node {pair['from']} to {pair['to']}: {pair['mbit_s']} Mbit/s", flush=True)
            run(cluster, args, kill=not args.no_kill)
        finally:
            cluster.close()
        page = write_report(args.out)
        summary = summarise(args.out / f"{args.name}.jsonl")
        restarts = sum(event["event"] == "restart" for event in summary.events)
        print(f"{len(summary.finished)} seeds, {restarts} restart(s) after the kill; report: {page}")
    except GradqError as error:
        raise SystemExit(f"ray_cluster.py: {error}") from None


if __name__ == "__main__":
    main()
