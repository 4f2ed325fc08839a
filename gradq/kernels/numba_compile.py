"""How kernels become machine code: `jit` for what Python calls, `called` and `inline` for what kernels call.

Numba optimizes every function and makes machine code of it, also of those that only other kernels call: more
than half of the time of a first start. Here these end as LLVM modules, which are linked into their callers
and optimized there, once. This needs a few names of Numba that are not public; they are all in this file and
in `numba_cache`, and have been the same from Numba 0.60 to 0.68.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

from gradq.kernels.numba_cache import KernelCache

__all__ = ["called", "inline", "inline_optimized", "jit", "variant"]

_F = TypeVar("_F", bound=Callable[..., Any])


class _Module(cast(Any, JITCodeLibrary)):  # type: ignore[misc]
    """A function for its callers alone: an LLVM module that is neither optimized as a whole nor compiled."""

    def _optimize_final_module(self) -> None:
        pass  # the callers' modules are, after this one is linked into them

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def _finalize_specific(self) -> None:
        pass


class _OptimizedModule(_Module):
    """As `_Module`, but optimized by itself first: some loops become better code this way."""

    def _optimize_final_module(self) -> None:
        cast(Any, JITCodeLibrary)._optimize_final_module(self)


class _ForCallers(cast(Any, Compiler)):  # type: ignore[misc]
    """Numba's compiler, which ends with a `_Module`."""

    library: Any = _Module

    def compile_extra(self, function: Any) -> Any:
        state = self.state
        state.library = self.library(state.targetctx.codegen(), function.__qualname__)
        # Numba wants a built-in function of its own for each, to be called from Python: this one cannot be
        state.targetctx.get_executable = lambda _library, _fndesc, _env: object().__format__
        return super().compile_extra(function)


class _OptimizedForCallers(_ForCallers):
    library = _OptimizedModule


_FOR_CALLERS: dict[str, Any] = {"nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def jit(function: _F) -> _F:
    """A kernel that Python calls: compiled on first use, kept on disk (see `numba_cache`)."""
    return variant("")(function)


def variant(name: str) -> Callable[[_F], _F]:
    """As `jit`, for one of several functions made by the same lines; name tells them apart on disk."""

    def decorate(function: _F) -> _F:
        dispatcher = cast(Any, numba.njit(nogil=True)(function))
        dispatcher._cache = KernelCache(function, name)
        return cast(_F, dispatcher)

    return decorate


def called(function: _F) -> _F:
    """A function that only kernels call, by a call; optimized by itself first."""
    return cast(_F, numba.njit(pipeline_class=_OptimizedForCallers, **_FOR_CALLERS)(function))


def inline(function: _F) -> _F:
    """A function that only kernels call, compiled into every caller."""
    return cast(_F, numba.njit(forceinline=True, pipeline_class=_ForCallers, **_FOR_CALLERS)(function))


def inline_optimized(function: _F) -> _F:
    """As `inline`, but optimized by itself first: it takes longer; use it where it makes faster kernels."""
    made = numba.njit(forceinline=True, pipeline_class=_OptimizedForCallers, **_FOR_CALLERS)
    return cast(_F, made(function))
