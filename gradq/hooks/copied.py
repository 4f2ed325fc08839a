"""A handle inside a copied or pickled model: it does no harm, and says what it is when it is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from gradq.errors import ConfigError

__all__ = ["CopiedHandle"]


@dataclass(frozen=True, repr=False)
class CopiedHandle:
    """What `copy.copy`, `copy.deepcopy` and `pickle` make of a handle.

    Threads, process groups and residuals belong to one model in one process. DistributedDataParallel makes a
    new reducer for a copy of itself, without a hook: the copy's gradients are averaged by DDP's own
    all-reduce, and `gradq.compress(copy)` compresses them again.

    Attributes:
        label: the spec of the handle that this is a copy of.
    """

    label: str

    def close(self) -> None:
        """Do nothing: there is nothing to end."""

    def __getattr__(self, name: str) -> NoReturn:
        """Everything else a handle has.

        Raises:
            ConfigError: saying what to do; AttributeError for private names, which copying looks for.
        """
        if name.startswith("_"):
            raise AttributeError(name)
        raise ConfigError(
            f"{name}: this handle ({self.label}) came out of a copy or a pickle of a model or handle, and "
            "compresses nothing: DistributedDataParallel averages a copy by its own all-reduce. Call "
            "gradq.compress on the copied model for a handle of its own"
        )

    def __repr__(self) -> str:
        return f"<gradq {self.label}, copied or unpickled: compresses nothing>"
