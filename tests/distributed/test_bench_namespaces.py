"""Hosts in network namespaces: rates, delay, bytes on the interface, and nothing left behind. Needs root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from processes import end, launch

from gradq.bench.link import Link
from gradq.bench.network import Network, remove_stale_namespaces
from gradq.bench.summary import summarise
from gradq.cli.app import run


def namespaces_work() -> str:
    """Why hosts cannot be made here, "" if they can."""
    if os.geteuid() != 0:
        return "network namespaces take root"
    if not (shutil.which("ip") and shutil.which("tc")):
        return "no ip and tc here: apt-get install iproute2"
    name = f"gradq-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return f"this system makes no namespaces: {made.stderr.strip()}" if made.returncode else ""


REASON = namespaces_work()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(REASON), reason=REASON or "they work"),
]


def ours() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith("gradq-")]


def owned_by(pid: int) -> list[str]:
    return [name for name in ours() if name.split("-")[1] == str(pid)]


def test_rates_are_what_they_say():
    for rate in (50e6, 500e6):
        network = Network(2, Link(rate_bps=rate))
        try:
            network.shape()
            found = network.verify()
        finally:
            network.close()
        assert found["verified"] is True, found
        assert len(found["measured"]) == 2, "both directions"
    assert not owned_by(os.getpid())


def test_delay_and_loss():
    network = Network(2, Link(delay_ms=10.0, loss=0.02))
    try:
        network.shape()
        found = network.verify(0.5)
    finally:
        network.close()
    assert found["delay_by"] in ("netem", "TAP switch")
    for pair in found["measured"]:
        assert 20.0 <= pair["round_trip_ms"] < 60.0, "10 ms one way"
        assert 0 < pair["mbit_s"] < 500.0, "loss holds TCP back"
    assert not owned_by(os.getpid())


def test_a_host_that_cannot_be_made_leaves_nothing(monkeypatch):
    from gradq.bench import network as module

    call = module._call

    def fails(*command: str, check: bool = True) -> str:
        if "h1" in command[-1] and command[:3] == ("ip", "netns", "add"):
            raise module.BenchError("the kernel refuses")
        return call(*command, check=check)

    monkeypatch.setattr(module, "_call", fails)
    with pytest.raises(module.BenchError, match="the kernel refuses"):
        Network(2, Link())
    assert not owned_by(os.getpid())


def test_bytes_on_the_interface_are_the_transports(tmp_path):
    """Within 3 % plus the protocol: 66 bytes of headers a packet of 1448, most of them not counted (GSO)."""
    options = [
        "bench",
        "--hosts",
        "2",
        "--link",
        "500mbit",
        "--model",
        "gpt-1m",
        "--steps",
        "8",
        "--block",
        "1",
    ]
    assert run([*options, "--codecs", "int8,int4", "--out", str(tmp_path)]) == 0
    summary = summarise(tmp_path / "bench.jsonl")
    assert summary.header["link"]["verified"] is True
    for codec in ("none", "bf16", "int8", "int4"):
        row = summary.row(codec)
        assert row.wire_bytes > 500_000
        assert -0.03 <= row.overhead <= 0.03 + 66 / 1448, f"{codec}: {row.overhead}"
    assert summary.row("none").ratio.median == 1
    assert not owned_by(os.getpid())


LONG = "bench --hosts 2 --link 1gbit --model gpt-tiny --codecs int8 --steps 4000"


def start(tmp_path: Path, *options: str) -> subprocess.Popen:
    return launch([*LONG.split(), "--out", str(tmp_path), *options])


def wait_until(condition, process: subprocess.Popen, timeout: float = 90.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"it did not come to that: {process.communicate()}")
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["making hosts", "measuring"])
def test_signals_leave_a_clean_machine(tmp_path, number, moment):
    process = start(tmp_path, "--delay", "1ms")
    if moment == "making hosts":
        wait_until(lambda: owned_by(process.pid), process)
    else:
        record = tmp_path / "bench.jsonl"
        wait_until(lambda: record.exists() and '"block"' in record.read_text(), process)
    end(process, number)
    assert process.returncode in (130, 143)
    assert not owned_by(process.pid)
    assert not list(Path("/tmp").glob(f"gradq-bench-{process.pid}-*"))


def test_what_a_crash_leaves_the_next_run_removes(tmp_path):
    process = start(tmp_path)
    record = tmp_path / "bench.jsonl"
    wait_until(lambda: record.exists() and '"block"' in record.read_text(), process)
    process.kill()
    process.communicate()
    assert owned_by(process.pid), "nothing could clean up after SIGKILL"
    living = Network(2, Link())
    try:
        assert not owned_by(process.pid)
        assert remove_stale_namespaces() == []
        assert len(owned_by(os.getpid())) == 3, "those of the living stay"
    finally:
        living.close()
    assert not owned_by(os.getpid())
