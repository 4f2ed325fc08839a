"""Threads, sockets and memory go with `close()`, with the handle or with the model, whatever is first."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import textwrap
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradq
from gradq.testing import run_ranks

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")


def held(at_most=(0, 0)):
    """Threads and open files of this process; a thread that has ended may still stand there for a moment."""
    for _ in range(100):
        found = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
        if found[0] <= at_most[0] and found[1] <= at_most[1]:
            break
        time.sleep(0.02 if any(at_most) else 0.0)
    return found


def still_there(references):
    """What is not gone; a thread that ends with it may hold it for a moment."""
    for _ in range(100):
        gc.collect()
        if all(reference() is None for reference in references):
            break
        time.sleep(0.02)
    return [reference() for reference in references if reference() is not None]


def step(module):
    for _ in range(2):
        module.zero_grad()
        module(torch.randn(4, 64)).square().mean().backward()


def plain():
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


def one_model(how, group):
    """Train a model and leave it, in one of several ways; what must be gone afterwards, and what is kept."""
    if how == "fsdp":
        module = fully_shard(plain())
        handle = gradq.compress(module, "int4", feedback=True)
    elif how == "local":
        module = plain()
        handle = gradq.LocalSGD(module, torch.optim.SGD(module.parameters(), 0.1), "int4", every=1)
    else:
        module = DistributedDataParallel(plain(), process_group=group)
        handle = gradq.compress(module, "int4")
    step(module)
    if how == "local":
        handle.inner_optimizer.step()
    if how == "close":
        handle.close()
        handle.close()
    if how == "with":
        with handle:
            step(module)
        step(module)  # as a plain all-reduce
    if how in ("close", "with"):
        return [], (module, handle)
    if how == "keep the handle":
        return [weakref.ref(module)], handle
    return [weakref.ref(module), weakref.ref(handle.sync)], None


def leave(rank, how):
    group = dist.new_group([0, 1]) if how == "subgroup" else None
    if how == "subgroup" and rank == 2:
        dist.barrier()
        return [held()] * 2, []
    one_model(how, group)  # what torch itself keeps for the first one
    gc.collect()
    counts, alive = [held()], []
    for _ in range(3):
        gone, kept = one_model(how, group)
        alive += still_there(gone)
        counts.append(held(counts[0]))
        del kept
    gc.collect()
    if how == "subgroup":
        dist.barrier()
    return counts, [repr(thing) for thing in alive]


@pytest.mark.parametrize(
    ("how", "ranks"),
    [
        ("drop", 2),
        ("keep the handle", 2),
        ("close", 2),
        ("with", 2),
        ("subgroup", 3),
        ("fsdp", 2),
        ("local", 2),
    ],
)
def test_nothing_stays(how, ranks):
    for counts, alive in run_ranks(leave, ranks, how, timeout=240):
        assert not alive
        assert max(threads for threads, _ in counts) <= counts[0][0], counts
        assert max(files for _, files in counts) <= counts[0][1], counts


SCRIPT = """
import os, sys, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import gradq

dist.init_process_group("gloo")
model = DistributedDataParallel(nn.Linear(64, 64))
handle = gradq.compress(model, "int4")
model(torch.randn(4, 64)).sum().backward()
{end}
"""
ENDS = {
    "without a word": "",
    "with the group gone": "dist.destroy_process_group()\nhandle.close()\nhandle.close()",
    "by an exit": "sys.exit(0)",
    "handle in a cycle": "handle.me = handle\ndel model, handle",
    "after a fork": textwrap.dedent(
        """
        pid = os.fork()
        if pid == 0:
            del model, handle
            import gc
            gc.collect()
            os._exit(0)  # as multiprocessing does; plain DDP aborts at sys.exit
        assert os.waitpid(pid, 0)[1] == 0
        model(torch.randn(4, 64)).sum().backward()
        """
    ),
}


SLOW = ("by an exit", "handle in a cycle", "with the group gone")  # each starts two interpreters


@pytest.mark.parametrize(
    "end", [pytest.param(end, marks=pytest.mark.slow) if end in SLOW else end for end in ENDS]
)
def test_the_end_of_a_process_is_quiet(tmp_path, end):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(end=ENDS[end]))
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "WORLD_SIZE": "2",
        "PYTHONWARNINGS": "ignore",
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environment["MASTER_PORT"] = str(probe.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, script],
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank, process in enumerate(processes):
            out, err = process.communicate(timeout=240)
            noise = [line for line in err.splitlines() if "TCPStore" not in line and "[W" not in line]
            assert (process.returncode, out, noise) == (0, "", []), f"rank {rank}: {err}"
    finally:
        for process in processes:
            process.kill()


RANKS = """
from gradq.testing import run_ranks

def rank_of(rank):
    return rank

if __name__ == "__main__":
    print(run_ranks(rank_of, 2))
"""


@pytest.mark.slow
def test_a_script_that_runs_ranks_prints_its_own_words_only(tmp_path):
    """The fork server, which ends with the script, loads much: none of it may complain at its end."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 1]\n", "")
