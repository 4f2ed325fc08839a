"""The process group: torch's collectives as nonblocking MPI operations.

The operations have the names and arguments of `torch.distributed.ProcessGroup`, which torch's Python calls by
name and its C++ (DDP, functional collectives) through virtual functions.
"""

# torch declares most operations as several overloads; we have the one that torch itself calls.
# mypy: disable-error-code="override, assignment, no-untyped-call, call-arg, attr-defined"

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from gradq.backends.mpi_tensors import array, bits, copy_back, flatten, in_parts, rows, to_reduce, together
from gradq.backends.mpi_work import MPIWork, all_values
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
        same = ("SUM", "MIN", "MAX", "BAND", "BOR", "BXOR")
        self._ops = {getattr(op, name): getattr(MPI, name) for name in same}
        self._ops |= {op.AVG: MPI.SUM, op.PRODUCT: MPI.PROD}

    # --- what torch asks a group about itself --------------------------------------------------------------

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        """The name it is registered under."""
        return BACKEND

    name = _get_backend_name = getBackendName

    def setGroupName(self, name: str) -> None:  # noqa: N802
        """Take the name that torch gives a group after it has made it."""
        self._name = name

    def getGroupName(self) -> str:  # noqa: N802
        """The name torch gave it."""
        return self._name

    def setGroupDesc(self, description: str) -> None:  # noqa: N802
        """Take the words in which torch says what the group is for."""
        self._description = description

    def getGroupDesc(self) -> str:  # noqa: N802
        """The words that `setGroupDesc` was given."""
        return self._description

    def _get_backend(self, device: torch.device) -> MPIProcessGroup:
        if device.type != "cpu":
            raise UnsupportedError(f"the backend mpi4py moves CPU tensors, not {device.type}")
        return self

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    supports_coalescing = False  # every operation is nonblocking
    supports_splitting = False  # `new_group` makes groups

    def set_timeout(self, timeout: timedelta) -> None:
        """Set the limit for operations that are posted from now on."""
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

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> MPIWork:
        """Reduce every tensor over the ranks, in place."""
        op = (opts or dist.AllreduceOptions()).reduceOp
        staged = [to_reduce(tensor) for tensor in tensors]

        def post() -> list[Any]:
            mpi_op = self._op(op, tensors)
            return [self._collectives.Iallreduce(self._MPI.IN_PLACE, array(s), mpi_op) for s in staged]

        return self._launch("allreduce", post, zip(tensors, staged, strict=True), op=op)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: list[Tensor], opts: Any) -> MPIWork:
        """Reduce a tensor over the ranks, in place on the root."""
        (tensor,), root = tensors, opts.rootRank
        staged = to_reduce(tensor)
        received = torch.empty_like(staged) if self.rank() == root else None

        def post() -> list[Any]:
            target = None if received is None else array(received)
            return [self._collectives.Ireduce(array(staged), target, self._op(opts.reduceOp, tensors), root)]

        written = [] if received is None else [(tensor, received)]
        return self._launch("reduce", post, written, [staged], op=opts.reduceOp)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> MPIWork:
        """Copy the root's tensor to all."""
        (tensor,) = tensors
        staged = flatten(tensor)
        post = lambda: [self._collectives.Ibcast(array(bits(staged)), opts.rootRank)]  # noqa: E731
        return self._launch("broadcast", post, [(tensor, staged)])

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> MPIWork:
        """Give every rank all ranks' tensors; they may differ in size."""
        return self._gather_all("allgather", outputs[0], inputs[0])

    def allgather_coalesced(
        self, output_lists: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> MPIWork:
        """The same, for several; output_lists[k] are all ranks' inputs[k]."""
        pairs = zip(output_lists, inputs, strict=True)
        return self._join([self._gather_all("allgather_coalesced", *pair).done for pair in pairs])

    def _gather_all(self, name: str, outputs: Sequence[Tensor], tensor: Tensor) -> MPIWork:
        staged = flatten(tensor)
        flat, views = together(outputs, tensor)

        def post() -> list[Any]:
            in_place = staged.data_ptr() == views[self.rank()].data_ptr()  # FSDP gathers so
            send = self._MPI.IN_PLACE if in_place else array(bits(staged))
            return [self._collectives.Iallgatherv(send, in_parts(flat, views))]

        return self._launch(name, post, zip(outputs, views, strict=True), [staged])

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> MPIWork:
        """Give every rank all ranks' tensors in one, one after another."""
        return self._gather_all("all_gather_single", rows(output, self.size()), tensor)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> MPIWork:
        """The same, for several."""
        return self._join([self.all_gather_single(*p).done for p in zip(outputs, inputs, strict=True)])

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> MPIWork:
        """Give the root all ranks' tensors."""
        (tensor,), root = inputs, opts.rootRank
        staged, targets = flatten(tensor), outputs[0] if self.rank() == root else []
        flat, views = together(targets, tensor)

        def post() -> list[Any]:
            receive = in_parts(flat, views) if targets else None
            return [self._collectives.Igatherv(array(bits(staged)), receive, root)]

        return self._launch("gather", post, zip(targets, views, strict=True), [staged])

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> MPIWork:
        """Give every rank its tensor of the root's list."""
        (output,), root = outputs, opts.rootRank
        staged, sources = flatten(output), inputs[0] if self.rank() == root else []
        flat, views = together(sources, output)
        for source, view in zip(sources, views, strict=True):
            view.copy_(source.detach().reshape(-1))

        def post() -> list[Any]:
            send = in_parts(flat, views) if sources else None
            return [self._collectives.Iscatterv(send, array(bits(staged)), root)]

        return self._launch("scatter", post, [(output, staged)], [flat])

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> MPIWork:
        """Reduce a list of tensors over the ranks; each rank gets its own. They may differ in size."""
        return self._reduce_scatter("reduce_scatter", outputs[0], inputs[0], opts.reduceOp)

    def _reduce_scatter(self, name: str, output: Tensor, parts: Sequence[Tensor], op: Any) -> MPIWork:
        flat = torch.cat([part.detach().reshape(-1) for part in parts])
        staged = to_reduce(flat)
        numels = [part.numel() * staged.numel() // max(flat.numel(), 1) for part in parts]
        received = torch.empty(numels[self.rank()], dtype=staged.dtype)

        def post() -> list[Any]:
            mpi_op = self._op(op, parts)
            return [self._collectives.Ireduce_scatter(array(staged), array(received), numels, mpi_op)]

        return self._launch(name, post, [(output, received)], [staged], op=op)

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any) -> MPIWork:
        """Reduce a tensor of W equal parts over the ranks; each rank gets its own part."""
        parts = rows(tensor, self.size())
        return self._reduce_scatter("reduce_scatter_single", output, parts, opts.reduceOp)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any
    ) -> MPIWork:
        """The same, for several."""
        pairs = zip(outputs, inputs, strict=True)
        return self._join([self.reduce_scatter_single(*pair, opts).done for pair in pairs])

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> MPIWork:
        """Send inputs[r] to every rank r, and receive outputs[r] from it."""
        return self._exchange("alltoall", outputs, inputs)

    def all_to_all_single(
        self,
        output: Tensor,
        tensor: Tensor,
        output_sizes: list[int],
        input_sizes: list[int],
        opts: Any = None,
    ) -> MPIWork:
        """The same with one tensor each, cut along its first dimension."""
        outputs = output.split(list(output_sizes)) if output_sizes else rows(output, self.size())
        inputs = tensor.split(list(input_sizes)) if input_sizes else rows(tensor, self.size())
        return self._exchange("all_to_all_single", outputs, inputs)

    def _exchange(self, name: str, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> MPIWork:
        sent, pieces = together(inputs, inputs[0])
        for piece, tensor in zip(pieces, inputs, strict=True):
            piece.copy_(tensor.detach().reshape(-1))
        received, views = together(outputs, inputs[0])
        post = lambda: [self._collectives.Ialltoallv(in_parts(sent, pieces), in_parts(received, views))]  # noqa: E731
        return self._launch(name, post, zip(outputs, views, strict=True), [sent])

    def barrier(self, opts: Any = None) -> MPIWork:
        """Wait for all ranks: the work is done when the last one has come."""
        return self._launch("barrier", lambda: [self._collectives.Ibarrier()])

    # --- messages between two ranks ------------------------------------------------------------------------

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> MPIWork:
        """Send a tensor to a rank of the group."""
        staged = flatten(tensors[0])
        self._check_tag(tag)
        post = lambda: [self._messages.Isend(array(bits(staged)), peer, tag)]  # noqa: E731
        return self._launch(f"send to rank {peer}", post, keep=[staged])

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> MPIWork:
        """Receive a tensor from a rank of the group."""
        return self._receive(tensors, peer, tag, f"receive from rank {peer}")

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> MPIWork:
        """Receive a tensor from any rank; the work says from which."""
        statuses = [self._MPI.Status()]
        return self._receive(tensors, self._MPI.ANY_SOURCE, tag, "receive from any rank", statuses)

    def _receive(
        self, tensors: list[Tensor], peer: int, tag: int, name: str, statuses: list[Any] | None = None
    ) -> MPIWork:
        (tensor,) = tensors
        staged = flatten(tensor)
        self._check_tag(tag)
        post = lambda: [self._messages.Irecv(array(bits(staged)), peer, tag)]  # noqa: E731
        return self._launch(name, post, [(tensor, staged)], statuses=statuses)

    def _check_tag(self, tag: int) -> None:
        if not 0 <= tag <= self._highest_tag:
            raise ConfigError(f"tag {tag}: this MPI allows 0 to {self._highest_tag}")

    # --- the one way into MPI ------------------------------------------------------------------------------

    def _launch(
        self,
        name: str,
        post: Callable[[], list[Any]],
        written: Iterable[tuple[Tensor, Tensor]] = (),
        keep: Sequence[Tensor] = (),
        op: Any = None,
        statuses: list[Any] | None = None,
    ) -> MPIWork:
        """Post an operation and have it watched.

        Args:
            name: the name in error messages.
            post: a function that posts it and returns MPI's requests.
            written: the tensors that it writes, each with the flat tensor that MPI writes in its place.
            keep: the other buffers that MPI reads or writes.
            op: torch's operation, where it reduces.
            statuses: see `Operation`.

        Raises:
            PeerError: the group has failed before.
        """
        pairs = list(written)

        def finish() -> list[Tensor]:
            for tensor, flat in pairs:
                self._unstage(tensor, flat, op)
            return [tensor for tensor, _ in pairs]

        with self._posting:
            if self._failure is not None:
                raise PeerError(f"{name}: the process group has failed before: {self._failure}")
            if self._closed:
                raise ConfigError(f"{name}: the process group was destroyed")
            where = f"MPI {name} in group {self._name!r} on rank {self.rank()}"
            requests = post()
        operation = Operation(requests, finish, where, self._timeout_s, self._fail, [pairs, keep], statuses)
        self._progress.watch(operation)
        return self._work(operation.done, statuses[0] if statuses else None)

    def _work(self, done: Future[Any], status: Any = None) -> MPIWork:
        if self._coalesced is not None:
            self._coalesced.append(done)
        return MPIWork(done, status)

    def _join(self, futures: list[Future[Any]]) -> MPIWork:
        """One work for several operations."""
        return self._work(torch.futures.collect_all(futures).then(all_values))

    def _start_coalescing(self, device: torch.device) -> None:
        self._coalesced = []

    def _end_coalescing(self, device: torch.device) -> MPIWork:
        done, self._coalesced = self._coalesced or [], None
        return self._join(done)

    def _fail(self, error: PeerError) -> None:
        self._failure = self._failure or error

    # --- reductions ----------------------------------------------------------------------------------------

    def _op(self, op: Any, tensors: Sequence[Tensor]) -> Any:
        """MPI's operation for torch's; raise UnsupportedError if MPI has none for these tensors."""
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

    def _unstage(self, tensor: Tensor, flat: Tensor, op: Any) -> None:
        """Copy what MPI has written back to the tensor, divided where the operation is AVG."""
        if op is not None and op == dist.ReduceOp.AVG:
            flat = flat.div_(self.size()) if flat.is_floating_point() else flat // self.size()
        if tensor.is_complex() and not flat.is_complex():
            flat = torch.view_as_complex(flat.view(-1, 2))
        copy_back(tensor, flat)

    # --- the names these had before torch 2.13 -------------------------------------------------------------

    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
