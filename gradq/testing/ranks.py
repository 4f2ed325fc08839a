"""Real ranks in a test: processes, Gloo over loopback, a bound on time, no orphans."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["RankError", "run_ranks"]


class RankError(AssertionError):
    """A rank failed, or the ranks did not finish in time; holds the traceback of the first that failed."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 300.0,
    group_timeout: float = 120.0,
    expect_exit: tuple[int, ...] = (),
) -> list[Any]:
    """Run function(rank, *args) in world_size processes that share a Gloo process group.

    Args:
        function: a module-level function; it runs with the default process group initialized.
        world_size: number of processes.
        *args: picklable arguments.
        timeout: limit for the whole run, in seconds; then all are killed.
        group_timeout: limit for one operation of the process group, in seconds.
        expect_exit: the ranks that end their process themselves; their result is None.

    Returns:
        What each rank returned (picklable), by rank.

    Raises:
        RankError: a rank raised, died, or the time was up.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["gradq._preload"])
    results: list[Any] = [None] * world_size
    failure = ""
    with tempfile.TemporaryDirectory(prefix="gradq-ranks-") as folder:
        store = Path(folder) / "store"
        pipes: dict[Connection, int] = {}
        processes = []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(sender, function, rank, world_size, str(store), group_timeout, args),
                daemon=True,
            )
            process.start()
            sender.close()
            pipes[receiver] = rank
            processes.append(process)
        deadline = time.monotonic() + timeout
        try:
            while pipes and not failure:
                ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    failure = f"ranks {sorted(pipes.values())} did not finish within {timeout} s"
                for pipe in ready:
                    assert isinstance(pipe, Connection)
                    rank = pipes.pop(pipe)
                    try:
                        ok, value = pickle.loads(pipe.recv_bytes())
                    except EOFError:
                        if rank not in expect_exit:
                            processes[rank].join(5)
                            failure = f"rank {rank} died with exit code {processes[rank].exitcode}"
                        continue
                    if ok:
                        results[rank] = value
                    else:
                        failure = f"rank {rank}:\n{value}"
        finally:
            for process in processes:
                process.join(0.0 if failure else max(0.1, deadline - time.monotonic()))
                if process.is_alive():
                    process.kill()
                    process.join()
    if failure:
        raise RankError(failure)
    return results


def _rank_main(
    sender: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    group_timeout: float,
    args: tuple[Any, ...],
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=group_timeout),
        )
        outcome = (True, function(rank, *args))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        outcome = (False, traceback.format_exc())
    try:
        sender.send_bytes(pickle.dumps(outcome))
    except Exception:
        sender.send_bytes(pickle.dumps((False, f"result cannot be pickled:\n{traceback.format_exc()}")))
    sender.close()
