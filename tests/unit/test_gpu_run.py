"""The prepared GPU run without a GPU: its trace reader, its record, and a dry run of all parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_run
from gpu_parts.setting import RECORD, Setting, read_record
from gpu_parts.trace import read_trace, waits_inside


def event(category, name, ts, dur=1, tid=7, **arguments):
    where = {"ts": ts, "dur": dur, "pid": 1, "tid": tid}
    return {"ph": "X", "cat": category, "name": name, "args": arguments} | where


def test_the_trace_reader_counts_waits_inside_our_ranges_only(tmp_path):
    events = [
        event("user_annotation", "gradq.hook", 100, 50),
        event("user_annotation", "gradq.hook", 200, 50),
        event("gpu_user_annotation", "gradq.hook", 101, 90, tid=0),  # the GPU's side of the range
        event("cuda_runtime", "cudaLaunchKernel", 110),
        event("cuda_runtime", "cudaStreamSynchronize", 120),
        event("cuda_runtime", "cudaStreamSynchronize", 160),  # between the ranges
        event("cuda_runtime", "cudaDeviceSynchronize", 125, tid=8),  # another thread
        event("cuda_runtime", "cudaMemcpyAsync", 210, correlation=31),
        event("cuda_runtime", "cudaMemcpyAsync", 215, correlation=32),
        event("cuda_driver", "cuLaunchKernel", 220),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 400, tid=0, correlation=31),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 402, tid=0, correlation=32),
        {"ph": "i", "cat": "cuda_runtime", "name": "cudaDeviceSynchronize", "ts": 130, "pid": 1, "tid": 7},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    found = waits_inside(read_trace(path), "gradq.hook")
    assert found.ranges == 2
    assert found.calls == 5
    assert found.waits == {"cudaStreamSynchronize": 1, "copy to the host": 1}
    assert waits_inside(events, "another").ranges == 0


def test_a_real_trace_has_our_range(tmp_path):
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(activities=activities) as profiler,
        torch.profiler.record_function("gradq.hook"),
    ):
        torch.ones(3).sum()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    found = waits_inside(read_trace(tmp_path / "trace.json"), "gradq.hook")
    assert (found.ranges, found.calls, found.waits) == (1, 0, {})


def arguments(folder, monkeypatch, *more):
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--out", str(folder), "--dry-run", *more])
    return gpu_run.parse_arguments()


def test_a_run_takes_up_what_is_missing_and_goes_on_after_a_failure(tmp_path, monkeypatch):
    started = []

    def in_process(part, arguments, limit):
        started.append(part.name)
        Setting(part.name, tmp_path, 0.0, True).add(result=len(started))
        return (
            ("failed", "ValueError: no luck") if part.name == "averages" and len(started) < 9 else ("ok", "")
        )

    monkeypatch.setattr(gpu_run, "in_process", in_process)
    monkeypatch.setattr(gpu_run, "START_S", 0)
    only = ("--only", "kernels,averages,waits")
    rows = gpu_run.run(arguments(tmp_path, monkeypatch, *only))
    assert started == ["kernels", "averages", "waits"]
    assert [row["status"] for row in rows if "status" in row] == ["ok", "failed", "ok"]
    assert "| averages | failed |" in (tmp_path / "summary.md").read_text()

    with (tmp_path / RECORD).open("a") as file:
        file.write('{"part": "int-mm", "sta')  # the run was cut off while it wrote
    assert len(read_record(tmp_path)) == len(rows)
    started[:] = [""] * 9
    gpu_run.run(arguments(tmp_path, monkeypatch))
    others = [p.name for p in gpu_run.PARTS if p.name not in ("kernels", "averages", "waits")]
    assert started[9:] == [*others, "averages"], "what has failed comes after what was not reached"
    summary = (tmp_path / "summary.md").read_text()
    assert "| averages | ok |" in summary
    assert "result 2\n" not in summary, "a failed attempt's results stand beside those of the next"


def test_no_time_left_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "in_process", None)
    assert gpu_run.run(arguments(tmp_path, monkeypatch, "--minutes", "0.1")) == []
    assert "| kernels | not reached |" in (tmp_path / "summary.md").read_text()


def test_a_part_that_hangs_is_ended_with_its_children_and_recorded(tmp_path, monkeypatch):
    script = tmp_path / "part.py"
    script.write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('child', child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(gpu_run, "__file__", str(script))
    status, error = gpu_run.in_process(gpu_run.PARTS[0], arguments(tmp_path, monkeypatch), 3.0)
    assert status == "timeout"
    stat = Path(f"/proc/{int(error.split()[1])}/stat")
    deadline = time.monotonic() + 10  # a killed process may still be listed for a moment
    while stat.exists() and ") Z " not in stat.read_text():
        assert time.monotonic() < deadline, "the child of the ended part is still running"
        time.sleep(0.05)


def test_an_unknown_part_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        arguments(tmp_path, monkeypatch, "--only", "kernels,sppeds")
    assert "sppeds: no such part; choose from kernels" in capsys.readouterr().err.replace(
        "kernels,sppeds", "sppeds"
    )


@pytest.mark.slow
@pytest.mark.timeout(3660)
def test_the_dry_run_walks_all_parts(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("GRADQ_KERNELS", "TRITON_INTERPRET")}
    command = [sys.executable, gpu_run.__file__, "--dry-run", "--minutes", "60"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], env=environment, capture_output=True, text=True, timeout=3650
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = read_record(tmp_path)
    for part in gpu_run.PARTS:
        own = [row for row in rows if row["part"] == part.name]
        assert own[-1]["status"] == "ok"
        assert len(own) > 1, f"{part.name} has no results"
    assert all(row["differ"] == 0 for row in rows if "differ" in row)
