"""`gradq bench` as a user runs it: real ranks, records, errors that end cleanly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import end, launch

from gradq.bench.reading import read_lines
from gradq.bench.summary import summarise
from gradq.cli.app import run

TINY = ["bench", "--model", "gpt-tiny", "--seq-len", "16", "--batch-size", "2"]


def start(*options: str, **environment: str) -> subprocess.Popen:
    """The command in a process of its own, so that signals can reach it."""
    return launch(list(options), os.environ | environment)


def wait_for(path: Path, kind: str, process: subprocess.Popen, count: int = 1) -> list[dict]:
    """The record's lines, once it has some of a kind."""
    deadline = time.monotonic() + 90
    while True:
        lines = read_lines(path)
        if sum(line["record"] == kind for line in lines) >= count:
            return lines
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"no {kind}: {process.communicate()}")
        time.sleep(0.1)


def workers(owner: int) -> list[int]:
    """Ranks of a benchmark that are alive, found by what they were started with."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_text().split("\0")
        except OSError:
            continue
        if "gradq.bench.worker" in command and any(f"gradq-bench-{owner}-" in part for part in command):
            found.append(int(entry.parent.name))
    return found


def gone(pid: int, timeout: float = 20.0) -> bool:
    """Whether the workers and the temporary folder of a benchmark's process are gone, soon."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if not workers(pid) and not list(Path("/tmp").glob(f"gradq-bench-{pid}-*")):
            return True
        time.sleep(0.2)
    return False


def test_a_run_is_recorded_and_reported(tmp_path, capsys):
    peer = tmp_path / "peer.py"
    peer.write_text(
        "from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook\n"
        "def attach(model):\n    model.register_comm_hook(None, allreduce_hook)\n"
    )
    codecs = f"int8,int4,torch-fp16,torch-bf16,{peer}:attach"
    options = [
        *TINY,
        "--steps",
        "8",
        "--accumulate",
        "2",
        "--codecs",
        codecs,
        "--out",
        str(tmp_path),
        "--json",
    ]
    assert run(options) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    rows = {row["codec"]: row for row in result["rows"]}
    builds_with_bf16 = [] if result["refused"] else ["torch-bf16"]
    assert list(rows) == [
        "none",
        "bf16",
        "int8",
        "int4",
        "torch-fp16",
        *builds_with_bf16,
        f"{peer}:attach",
        "torch-powersgd:1",
        "free:int4",
        "compute",
    ]
    if not builds_with_bf16:
        assert "BF16" in result["refused"]["torch-bf16"], "this build's Gloo has no bf16 sums"
    for row in rows.values():
        assert row["step_ms"]["samples"] == 2
        assert row["step_ms"]["median"] > 0
    assert rows["none"]["ratio"]["median"] == 1
    dense = rows["none"]["wire_bytes"]
    assert dense == 4 * result["parameters"], "a ring over two ranks sends every gradient once"
    assert rows["torch-fp16"]["wire_bytes"] == dense / 2
    assert rows["bf16"]["wire_bytes"] == pytest.approx(dense / 2, rel=0.01)
    assert rows["int4"]["wire_bytes"] < rows["int8"]["wire_bytes"] < 0.3 * dense
    assert rows["free:int4"]["wire_bytes"] == rows["int4"]["wire_bytes"], "a free codec sends the right bytes"
    assert rows["torch-powersgd:1"]["wire_bytes"] < 0.3 * dense
    assert rows["compute"]["wire_bytes"] == 0
    assert rows["free:int4"]["losses"] is None
    assert rows["none"]["losses"]["values"][0] == pytest.approx(rows["int8"]["losses"]["values"][0], abs=0.01)
    assert rows[f"{peer}:attach"]["losses"]["values"] == pytest.approx(
        rows["none"]["losses"]["values"], abs=1e-4
    )

    record = tmp_path / "bench.jsonl"
    before = record.read_bytes()
    assert run(options) == 0, "a finished record is not measured again"
    assert record.read_bytes() == before
    header, *lines = read_lines(record)
    assert header["schema_version"] == 1
    assert header["scenario"]["accumulate"] == 2
    assert {"cpu", "torch", "cores"} <= header["environment"].keys()
    assert [line["seed"] for line in lines if line["record"] == "end"] == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--codecs", "int9"], "codec 'int9'"),
        (["--model", "gpt-2t"], "model='gpt-2t': choose from gpt-tiny"),
        (["--model", "nowhere.py:build"], "there is no file nowhere.py"),
        (["--scenario", "nowhere.toml"], "cannot read the scenario nowhere.toml"),
        (["--link", "1gbit"], "loopback cannot be 1 Gbit/s: say how many hosts to make, --hosts 2"),
        (["--hosts", "2", "--cluster", "auto"], "give one of them"),
        (["--nodes", "2"], "--nodes goes with --cluster"),
        (["--seeds", "x"], "--seeds"),
        (["--ranks", "1"], "one rank has nothing to exchange"),
    ],
)
def test_wrong_options_are_explained(options, message, tmp_path, capsys):
    assert run([*TINY[:1], *options, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not any(path.name.endswith(".jsonl") for path in tmp_path.iterdir())


def test_no_ray_is_explained(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(["bench", "--cluster", "auto", "--nodes", "2", "--out", str(tmp_path)]) == 2
    assert "--cluster needs Ray: pip install 'gradq[ray]'" in capsys.readouterr().err


def test_no_root_is_explained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gradq.bench.network.os.geteuid", lambda: 1000)
    monkeypatch.setattr("gradq.bench.network.shutil.which", lambda tool: f"/sbin/{tool}")
    assert run(["bench", "--hosts", "2", "--link", "1gbit", "--out", str(tmp_path)]) == 2
    assert "making hosts needs root: run the same command with sudo" in capsys.readouterr().err


def test_no_tc_is_explained(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(["bench", "--hosts", "2", "--link", "1gbit", "--out", str(tmp_path)]) == 2
    assert "making hosts needs ip: apt-get install iproute2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_cleans_up_and_continues(tmp_path, number):
    options = [*TINY, "--codecs", "int8", "--seeds", "2", "--out", str(tmp_path)]
    process = start(*options, "--steps", "400")
    record = tmp_path / "bench.jsonl"
    wait_for(record, "block", process, count=30)
    errors = end(process, number)
    assert process.returncode == (130 if number == signal.SIGINT else 143), errors
    assert gone(process.pid)
    kept = [line for line in read_lines(record) if line["record"] == "block"]
    assert len(kept) >= 30
    assert summarise(record).events[-1]["event"] == "stopped"

    again = start(*options, "--steps", "400")
    wait_for(record, "resumed", again)
    wait_for(record, "block", again, count=len(kept) + 5)
    end(again, signal.SIGTERM)
    assert [line for line in read_lines(record) if line["record"] == "block"][: len(kept)] == kept


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_dead_rank_is_named_and_its_peers_end(tmp_path):
    process = start(*TINY, "--codecs", "int8", "--steps", "4000", "--out", str(tmp_path))
    record = tmp_path / "bench.jsonl"
    wait_for(record, "block", process, count=20)
    victim = workers(process.pid)[0]
    os.kill(victim, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "died (killed by signal 9)" in errors
    assert gone(process.pid)
    assert sum(line["record"] == "block" for line in read_lines(record)) >= 20


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_ranks_end_when_their_parent_is_killed(tmp_path):
    process = start(*TINY, "--codecs", "int8", "--steps", "4000", "--out", str(tmp_path))
    wait_for(tmp_path / "bench.jsonl", "block", process, count=5)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while workers(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not workers(process.pid)
    from gradq.bench.runners.processes import remove_stale_folders

    remove_stale_folders()
    assert not list(Path("/tmp").glob(f"gradq-bench-{process.pid}-*"))


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk must be mounted, which takes root")
def test_a_full_disk_keeps_what_was_measured(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    try:
        process = start(*TINY, "--codecs", "int8", "--steps", "4000", "--out", str(disk))
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "No space left on device; what was measured until now is in it" in errors
        assert gone(process.pid)
        assert summarise(disk / "bench.jsonl").row("int8").step_ms.samples > 5
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_collectives(tmp_path, capsys):
    options = [
        "bench",
        "collectives",
        "--codecs",
        "none,int8",
        "--to",
        "64KB",
        "--from",
        "64B",
        "--factor",
        "1024",
    ]
    assert run([*options, "--out", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["size_bytes"], row["codec"]) for row in rows] == [
        (64, "none"),
        (64, "int8"),
        (65536, "none"),
        (65536, "int8"),
    ]
    assert all(row["wrong"] == 0 for row in rows)
    assert rows[0]["nmse"] < 1e-12 < rows[3]["nmse"] < 1e-3
    assert rows[2]["wire_bytes"] == 65536
    assert rows[3]["ratio"] > 3.5
    assert rows[3]["busbw_gbps"] == rows[3]["algbw_gbps"], "2 (W - 1) / W is 1 at two ranks"
    assert len(list(tmp_path.glob("collectives_2ranks_loopback_*.json"))) == 1
