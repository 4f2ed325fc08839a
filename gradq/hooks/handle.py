"""Handles: what gradq gives back for a model, and what takes its place in a copied or pickled model."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch.distributed as dist

from gradq import checkpoint
from gradq.errors import CheckpointError, ConfigError, UnsupportedError
from gradq.metrics import Event, Stats
from gradq.policy import Asked, Policy, Spec, label
from gradq.sync.base import Sync
from gradq.transport.handshake import meeting

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CopiedHandle", "GradientHandle", "Handle", "load_checkpoint"]

_log = logging.getLogger("gradq")


class Handle(ABC):
    """What every trainer gives back: figures, checkpoints, and an end.

    A copied or pickled handle, such as that in `copy.deepcopy(model)`, is a `CopiedHandle`.

    Attributes:
        sync: the sync that averages.
    """

    sync: Sync

    @property
    @abstractmethod
    def label(self) -> str:
        """The name of what the handle does, such as "int4"."""

    @property
    def failure(self) -> BaseException | None:
        """What stopped the averaging, None while it works.

        DDP passes errors through C++, which keeps their text only: the training loop gets a RuntimeError from
        `backward()`. This is the original, with its cause.
        """
        return self.sync.failure

    def stats(self, *, parameters: bool = False) -> Stats:
        """Totals of this rank since the start.

        Args:
            parameters: whether to fill `Stats.parameters` too.
        """
        return self.sync.stats(parameters)

    def add_sink(self, sink: Callable[[Event], None]) -> None:
        """Call sink(event) for every measurement, from the thread that made it; it must be quick.

        Raises:
            ConfigError: it cannot be called.
        """
        if not callable(sink):
            raise ConfigError(f"add_sink({sink!r:.200}): it takes a function of one gradq.metrics.Event")
        self.sync.metrics.add_sink(sink)

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a run needs to continue, for torch.distributed.checkpoint on all ranks."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state. Collective."""

    @abstractmethod
    def load_checkpoint(self, checkpoint_id: str | os.PathLike[str], key: str = "gradq") -> None:
        """Continue from a checkpoint saved by any number of ranks; what `gradq.load_checkpoint` calls."""

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.sync.closed

    def close(self) -> None:
        """End gradq's threads and connections; the model is averaged without gradq afterwards. Idempotent.

        It also happens when the model is deleted, or at the end of a `with` block.
        """
        self.sync.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[CopiedHandle], tuple[str]]:
        """A copy or a pickle is a `CopiedHandle`: threads and process groups stay where they are."""
        return CopiedHandle, (self.label,)

    def __repr__(self) -> str:
        return f"<gradq {self.label} over {self.sync.world_size} ranks, {self.stats()}>"


class GradientHandle(Handle):
    """The handle of a model whose gradients are averaged, which `gradq.compress` returns.

    Attributes:
        spec: the spec or policy that was asked for.
    """

    spec: Spec | Policy

    @property
    def label(self) -> str:
        """The name of the spec."""
        return label(self.spec)

    @abstractmethod
    def choose(self, spec: Asked) -> tuple[Spec | Policy, Policy | None, str]:
        """What was asked for, the policy of this model that it stands for, and a remark for the user."""

    def set_spec(self, spec: Asked) -> None:
        """Use another spec from the next step on.

        All ranks call it between the same two steps. Residuals of parameters that no longer use feedback are
        dropped, and shard residuals where ranks own other shards than before; the log says so.

        Raises:
            SpecError, ConfigError: the spec is wrong, or the handle is closed; MismatchError: the ranks
                disagree. The old one stays.
        """
        self.check_open("set_spec")
        with meeting(self.sync.group, "change its spec"):
            asked, policy, remark = self.choose(spec)
        self.sync.set_policy(policy, label(asked))
        self.spec = asked
        self.say(remark)

    def discard_step(self) -> None:
        """Say that the gradients of the last backward were not applied: the step was skipped.

        For trainers that skip a step by themselves (a norm above a threshold), and for a backward whose
        gradients are thrown away (of a GAN's generator while its discriminator learns): what this backward
        took from the residuals is put back. All ranks call it, after backward() and before the next one. With
        a GradScaler it is not needed: a step that is not finite leaves no residual anyway.

        Raises:
            ConfigError: a backward is under way.
        """
        self.sync.discard_step()

    def measure_next_step(self) -> None:
        """Measure the error of phase 1 in the next step, for `stats().nmse`. Costs one more decode."""
        self.sync.sample_next = True

    @property
    def checkpoint_path(self) -> tuple[str, ...]:
        """Where this rank's state stands under the key of a checkpoint."""
        return ()

    @property
    def checkpoint_groups(self) -> Sequence[dist.ProcessGroup]:
        """The groups of ranks that load a checkpoint together, one group after another."""
        return [self.sync.group]

    def state_dict(self) -> dict[str, Any]:
        """Step and residuals, for torch.distributed.checkpoint on all ranks; see `gradq.checkpoint`.

        It has this rank's residuals only, and `torch.save` refuses it: see `gathered_state_dict`.
        """
        self.check_open("state_dict")
        state = checkpoint.state_dict(self.sync)
        for name in reversed(self.checkpoint_path):
            state = {name: state}
        return state

    def gathered_state_dict(self) -> dict[str, Any]:
        """Step and all ranks' residuals on rank 0, for `torch.save` there. Collective.

        Returns:
            On rank 0 of the group a plain dictionary of CPU tensors, which `load_state_dict` takes on every
            rank, of any number of ranks; on all others an empty one. Rank 0 holds W times the residuals.
        """
        return checkpoint.gather_rows(self.state_dict(), self.sync)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; see `gradq.checkpoint.load_state_dict`. Collective."""
        self.check_open("load_state_dict")
        checkpoint.load_state_dict(self.sync, state, self.checkpoint_path, self.checkpoint_groups)

    def load_checkpoint(self, checkpoint_id: str | os.PathLike[str], key: str = "gradq") -> None:
        """See `Handle.load_checkpoint`."""
        key = ".".join((key, *self.checkpoint_path))
        checkpoint.load_sync(self.sync, checkpoint_id, key, self.checkpoint_groups)

    def check_open(self, call: str) -> None:
        """Raise if the handle is closed.

        Args:
            call: the name of the method that needs an open one.
        """
        if self.closed:
            raise ConfigError(
                f"{call}: this handle is closed, and its model is averaged without gradq; call "
                "gradq.compress on the model again"
            )

    def say(self, remark: str) -> None:
        """Log a warning once for all ranks, if there is one."""
        if remark and self.sync.rank == 0:
            _log.warning(remark)


def load_checkpoint(handle: Handle, checkpoint_id: str | os.PathLike[str], key: str = "gradq") -> None:
    """Load what `dcp.save({key: handle.state_dict(), ...})` wrote, on any number of ranks. Collective.

    Args:
        handle: the handle from `gradq.compress`, or a `gradq.LocalSGD` or `gradq.DiLoCo`.
        checkpoint_id: the checkpoint's folder.
        key: the key under which the state stands in the saved dictionary.

    Raises:
        UnsupportedError: the first argument is no handle.
        CheckpointError: there is no such checkpoint or key, it is torn or damaged, or the model differs.
            Nothing is changed on any rank.
    """
    if not isinstance(handle, Handle):
        raise UnsupportedError(
            "gradq.load_checkpoint(handle, folder) takes the handle that gradq.compress returned (or a "
            f"gradq.LocalSGD or gradq.DiLoCo) first, got {type(handle).__name__}"
        )
    if not isinstance(key, str):
        raise CheckpointError(f"key must be the name of the state in the checkpoint, got {key!r}")
    handle.load_checkpoint(checkpoint_id, key)


@dataclass(frozen=True, repr=False)
class CopiedHandle:
    """What `copy.copy`, `copy.deepcopy` and `pickle` make of a handle: it does no harm, and says what it is.

    Threads, process groups and residuals belong to one model in one process. DistributedDataParallel makes a
    new reducer for a copy of itself, without a hook: the copy's gradients are averaged by DDP's own
    all-reduce, and `gradq.compress(copy)` compresses them again.

    Attributes:
        label: the label of the handle that this is a copy of.
    """

    label: str

    def close(self) -> None:
        """Do nothing: there is nothing to end."""

    def __getattr__(self, name: str) -> NoReturn:
        """Refuse everything else that a handle has: a ConfigError says what to do."""
        if name.startswith("_"):  # copying looks for such names
            raise AttributeError(name)
        raise ConfigError(
            f"{name}: this handle ({self.label}) came out of a copy or a pickle of a model or handle, and "
            "compresses nothing: DistributedDataParallel averages a copy by its own all-reduce. Call "
            "gradq.compress on the copied model for a handle of its own"
        )

    def __repr__(self) -> str:
        return f"<gradq {self.label}, copied or unpickled: compresses nothing>"
