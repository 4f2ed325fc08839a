"""What goes wrong with MPI: wrong launchers, thread levels, ranks that die, hang or raise."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from harness import launch

import gradq
from gradq.backends import mpi

LIBRARIES = [pytest.param("mpich"), pytest.param("openmpi", marks=pytest.mark.slow)]
START = """
import os, signal, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
import gradq
from gradq.backends import mpi
"""


def write(folder: Path, body: str) -> list[str]:
    (folder / "program.py").write_text(START + body)
    return [str(folder / "program.py")]


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_dead_rank_ends_the_job(library: str, tmp_path: Path) -> None:
    """The launcher ends the others at once, though the group's timeout is far away."""
    body = """
mpi.init()
dist.barrier()
if dist.get_rank() == 1:
    print("dying", time.time(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
dist.all_reduce(torch.ones(1000))
print("not reached", flush=True)
"""
    code, output = launch(library, 2, write(tmp_path, body), timeout=100)
    end = time.time()
    assert code != 0
    assert "not reached" not in output
    died = float(output.split("dying ")[1].split()[0])
    assert end - died < 30, output


@pytest.mark.slow
@pytest.mark.parametrize("library", ["mpich", "openmpi"])
def test_a_stalled_rank_is_a_peer_error_within_the_timeout(library: str, tmp_path: Path) -> None:
    body = """
mpi.init(timeout=timedelta(seconds=3))
dist.all_reduce(torch.ones(1))
if dist.get_rank() == 1:
    time.sleep(40)
start = time.monotonic()
try:
    dist.all_reduce(torch.ones(1000))
except gradq.PeerError as error:
    print(f"PeerError after {time.monotonic() - start:.1f} s: {error}", flush=True)
try:
    dist.barrier()
except gradq.PeerError as error:
    print(f"then: {error}", flush=True)
"""
    code, output = launch(library, 2, write(tmp_path, body), timeout=100)
    assert code != 0, "MPI cannot be finalized after this: the job ends with an error"
    assert "PeerError" in output
    assert "allreduce" in output
    assert "is not done after 3." in output
    assert "then: barrier: the process group has failed before" in output
    assert "ending the MPI job" in output


@pytest.mark.slow
@pytest.mark.parametrize("library", ["mpich", "openmpi"])
def test_gradq_names_the_peer_that_stalls(library: str, tmp_path: Path) -> None:
    body = """
from torch import nn
from torch.nn.parallel import DistributedDataParallel
mpi.init(timeout=timedelta(seconds=4))
model = DistributedDataParallel(nn.Linear(64, 64))
handle = gradq.compress(model, "int4")
for step in range(3):
    if step == 2 and dist.get_rank() == 1:
        time.sleep(40)
    try:
        model(torch.randn(2, 64)).sum().backward()
    except RuntimeError as error:
        print(f"training: {error}", flush=True)
        print(f"failure: {handle.failure}", flush=True)
        raise
"""
    code, output = launch(library, 2, write(tmp_path, body), timeout=100)
    assert code != 0
    assert "failure: rank 0: receiving from rank 1 failed in step 2" in output
    assert "rank 0 ends the MPI job" in output


@pytest.mark.slow
@pytest.mark.parametrize("library", ["mpich", "openmpi"])
def test_an_uncaught_exception_ends_the_job(library: str, tmp_path: Path) -> None:
    body = """
mpi.init()
if dist.get_rank() == 1:
    raise ValueError("the data is gone")
dist.all_reduce(torch.ones(1000))
"""
    start = time.monotonic()
    code, output = launch(library, 2, write(tmp_path, body), timeout=100)
    assert code != 0
    assert "ValueError: the data is gone" in output
    assert "rank 1 ends the MPI job" in output
    assert time.monotonic() - start < 90


@pytest.mark.slow
@pytest.mark.parametrize("library", ["mpich", "openmpi"])
def test_too_little_thread_support_is_named(library: str, tmp_path: Path) -> None:
    code, output = launch(
        library, 2, write(tmp_path, "mpi.init()"), env={"MPI4PY_RC_THREAD_LEVEL": "serialized"}
    )
    assert code != 0
    assert "ConfigError: MPI runs with thread level 'serialized'" in output
    assert "MPI4PY_RC_THREAD_LEVEL" in output


@pytest.mark.slow
def test_the_launcher_of_another_mpi_is_named(tmp_path: Path) -> None:
    """The other way round MPICH itself ends the process: "Fatal error in internal_Init_thread"."""
    body = """
try:
    mpi.init()
except gradq.ConfigError as error:
    print(error)
    sys.exit(3)
"""
    code, output = launch("mpich", 2, write(tmp_path, body), using="openmpi")
    assert code != 0
    assert "mpiexec started 2 ranks, but each is alone" in output
    assert "MPI4PY_LIBMPI" in output


@pytest.mark.slow
def test_one_process_without_a_launcher(tmp_path: Path) -> None:
    import os
    import subprocess

    body = """
mpi.init()
x = torch.ones(3)
dist.all_reduce(x)
assert x.tolist() == [1, 1, 1] and dist.get_world_size() == 1
try:
    mpi.init()
except gradq.ConfigError as error:
    print(error)
dist.destroy_process_group()
"""
    done = subprocess.run(
        [sys.executable, *write(tmp_path, body)], capture_output=True, text=True, timeout=100, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert "already initialized" in done.stdout


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    import os
    import subprocess

    done = subprocess.run(
        [sys.executable, *write(tmp_path, "mpi.init()")],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"MPI4PY_LIBMPI": "/nowhere/libmpi.so"},
    )
    assert done.returncode != 0
    assert "ConfigError: mpi4py finds no MPI library" in done.stderr
    assert "MPI4PY_LIBMPI" in done.stderr


def test_a_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(gradq.ConfigError, match=r"pip install 'gradq\[mpi\]'"):
        mpi.init()


def test_the_address_that_other_nodes_are_told(monkeypatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert mpi._own_address() == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope0")
    with pytest.raises(gradq.ConfigError, match="GLOO_SOCKET_IFNAME=nope0"):
        mpi._own_address()
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(mpi.socket, "gethostbyname", lambda host: "10.1.2.3")
    assert mpi._own_address() == "10.1.2.3"
    monkeypatch.setattr(mpi.socket, "gethostbyname", lambda host: "127.0.1.1")  # Debian's /etc/hosts
    with pytest.raises(gradq.ConfigError, match="MASTER_ADDR"):
        mpi._own_address()
