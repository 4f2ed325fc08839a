"""Who compiles a kernel: one process of a machine, while the others look after other kernels, then load it.

A process that does not find a kernel on disk takes its lock, a file beside it. Another process that needs the
same kernel waits for it or, within `in_turns`, first sees to its other kernels; so the ranks of a machine
share the work. The system drops the lock of a process that ends. A process that waited for `PATIENCE`
seconds, for one that hangs, compiles the kernel itself: what it makes is the same.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

try:
    import fcntl
except ImportError:  # not a Unix: no locks, every process compiles
    fcntl = None  # type: ignore[assignment]

__all__ = ["PATIENCE", "KernelBusyError", "Lock", "in_turns"]

PATIENCE = 60.0  # seconds to wait for a kernel that another process compiles
_POLL = 0.02  # seconds
_T = TypeVar("_T")


class KernelBusyError(Exception):
    """Another process compiles this kernel, and there is something else to do meanwhile."""


class Lock:
    """The right to compile a kernel, of one process of a machine at a time."""

    def __init__(self) -> None:
        self._file: int | None = None

    def take_or_wait(self, path: Path | None, load: Callable[[], _T | None]) -> _T | None:
        """What load gives, at last; None if this process has the lock, or has waited long enough.

        Args:
            path: the file of the lock; None for a kernel that is not kept.
            load: looks for what another process has made.

        Raises:
            KernelBusyError: another process has the lock, and this one is within `in_turns`.
        """
        found, deadline = load(), time.monotonic() + PATIENCE
        while found is None and not self._take(path):
            if _mine.others_first:
                raise KernelBusyError
            if time.monotonic() > deadline:
                return None
            time.sleep(_POLL)
            found = load()
        # perhaps it was written between the look and the lock
        return load() if found is None and path is not None else found

    def _take(self, path: Path | None) -> bool:
        """Whether this process has the lock, or there are no locks here."""
        if self._file is not None or path is None or fcntl is None:
            return True
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:
            return True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(file)
            return not isinstance(error, BlockingIOError)  # some network file systems have no locks
        self._file = file
        _mine.held.add(self)
        return True

    def drop(self) -> None:
        """Let others have it."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)
            os.close(self._file)
            self._file = None
            _mine.held.discard(self)


class _Mine(threading.local):
    """What one thread is about: ranks may be threads of a process, and each goes its own way."""

    def __init__(self) -> None:
        self.held: set[Lock] = set()
        self.others_first = False


_mine = _Mine()


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Without the garbage collector: it takes a tenth of a compilation's time, and finds next to nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_collections()
def in_turns(calls: Sequence[Callable[[], object]]) -> None:
    """Call each; those that need a kernel which another process is compiling come last.

    Within another `in_turns` they are left to its second round.

    Raises:
        KernelBusyError: within another `in_turns`, if a call is left.
    """
    nested, later = _mine.others_first, []
    try:
        _mine.others_first = True
        for call in calls:
            try:
                call()
            except KernelBusyError:
                later.append(call)
        if nested and later:
            raise KernelBusyError
        _mine.others_first = False
        for call in later:
            call()
    finally:
        _mine.others_first = nested
        if not nested:
            for lock in list(_mine.held):
                lock.drop()
