"""Where compiled kernels are kept.

The place. `NUMBA_CACHE_DIR` if it is set; else beside the sources (`gradq/kernels/__pycache__`), else in the
user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`). Kernels are read from any of these and written to the
first that can be written, in a folder named by a digest of the kernels' sources and of the versions of Numba
and llvmlite, so kernels of other sources are never used. Numba tells processors apart within it. Where
nothing can be written, kernels that are not there are compiled in every process, and a warning says so.
Folders that nobody has used for a month are removed.

Who compiles: see `turns`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.resources
import itertools
import logging
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import llvmlite
import numba
from numba.core import config as _config
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _Cache, _CacheLocator

from gradq.kernels.turns import Lock

if TYPE_CHECKING:
    from importlib.abc import Traversable

__all__ = ["KernelCache", "digest", "folders"]

config = cast(Any, _config)
_PREFIX = "gradq-kernels-"
_FOLDERS = ("kernels", "codecs", "collectives/low_rank")  # where kernels are, and what they use
_KEPT_SECONDS = 30 * 24 * 3600
_log = logging.getLogger(__name__)


# --- the place -----------------------------------------------------------------------------------------


@functools.cache
def digest() -> str:
    """Of the sources of all kernels, and of what compiles them."""
    total = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    root = importlib.resources.files(__name__.split(".")[0])
    found = (_sources(root.joinpath(folder), f"{folder}/") for folder in _FOLDERS)
    for name, source in sorted(itertools.chain.from_iterable(found)):
        total.update(f"{name} {len(source)} ".encode() + source)
    return total.hexdigest()[:16]


def _sources(folder: Traversable, name: str = "") -> Iterator[tuple[str, bytes]]:
    for entry in folder.iterdir():
        if entry.name.endswith(".py"):
            yield name + entry.name, entry.read_bytes()
        elif entry.is_dir() and entry.name != "__pycache__":
            yield from _sources(entry, f"{name}{entry.name}/")


@functools.cache
def folders() -> tuple[tuple[Path, ...], Path | None]:
    """The folders to read kernels from, and the one to write to, or None."""
    readable, writable = [], None
    for root in _roots():
        folder = root / f"{_PREFIX}{digest()}"
        if writable is None and _can_write(folder):
            writable = folder
            _remove_unused(root, folder)
        if folder.is_dir() and _is_trusted(root, folder):
            readable.append(folder)
    if writable is not None and writable not in readable:
        writable = None
    return tuple(readable), writable


def _roots() -> list[Path]:
    if config.CACHE_DIR:
        return [Path(config.CACHE_DIR)]
    roots = []
    here = Path(__file__).parent
    if here.is_dir():  # not in a zip file
        roots.append(here / "__pycache__")
    user = os.environ.get("XDG_CACHE_HOME", "")
    if not Path(user).is_absolute():
        home = os.path.expanduser("~")  # noqa: PTH111 (Path.home() raises for a user without one)
        user = os.path.join(home, ".cache") if os.path.isabs(home) else ""  # noqa: PTH117, PTH118
    if user:
        roots.append(Path(user))
    return roots


def _can_write(folder: Path) -> bool:
    """Make a folder, and try it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(b"gradq")
        os.utime(folder)  # it is used
    except OSError:
        return False
    return True


def _is_trusted(root: Path, folder: Path) -> bool:
    """Whether nobody else can have put kernels there: below /tmp they must be this user's or root's."""
    if not hasattr(os, "geteuid") or not root.stat().st_mode & stat.S_IWOTH:
        return True
    if folder.stat().st_uid in (0, os.geteuid()):
        return True
    _warn_once(f"gradq does not use the compiled kernels in {folder}: they belong to another user")
    return False


def _remove_unused(root: Path, but: Path) -> None:
    """Remove the folders of other sources that nobody has used for a month."""
    with contextlib.suppress(OSError):
        for folder in root.glob(f"{_PREFIX}*"):
            if folder != but and time.time() - folder.stat().st_mtime > _KEPT_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning(message)


@functools.cache
def _say_once(message: str) -> None:
    """To the log, or to stderr where nobody listens: seconds of silence look like a hang."""
    if _log.isEnabledFor(logging.INFO):
        _log.info(message)
    elif sys.stderr is not None:
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()


# --- a kernel in a folder ------------------------------------------------------------------------------


class _Locator(cast(Any, _CacheLocator)):  # type: ignore[misc]
    def __init__(self, folder: Path, py_file: str) -> None:
        self._folder, self._py_file = folder, py_file

    def get_cache_path(self) -> str:
        return str(self._folder)

    def get_source_stamp(self) -> str:
        return digest()

    def get_disambiguator(self) -> str:
        return ""


class _Kept(cast(Any, CompileResultCacheImpl)):  # type: ignore[misc]
    """Numba's way to write a kernel, in a given folder under a given name."""

    def __init__(self, function: Any, folder: Path, name: str) -> None:
        code = function.__code__
        self._lineno = code.co_firstlineno
        self._locator = _Locator(folder, code.co_filename)
        self._filename_base = (
            f"{name}.py{sys.version_info[0]}{sys.version_info[1]}{getattr(sys, 'abiflags', '')}"
        )


class _InFolder(cast(Any, FunctionCache)):  # type: ignore[misc]
    """Numba's cache of a function, in a given folder under a given name."""

    def __init__(self, function: Any, folder: Path, name: str) -> None:
        self._impl_class = lambda function: _Kept(function, folder, name)
        super().__init__(function)

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        """The processor and the types: all else is in the digest and in the name.

        Numba's own key has the function's closure in it, as pickled: another one in every process.
        """
        return sig, codegen.magic_tuple()


class KernelCache(cast(Any, _Cache)):  # type: ignore[misc]
    """The cache of one kernel, as Numba's dispatchers use it.

    Args:
        function: the kernel.
        name: tells it from others made by the same lines.
    """

    def __init__(self, function: Any, name: str = "") -> None:
        self._function = function
        module = function.__module__.partition(".")[2]  # several files are called cpu
        parts = [module, function.__qualname__.replace("<locals>.", ""), name]
        self._name = "-".join(part for part in parts if part)
        self._lock = Lock()

    @functools.cached_property
    def _caches(self) -> list[Any]:
        return [_InFolder(self._function, folder, self._name) for folder in folders()[0]]

    @functools.cached_property
    def _to_write(self) -> Any | None:
        writable = folders()[1]
        return _InFolder(self._function, writable, self._name) if writable is not None else None

    @property
    def cache_path(self) -> str | None:
        """The folder that is written to."""
        return str(folders()[1]) if folders()[1] is not None else None

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The kernel, or None if this process must compile it.

        Raises:
            KernelBusyError: another process compiles it; only in `turns.in_turns`.
        """
        writable = folders()[1]
        lock_file = writable / f"{self._name}.lock" if writable is not None else None
        found = self._lock.take_or_wait(lock_file, lambda: self._load(sig, target_context))
        if found is not None:
            self._lock.drop()
            return found
        if writable is None:
            tried = ", ".join(str(root) for root in _roots()) or "none"
            _warn_once(
                f"gradq finds no folder to keep its compiled kernels in (tried {tried}), so that every "
                "process compiles them again: set NUMBA_CACHE_DIR to a folder that this user can write to"
            )
        kept = f"they are kept in {writable}" if writable is not None else "they cannot be kept"
        _say_once(f"gradq: compiling kernels for this processor (some seconds, once: {kept})")
        _log.debug("compiling %s", self._name)
        return None

    def _load(self, sig: Any, target_context: Any) -> Any:
        for cache in self._caches:
            try:
                found = cache.load_overload(sig, target_context)
            except Exception as error:  # a broken file: anything may be in it
                _warn_once(
                    f"gradq cannot read the compiled kernel {self._name} in {cache.cache_path}: {error!r}"
                )
                continue
            if found is not None:
                return found
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a kernel; where the disk is full it is not kept, and a warning says so."""
        try:
            if self._to_write is not None:
                self._save(sig, data)
        except OSError as error:
            _warn_once(
                f"gradq cannot keep its compiled kernels in {self.cache_path}: {error}; every process "
                "compiles them again until it can, or until NUMBA_CACHE_DIR names another folder"
            )
        finally:
            self._lock.drop()

    def _save(self, sig: Any, data: Any) -> None:
        cache = cast(Any, self._to_write)
        try:
            cache.save_overload(sig, data)
        except OSError:
            raise
        except Exception:  # an index that cannot be read: begin a new one
            cache.flush()
            cache.save_overload(sig, data)

    def enable(self) -> None:
        """It is."""

    def disable(self) -> None:
        """It stays enabled."""

    def flush(self) -> None:
        """Forget what is kept of this kernel."""
        if self._to_write is not None:
            self._to_write.flush()
