"""What a Ray actor of the harness is: one rank, its job in a thread, its records fetched by the driver."""

from __future__ import annotations

import os
import queue
import shutil
import socket
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch

import gradq
from gradq.bench.counters import interface_of
from gradq.bench.worker import Job, measure
from gradq.errors import GradqError

__all__ = ["RankActor"]

Record = dict[str, Any]


class RankActor:
    """One rank. Plain Python: the runner makes an actor class of it."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._records: queue.Queue[Record] = queue.Queue()

    def facts(self, address: str) -> Record:
        """Where this actor is.

        Args:
            address: address of its node, "" to ask Ray.
        """
        if not address:
            import ray

            address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        return {
            "rank": self._rank,
            "host": socket.gethostname(),
            "address": address,
            "interface": interface_of(address),
            "pid": os.getpid(),
            "gradq": gradq.__version__,
            "torch": torch.__version__,
            "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        }

    def free_port(self, address: str) -> int:
        """A port for ranks to meet at."""
        with socket.create_server((address, 0)) as server:
            port: int = server.getsockname()[1]
            return port

    def start(self, job: str) -> None:
        """Run a job in a thread."""
        threading.Thread(target=self._run, args=(Job.from_json(job),), daemon=True).start()

    def _run(self, job: Job) -> None:
        try:
            for record in measure(job):
                self._records.put(record)
        except BaseException as error:
            known = isinstance(error, GradqError)
            self._records.put(
                {
                    "record": "error",
                    "known": known,
                    "error": str(error) if known else f"{type(error).__name__}: {error}",
                    "traceback": traceback.format_exc(),
                }
            )

    def fetch(self, wait_s: float) -> list[Record]:
        """New records; waits for the first if there are none."""
        found = []
        try:
            found.append(self._records.get(timeout=wait_s))
            while True:
                found.append(self._records.get_nowait())
        except queue.Empty:
            return found

    def clean(self, folder: str) -> None:
        """Remove this node's checkpoints, whoever else is at it or still ends."""
        for _ in range(50):
            shutil.rmtree(folder, ignore_errors=True)
            if not Path(folder).exists():
                return
            time.sleep(0.1)
