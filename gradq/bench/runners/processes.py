"""Ranks as processes of this machine: what the local and the namespaces runner have in common."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradq.bench.runners.base import RankLostError, Runner
from gradq.bench.worker import Job
from gradq.errors import ConfigError

__all__ = ["ProcessRunner", "end_processes", "remove_stale_folders"]

Record = dict[str, Any]
_PREFIX = "gradq-bench-"


def remove_stale_folders() -> None:
    """Remove temporary folders whose owners are gone without having cleaned up."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def end_processes(processes: list[subprocess.Popen[Any]], grace_s: float = 5.0) -> None:
    """Ask processes to end, and end those that do not."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + grace_s
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class ProcessRunner(Runner):
    """Starts `python -m gradq.bench.worker` for each rank and merges what they say.

    `phases` and `collective_bytes` go into every `Job`.
    """

    phases: tuple[tuple[int, float | None], ...] = ()
    collective_bytes: tuple[int, ...] = ()

    @abstractmethod
    def place(self, rank: int) -> tuple[list[str], str]:
        """The command's prefix that puts a rank on its host, and the interface of its gradients."""

    @property
    def interface_ranks(self) -> int:
        """Ranks that share an interface."""
        return self.scenario.ranks_per_node

    def before_warm_up(self) -> None:
        """Called before the ranks of a seed start."""

    def before_phase(self, phase: int) -> None:
        """Called when all ranks wait for a phase to begin; the first comes after the warm-up."""

    def open(self) -> dict[str, Any]:
        """See `Runner.open`."""
        remove_stale_folders()
        return {}

    def close(self) -> None:
        """See `Runner.close`."""

    def run(self, seed: int) -> Iterator[tuple[int, Record]]:
        """See `Runner.run`."""
        world_size = self.scenario.world_size
        messages: queue.Queue[tuple[int, str | None]] = queue.Queue()
        processes: list[subprocess.Popen[str]] = []
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        try:
            self.before_warm_up()
            for rank in range(world_size):
                processes.append(self._start(rank, seed, folder))
                threading.Thread(target=_read, args=(rank, processes[rank], messages), daemon=True).start()
            yield from self._merge(processes, messages, folder)
        finally:
            end_processes(processes)
            for process in processes:
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        _close(pipe)
            shutil.rmtree(folder, ignore_errors=True)

    def _start(self, rank: int, seed: int, folder: Path) -> subprocess.Popen[str]:
        prefix, interface = self.place(rank)
        job = Job(
            scenario=self.scenario,
            seed=seed,
            rank=rank,
            init_method=f"file://{folder}/store",
            interface=interface,
            interface_ranks=self.interface_ranks,
            threads=max(1, (os.cpu_count() or 1) // self.scenario.world_size),
            phases=self.phases,
            collective_bytes=self.collective_bytes,
        )
        (folder / f"job{rank}.json").write_text(job.to_json())
        environment = os.environ | {"OMP_NUM_THREADS": str(job.threads), "GLOO_SOCKET_IFNAME": interface}
        with (folder / f"stderr{rank}").open("w") as stderr:
            try:
                return subprocess.Popen(
                    [*prefix, sys.executable, "-m", "gradq.bench.worker", str(folder / f"job{rank}.json")],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                    env=environment,
                    start_new_session=True,  # Ctrl-C reaches this process only, which ends them in order
                )
            except FileNotFoundError as error:
                raise ConfigError(f"cannot start rank {rank}: {error}") from error

    def _merge(
        self,
        processes: list[subprocess.Popen[str]],
        messages: queue.Queue[tuple[int, str | None]],
        folder: Path,
    ) -> Iterator[tuple[int, Record]]:
        warm, done = set[int](), set[int]()
        errors: dict[int, Record] = {}
        deadline = None
        while len(done) < len(processes):
            try:
                rank, line = messages.get(timeout=0.2)
            except queue.Empty:
                if deadline is not None and time.monotonic() > deadline:
                    break
                continue
            if line is None:
                done.add(rank)
                if processes[rank].wait() != 0:
                    errors.setdefault(rank, {"error": f"died ({_ending(processes[rank].returncode)})"})
                    deadline = deadline or time.monotonic() + 3.0  # its peers say why, if they can
                continue
            record = json.loads(line)
            if record["record"] == "error":
                errors[rank] = record
                deadline = deadline or time.monotonic() + 3.0
            elif record["record"] == "warm":
                warm.add(rank)
                if len(warm) == len(processes):
                    warm.clear()
                    self.before_phase(record["phase"])
                    yield 0, record
                    for process in processes:
                        _say_go(process)
            else:
                yield rank, record
        if errors:
            raise _failure(errors, folder)


def _read(rank: int, process: subprocess.Popen[str], messages: queue.Queue[tuple[int, str | None]]) -> None:
    assert process.stdout is not None
    try:
        for line in process.stdout:
            messages.put((rank, line))
    except ValueError:  # closed: the run is over
        pass
    messages.put((rank, None))


def _say_go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died; its end of stdout says so
        process.stdin.write("go\n")
        process.stdin.flush()


def _close(pipe: Any) -> None:
    with contextlib.suppress(OSError):
        pipe.close()


def _ending(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit status {code}"


def _failure(errors: dict[int, Record], folder: Path) -> Exception:
    """The error of the rank that failed first in causality: a death, a known error, else the first."""
    died = [rank for rank, error in errors.items() if error["error"].startswith("died")]
    known = [rank for rank, error in errors.items() if error.get("known")]
    if known and not died:
        return ConfigError(errors[known[0]]["error"])
    rank = (died or sorted(errors))[0]
    tail = (folder / f"stderr{rank}").read_text()[-1500:].strip()
    details = errors[rank].get("traceback") or tail
    others = "".join(
        f"\nrank {other}: {error['error'][:300]}" for other, error in errors.items() if other != rank
    )
    return RankLostError(f"rank {rank}: {errors[rank]['error']}\n{details}{others}".strip())
