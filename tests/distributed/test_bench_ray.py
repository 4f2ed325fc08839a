"""The Ray runner on real clusters: one node always; three that lose a worker, and Ray Train, when asked."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gradq.bench.reading import read_lines
from gradq.bench.summary import summarise

pytest.importorskip("ray")

ROOT = Path(__file__).parents[2]


def command(*arguments: str, timeout: float, check: bool = True) -> subprocess.CompletedProcess:
    """Run something in a process of its own: Ray leaves threads and warnings behind."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False
    )
    assert not check or done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def bench(*options: str, timeout: float = 100, check: bool = True) -> subprocess.CompletedProcess:
    return command(
        "-c", "from gradq.cli import main; main()", "bench", *options, timeout=timeout, check=check
    )


@pytest.mark.timeout(240)
def test_one_node(tmp_path):
    before = set(Path("/tmp").glob("gradq-bench-snapshots-*"))
    options = ["--cluster", "local", "--nodes", "1", "--ranks-per-node", "2", "--model", "mlp-tiny"]
    done = bench(*options, "--steps", "8", "--codecs", "int4", "--out", str(tmp_path), "--json", timeout=200)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    rows = {row["codec"]: row for row in result["rows"]}
    assert rows.keys() == {"none", "bf16", "int4", "torch-powersgd:1", "free:int4", "compute"}
    assert all(row["step_ms"]["samples"] == 2 for row in rows.values())
    assert result["runner"] == "ray"
    assert "preflight: ranks 0 on" in done.stderr
    kinds = [line["record"] for line in read_lines(tmp_path / "bench.jsonl")]
    assert kinds.index("nodes") < kinds.index("preflight") < kinds.index("block")
    assert set(Path("/tmp").glob("gradq-bench-snapshots-*")) <= before  # others may have theirs


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_no_cluster_is_explained(tmp_path):
    options = ["--cluster", "127.0.0.1:1", "--nodes", "2", "--out", str(tmp_path)]
    done = bench(*options, timeout=200, check=False)
    assert done.returncode == 1
    assert "cannot reach the Ray cluster 127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_too_few_nodes_is_explained(tmp_path):
    done = bench("--cluster", "local", "--nodes", "2", "--out", str(tmp_path), timeout=200, check=False)
    assert done.returncode == 1
    assert "2 nodes are asked for (--nodes), local has 1" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(os.geteuid() != 0, reason="the nodes are network namespaces, which take root")
def test_three_nodes_survive_a_killed_worker(tmp_path):
    options = ["--model", "gpt-tiny", "--steps", "24", "--seeds", "3", "--out", str(tmp_path)]
    done = command("benchmarks/ray_cluster.py", *options, timeout=850)
    assert "killing the worker of rank 1" in done.stdout
    assert re.search(r"3 seeds, 1 restart\(s\) after the kill", done.stdout)
    summary = summarise(tmp_path / "ray_gpt_3nodes.jsonl")
    assert summary.finished == [0, 1, 2]
    assert summary.scenario.nodes == 3
    assert summary.header["link"]["verified"] is True
    assert {"none", "bf16", "int8", "int4", "int4+int4"} <= {row.codec for row in summary.rows}
    assert all(len(row.losses.values) == 3 for row in summary.rows if row.losses)
    lines = read_lines(tmp_path / "ray_gpt_3nodes.jsonl")
    starts = [line["first_turn"] for line in lines if line["record"] == "start"]
    assert len(starts) == 4
    assert starts[1] > 0, "it went on from a checkpoint"
    addresses = {rank["address"] for line in lines if line["record"] == "nodes" for rank in line["ranks"]}
    assert len(addresses) == 3
    assert (tmp_path / "report.html").exists()
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert "gradq-" not in listed or not any(str(os.getpid()) in line for line in listed.splitlines())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_train_ends_with_the_same_numbers_after_a_fault(tmp_path):
    options = ["--params", "tiny", "--steps", "9", "--checkpoint-every", "3", "--batch-size", "2"]
    metrics = []
    for name, extra in (("whole", []), ("killed", ["--kill-at", "7"])):
        done = command(
            "examples/ray_train.py", *options, *extra, "--name", name, "--out", str(tmp_path), timeout=280
        )
        metrics.append(json.loads(done.stdout.strip().splitlines()[-1]))
    whole, killed = metrics
    assert whole["resumed_from"] == 0
    assert killed["resumed_from"] == 6, "from the checkpoint before the kill"
    assert killed["step"] == whole["step"] == 9
    assert killed["loss"] == whole["loss"], "gradq's residuals came back bit for bit"
