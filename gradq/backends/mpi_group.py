"""The process group: torch's collectives as nonblocking MPI operations.

The operations have the names and arguments of `torch.distributed.ProcessGroup`, which torch's Python calls by
name and its C++ (DDP, functional collectives) through virtual functions.
"""

# torch declares most operations as several overloads; we have the one that torch itself calls.
# mypy: disable-error-code="override, assignment, no-untyped-call, call-arg, attr-defined"

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from gradq.backends.mpi_tensors import array, bits, copy_back, counts, flatten, rows, to_reduce, together
from gradq.backends.progress import Operation, Progress
from gradq.errors import ConfigError, PeerError, UnsupportedError

__all__ = ["BACKEND", "MPIProcessGroup"]

BACKEND = "mpi4py"


class MPIProcessGroup(dist.ProcessGroup):
    """A process group over two MPI communicators: one for collectives, one for messages between two ranks.

    Made by torch: see `mpi.init` and `torch.distributed.new_group`. Every operation is posted by the calling
    thread and completed by `Progress`; the order of collectives on one group must be the same on all
    ranks, as for every backend.

    After a failure all later operations of the group fail with the same cause.

    Args:
        MPI: the module mpi4py.MPI.
        comm: a communicator of this group's own; freed with it.
        progress: the thread that watches the operations.
        timeout: the limit for every operation.
    """

    def __init__(self, MPI: Any, comm: Any, progress: Progress, timeout: timedelta) -> None:
        super().__init__(comm.rank, comm.size)
        self._MPI = MPI
        self._collectives, self._messages = comm, comm.Dup()
        self._highest_tag = comm.Get_attr(MPI.TAG_UB)
        self._timeout_s = timeout.total_seconds()
        self._progress = progress
        self._posting = threading.Lock()
        self._failure: PeerError | None = None
        self._coalesced: list[Future[Any]] | None = None
        self._closed = False
        self._name = self._description = ""
        self.options = SimpleNamespace(_timeout=timeout)
        op = dist.ReduceOp
        self._ops = {
            op.SUM: MPI.SUM,
            op.AVG: MPI.SUM,
            op.PRODUCT: MPI.PROD,
            op.MIN: MPI.MIN,
            op.MAX: MPI.MAX,
            op.BAND: MPI.BAND,
            op.BOR: MPI.BOR,
            op.BXOR: MPI.BXOR,
        }

    # --- what torch asks a group about itself --------------------------------------------------------------

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        """The name it is registered under."""
        return BACKEND

    def name(self) -> str:
        """The same."""
        return BACKEND

    def setGroupName(self, name: str) -> None:  # noqa: N802
        """Torch names a group after it has made it."""
        self._name = name

    def getGroupName(self) -> str:  # noqa: N802
        """The name torch gave it."""
        return self._name

    def setGroupDesc(self, description: str) -> None:  # noqa: N802
        """What torch says the group is for."""
        self._description = description

    def getGroupDesc(self) -> str:  # noqa: N802
        """The same."""
        return self._description

    def _get_backend_name(self) -> str:
        return BACKEND

    def _get_backend(self, device: torch.device) -> MPIProcessGroup:
        if device.type != "cpu":
            raise UnsupportedError(f"the backend mpi4py moves CPU tensors, not {device.type}")
        return self

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    @property
    def supports_coalescing(self) -> bool:
        """Not needed: every operation is nonblocking."""
        return False

    @property
    def supports_splitting(self) -> bool:
        """`new_group` makes groups."""
        return False

    def set_timeout(self, timeout: timedelta) -> None:
        """Of operations posted from now on."""
        self._timeout_s = timeout.total_seconds()
        self.options._timeout = timeout

    def shutdown(self) -> None:
        """Give the communicators back. Idempotent."""
        with self._posting:
            if self._closed:
                return
            self._closed = True
            if self._failure is None and not self._MPI.Is_finalized():
                self._messages.Free()
                self._collectives.Free()

    def abort(self) -> None:
        """Refuse all later operations; those under way end when they are done or their time is up."""
        self._fail(PeerError("the process group was aborted"))

    # --- collectives ---------------------------------------------------------------------------------------

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> _Work:
        """Reduce every tensor over the ranks, in place."""
        return self._reduce_all("allreduce", tensors, opts or dist.AllreduceOptions())

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any) -> _Work:
        """The same, for several."""
        return self._reduce_all("allreduce_coalesced", tensors, opts)

    def _reduce_all(self, name: str, tensors: list[Tensor], opts: Any) -> _Work:
        staged = [to_reduce(tensor) for tensor in tensors]

        def post() -> list[Any]:
            mpi_op = self._op(opts.reduceOp, tensors)
            return [self._collectives.Iallreduce(self._MPI.IN_PLACE, array(s), mpi_op) for s in staged]

        def finish() -> list[Tensor]:
            for tensor, reduced in zip(tensors, staged, strict=True):
                self._unstage(tensor, reduced, opts.reduceOp)
            return tensors

        return self._launch(name, post, finish, [staged])

    def reduce(self, tensors: list[Tensor], opts: Any) -> _Work:
        """Reduce a tensor over the ranks, in place on the root."""
        (tensor,) = tensors
        staged = to_reduce(tensor)
        is_root = self.rank() == opts.rootRank
        received = torch.empty_like(staged)

        def post() -> list[Any]:
            mpi_op = self._op(opts.reduceOp, tensors)
            target = array(received) if is_root else None
            return [self._collectives.Ireduce(array(staged), target, mpi_op, opts.rootRank)]

        def finish() -> list[Tensor]:
            if is_root:
                self._unstage(tensor, received, opts.reduceOp)
            return tensors

        return self._launch("reduce", post, finish, [staged, received])

    def broadcast(self, tensors: list[Tensor], opts: Any) -> _Work:
        """Copy the root's tensor to all."""
        (tensor,) = tensors
        staged = flatten(tensor)

        def finish() -> list[Tensor]:
            copy_back(tensor, staged)
            return tensors

        post = lambda: [self._collectives.Ibcast(array(bits(staged)), opts.rootRank)]  # noqa: E731
        return self._launch("broadcast", post, finish, [staged])

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> _Work:
        """Give every rank all ranks' tensors; they may differ in size."""
        return self._gather_all("allgather", outputs[0], inputs[0])

    def allgather_coalesced(
        self, output_lists: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> _Work:
        """The same, for several; output_lists[k] are all ranks' inputs[k]."""
        works = [
            self._gather_all("allgather_coalesced", list(outputs), tensor)
            for outputs, tensor in zip(output_lists, inputs, strict=True)
        ]
        return self._join(works)

    def _gather_all(self, name: str, outputs: Sequence[Tensor], tensor: Tensor) -> _Work:
        staged = flatten(tensor)
        flat, views = together(outputs, tensor)

        def post() -> list[Any]:
            receive = (array(bits(flat)), counts([view.numel() for view in views], flat))
            in_place = staged.data_ptr() == views[self.rank()].data_ptr()  # FSDP gathers so
            send = self._MPI.IN_PLACE if in_place else array(bits(staged))
            return [self._collectives.Iallgatherv(send, receive)]

        def finish() -> list[Tensor]:
            for output, view in zip(outputs, views, strict=True):
                copy_back(output, view)
            return list(outputs)

        return self._launch(name, post, finish, [staged, flat])

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> _Work:
        """Give every rank all ranks' tensors in one, one after another."""
        return self._gather_all("all_gather_single", rows(output, self.size()), tensor)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> _Work:
        """The same, for several."""
        return self._join(
            [self.all_gather_single(output, tensor) for output, tensor in zip(outputs, inputs, strict=True)]
        )

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> _Work:
        """Give the root all ranks' tensors."""
        (tensor,) = inputs
        staged, root = flatten(tensor), opts.rootRank
        targets = outputs[0] if self.rank() == root else []
        flat, views = together(targets, tensor)

        def post() -> list[Any]:
            receive = (array(bits(flat)), counts([v.numel() for v in views], flat)) if targets else None
            return [self._collectives.Igatherv(array(bits(staged)), receive, root)]

        def finish() -> list[Tensor]:
            for output, view in zip(targets, views, strict=True):
                copy_back(output, view)
            return list(targets)

        return self._launch("gather", post, finish, [staged, flat])

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> _Work:
        """Give every rank its tensor of the root's list."""
        (output,) = outputs
        root = opts.rootRank
        sources = inputs[0] if self.rank() == root else []
        staged = flatten(output)
        flat, views = together(sources, output)
        for source, view in zip(sources, views, strict=True):
            view.copy_(source.detach().reshape(-1))

        def post() -> list[Any]:
            send = (array(bits(flat)), counts([v.numel() for v in views], flat)) if sources else None
            return [self._collectives.Iscatterv(send, array(bits(staged)), root)]

        def finish() -> list[Tensor]:
            copy_back(output, staged)
            return outputs

        return self._launch("scatter", post, finish, [staged, flat])

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> _Work:
        """Reduce a list of tensors over the ranks; each rank gets its own. They may differ in size."""
        return self._reduce_scatter("reduce_scatter", outputs[0], inputs[0], opts.reduceOp)

    def _reduce_scatter(self, name: str, output: Tensor, parts: Sequence[Tensor], op: Any) -> _Work:
        flat = torch.cat([part.detach().reshape(-1) for part in parts])
        staged = to_reduce(flat)
        numels = [part.numel() * staged.numel() // max(flat.numel(), 1) for part in parts]
        received = torch.empty(numels[self.rank()], dtype=staged.dtype)

        def post() -> list[Any]:
            mpi_op = self._op(op, parts)
            return [self._collectives.Ireduce_scatter(array(staged), array(received), numels, mpi_op)]

        def finish() -> list[Tensor]:
            self._unstage(output, received, op)
            return [output]

        return self._launch(name, post, finish, [staged, received])

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any) -> _Work:
        """Reduce a tensor of W equal parts over the ranks; each rank gets its own part."""
        parts = rows(tensor, self.size())
        return self._reduce_scatter("reduce_scatter_single", output, parts, opts.reduceOp)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any
    ) -> _Work:
        """The same, for several."""
        return self._join(
            [self.reduce_scatter_single(output, t, opts) for output, t in zip(outputs, inputs, strict=True)]
        )

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> _Work:
        """Send inputs[r] to every rank r, and receive outputs[r] from it."""
        return self._exchange("alltoall", outputs, inputs)

    def all_to_all_single(
        self,
        output: Tensor,
        tensor: Tensor,
        output_sizes: list[int],
        input_sizes: list[int],
        opts: Any = None,
    ) -> _Work:
        """The same with one tensor each, cut along its first dimension."""
        outputs = output.split(list(output_sizes)) if output_sizes else rows(output, self.size())
        inputs = tensor.split(list(input_sizes)) if input_sizes else rows(tensor, self.size())
        return self._exchange("all_to_all_single", outputs, inputs)

    def _exchange(self, name: str, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> _Work:
        sent, pieces = together(inputs, inputs[0])
        for piece, tensor in zip(pieces, inputs, strict=True):
            piece.copy_(tensor.detach().reshape(-1))
        received, views = together(outputs, inputs[0])

        def post() -> list[Any]:
            send = (array(bits(sent)), counts([piece.numel() for piece in pieces], sent))
            receive = (array(bits(received)), counts([view.numel() for view in views], received))
            return [self._collectives.Ialltoallv(send, receive)]

        def finish() -> list[Tensor]:
            for output, view in zip(outputs, views, strict=True):
                copy_back(output, view)
            return list(outputs)

        return self._launch(name, post, finish, [sent, received])

    def barrier(self, opts: Any = None) -> _Work:
        """Done when all ranks have come."""
        return self._launch("barrier", lambda: [self._collectives.Ibarrier()], list, [])

    # --- messages between two ranks ------------------------------------------------------------------------

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> _Work:
        """Send a tensor to a rank of the group."""
        staged = flatten(tensors[0])
        self._check_tag(tag)
        post = lambda: [self._messages.Isend(array(bits(staged)), peer, tag)]  # noqa: E731
        return self._launch(f"send to rank {peer}", post, lambda: tensors, [staged])

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> _Work:
        """Receive a tensor from a rank of the group."""
        return self._receive(tensors, peer, tag, f"receive from rank {peer}")

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> _Work:
        """Receive a tensor from any rank; the work says from which."""
        statuses = [self._MPI.Status()]
        return self._receive(tensors, self._MPI.ANY_SOURCE, tag, "receive from any rank", statuses)

    def _receive(
        self, tensors: list[Tensor], peer: int, tag: int, name: str, statuses: list[Any] | None = None
    ) -> _Work:
        (tensor,) = tensors
        staged = flatten(tensor)
        self._check_tag(tag)

        def finish() -> list[Tensor]:
            copy_back(tensor, staged)
            return tensors

        post = lambda: [self._messages.Irecv(array(bits(staged)), peer, tag)]  # noqa: E731
        return self._launch(name, post, finish, [staged], statuses)

    def _check_tag(self, tag: int) -> None:
        if not 0 <= tag <= self._highest_tag:
            raise ConfigError(f"tag {tag}: this MPI allows 0 to {self._highest_tag}")

    # --- the one way into MPI ------------------------------------------------------------------------------

    def _launch(
        self,
        name: str,
        post: Callable[[], list[Any]],
        finish: Callable[[], list[Tensor]],
        keep: list[Any],
        statuses: list[Any] | None = None,
    ) -> _Work:
        """Post an operation and have it watched.

        Raises:
            PeerError: the group has failed before.
        """
        with self._posting:
            if self._failure is not None:
                raise PeerError(f"{name}: the process group has failed before: {self._failure}")
            if self._closed:
                raise ConfigError(f"{name}: the process group was destroyed")
            where = f"MPI {name} in group {self._name!r} on rank {self.rank()}"
            requests = post()
        operation = Operation(requests, finish, where, self._timeout_s, self._fail, keep, statuses)
        self._progress.watch(operation)
        return self._work(operation.done, statuses[0] if statuses else None)

    def _work(self, done: Future[Any], status: Any = None) -> _Work:
        if self._coalesced is not None:
            self._coalesced.append(done)
        return _Work(done, status)

    def _join(self, works: list[_Work]) -> _Work:
        """One work for several."""
        return self._work(torch.futures.collect_all([work._done for work in works]).then(_values))

    def _start_coalescing(self, device: torch.device) -> None:
        self._coalesced = []

    def _end_coalescing(self, device: torch.device) -> _Work:
        done, self._coalesced = self._coalesced or [], None
        return self._work(torch.futures.collect_all(done).then(_values))

    def _fail(self, error: PeerError) -> None:
        self._failure = self._failure or error

    # --- reductions ----------------------------------------------------------------------------------------

    def _op(self, op: Any, tensors: Sequence[Tensor]) -> Any:
        """MPI's operation for torch's.

        Raises:
            UnsupportedError: MPI has none for these tensors.
        """
        kind = next((known for known in self._ops if op == known), None)
        dtype, ops = tensors[0].dtype, dist.ReduceOp
        bitwise, additive = kind in (ops.BAND, ops.BOR, ops.BXOR), kind in (ops.SUM, ops.AVG)
        if kind is None or (bitwise and dtype.is_floating_point) or (dtype.is_complex and not additive):
            raise UnsupportedError(
                f"the backend mpi4py cannot reduce {dtype} tensors by {getattr(op, 'op', op)}"
            )
        if dtype == torch.bool:
            both = (ops.PRODUCT, ops.MIN, ops.BAND)
            return self._MPI.MIN if kind in both else self._MPI.MAX
        return self._ops[kind]

    def _unstage(self, tensor: Tensor, reduced: Tensor, op: Any) -> None:
        """Put a reduced flat tensor where it belongs."""
        if op == dist.ReduceOp.AVG:
            reduced = reduced.div_(self.size()) if reduced.is_floating_point() else reduced // self.size()
        if tensor.is_complex():
            reduced = torch.view_as_complex(reduced.view(-1, 2))
        copy_back(tensor, reduced)

    # --- the names these had before torch 2.13 -------------------------------------------------------------

    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced


class _Work(dist.Work):
    """An operation under way; unlike the work that torch makes of a future, it raises when it failed.

    Args:
        done: the future of the tensors, or of the error.
        status: MPI's status of a receive from any rank.
    """

    def __init__(self, done: Future[Any], status: Any = None) -> None:
        super().__init__()
        self._done, self._status = done, status
        self._future = done.then(_value)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Return when it is done.

        Raises:
            PeerError: it failed, or is not done after the timeout (0: the group's own).
        """
        deadline = time.monotonic() + timeout.total_seconds()
        while timeout > timedelta(0) and not self._done.done():
            if time.monotonic() > deadline:
                raise PeerError(f"an MPI operation is not done after {timeout.total_seconds():g} s")
            time.sleep(1e-3)
        self._done.wait()
        _value(self._done)
        return True

    synchronize = wait

    def is_completed(self) -> bool:
        """Whether it is done."""
        return self._done.done()

    def is_success(self) -> bool:
        """Whether it is done without an error."""
        return self._done.done() and not isinstance(self._done.value(), BaseException)

    def exception(self) -> BaseException | None:
        """The error, if it has failed."""
        outcome = self._done.value() if self._done.done() else None
        return outcome if isinstance(outcome, BaseException) else None

    def result(self) -> list[Tensor]:
        """The tensors that were written."""
        return _value(self._done)

    def get_future(self) -> Future[list[Tensor]]:
        """Of the tensors; raises when the operation failed. What DDP waits for."""
        return self._future

    def _source_rank(self) -> int:
        return int(self._status.Get_source())


def _value(done: Future[Any]) -> list[Tensor]:
    outcome = done.value()
    if isinstance(outcome, BaseException):
        raise outcome
    return list(outcome)


def _values(done: Future[list[Future[Any]]]) -> list[Tensor] | BaseException:
    """Of several futures: all tensors, or the first error."""
    outcomes = [future.value() for future in done.value()]
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    return errors[0] if errors else [tensor for outcome in outcomes for tensor in outcome]
