"""Ranks that join and leave a DiLoCo run, through torchrun's elastic restart: real agents and rendezvous."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import kill

PROGRAM = """
import sys, time
from pathlib import Path
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
import gradq

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = torch.nn.Linear(64, 64)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
diloco = gradq.DiLoCo(model, optimizer, "int4", every=6, fragments=2, delay=1)
if saved := sorted(done.parent for done in folder.glob("step-*/.metadata")):
    gradq.load_checkpoint(diloco, saved[-1])
print(f"rank {rank} of {world_size} starts at {diloco.inner_step}", flush=True)
target = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
for step in range(diloco.inner_step, steps):
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1000 * step + rank))
    loss = (model(x) - x @ target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    time.sleep(0.05)
    if (step + 1) % 10 == 0:
        dcp.save({"gradq": diloco.state_dict()}, checkpoint_id=folder / f"step-{step + 1:08d}")
diloco.synchronize()
print(f"rank {rank} of {world_size} ends with {loss.item():.4f}", flush=True)
dist.destroy_process_group()
"""


def agent(folder: Path, name: str, port: int, steps: int) -> subprocess.Popen:
    """One torchrun of one rank; it prints into <name>.log."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=elastic"]
    command += [
        "--rdzv-conf=last_call_timeout=2,join_timeout=200,read_timeout=200",
        "--max-restarts=5",
        "--monitor-interval=0.5",
    ]
    command += ["--local-addr=127.0.0.1", str(folder / "program.py"), str(folder / "checkpoints"), str(steps)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    env |= {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"
    }  # with torch 2.13 nobody can join a running job otherwise
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log)


def wait_for(pattern: str, log: Path, what: Callable[[], None], timeout: float = 150) -> None:
    deadline = time.monotonic() + timeout
    while not re.search(pattern, log.read_text()):
        what()
        if time.monotonic() > deadline:
            pytest.fail(f"no {pattern!r} in {log.name}:\n{log.read_text()}")
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rank_joins_and_leaves_a_running_job(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    stays, steps = tmp_path / "stays.log", 300
    first = agent(tmp_path, "stays", port, steps)
    second = None

    def alive() -> None:
        if first.poll() is not None:
            pytest.fail("\n".join(log.read_text() for log in tmp_path.glob("*.log")))

    try:
        wait_for(r"rank 0 of 1 starts at 0\n", stays, alive)
        while not list(tmp_path.glob("checkpoints/step-*/.metadata")):
            alive()
            time.sleep(0.1)
        second = agent(tmp_path, "joins", port, steps)
        wait_for(r"rank \d of 2 starts at [1-9]\d*\n", stays, alive)  # both were restarted
        time.sleep(3)
        kill(second.pid)
        second.wait()
        wait_for(r"of 2 starts(.*\n)*.*rank 0 of 1 starts at [1-9]\d*\n", stays, alive)
        assert first.wait(timeout=150) == 0, stays.read_text()
    finally:
        for process in (first, second):
            if process is not None and process.poll() is None:
                kill(process.pid)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
    text = stays.read_text()
    assert "resumed on 2 ranks from 1" in text
    assert "resumed on 1 ranks from 2" in text
    starts = [int(at) for at in re.findall(r"starts at (\d+)\n", text)]
    assert starts == sorted(starts), "progress was lost"
    assert float(re.findall(r"rank 0 of 1 ends with ([\d.]+)", text)[0]) < 30  # 64 at the start
