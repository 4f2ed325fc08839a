"""Options: what a user may choose beside the model and the spec. SyncConfig: what of that averaging needs."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypedDict

import torch
import torch.distributed as dist

from gradq.codecs import Codec
from gradq.collectives import choose
from gradq.errors import ConfigError
from gradq.policy import Asked, ExactRule, Spec, check_feedback, exact_patterns

__all__ = [
    "RESIDUAL_DTYPES",
    "OptionFields",
    "Options",
    "SyncConfig",
    "Timeout",
    "as_timedelta",
    "asked_for",
    "scale_of",
]

Timeout = timedelta | float | None
"""The limit for one exchange; a number is in seconds."""

RESIDUAL_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_SEEDS = (-(1 << 63), 1 << 64)
_LONGEST_S = 1e9

# The message for a user who gives a trainer an option that the trainer does not have.
_REFUSALS = {
    "DDP": "replicate_group=, shard_spec= and gather_spec= are for FSDP2 models",
    "FSDP2": "group= and local_world_size= are for DistributedDataParallel; FSDP2 knows its mesh",
    "local steps": "local_world_size= is for DistributedDataParallel; replicate_group=, shard_spec= and "
    "gather_spec= are for FSDP2 models; local steps have none of them",
}

# What other libraries call what a spec says.
_SPEC_WORDS = dict.fromkeys(("bits", "codec", "compression", "compressor"), "int4") | {"rank": "powersgd:4"}


def _only(*trainers: str) -> dict[str, tuple[str, ...]]:
    """The metadata of a field that only some trainers have."""
    return {"trainers": trainers}


@dataclass(frozen=True, kw_only=True, repr=False)
class Options:
    """How gradients are averaged, beside the spec. All ranks give the same ones.

    `gradq.compress(model, "int4", gradq.Options(seed=1, timeout=30))` is the same as
    `gradq.compress(model, "int4", seed=1, timeout=30)`: every field is a keyword argument too, which replaces
    that of the object. So it is for `gradq.HookState`, `gradq.LocalSGD` and `gradq.DiLoCo`.

    Attributes:
        feedback: error feedback: "auto" (at 4 bits and below, top-k and low rank; not for unbiased rotated
            codecs, which learn better without), True or False. It keeps two fp32 copies of the compressed
            gradients. Top-k and low rank do not converge without it, so False is an error there. FSDP2
            without replicas has it only if it is True: its residual is as large as the *unsharded* gradient.
        exact: the rule that says which parameters travel exact, in their own dtype. A predicate over
            `gradq.ParameterInfo` is the whole rule. Names and shell patterns are short for "those with fewer
            than 1024 elements or one dimension (the default, `gradq.policy.small_or_1d`), and these". See
            `gradq.FixedPolicy` for casts such as "bf16".
        seed: the seed of the stochastic rounding, an integer of 64 bits. Same seed, same bytes.
        collective: how ranks exchange: "auto" (direct at two ranks, and at any number where all that a rank
            sends is at most 64 KiB; else two_phase; sparse for top-k), "direct", "two_phase" or
            "hierarchical" (exact inside a node, compressed between nodes; see
            `gradq.collectives.hierarchical`; not for local steps). Low rank averages its factors by it. A
            policy may choose for each parameter (`gradq.Assignment`). FSDP2 has a choice between replicas
            only.
        residual_dtype: the dtype of residuals: "fp32", or "bf16" for half the memory at an unrecovered
            rounding of 2**-9.
        grad_scaler: the `torch.amp.GradScaler` in use: residuals are then kept in unscaled units. For local
            steps the one that steps the inner optimizer: a step that it skips on one rank counts too, so that
            all ranks average at the same iterations.
        timeout: the limit for one exchange, in seconds or as a timedelta; None takes the process group's.
        group: the process group to average over. DDP: found out where it is not given, from the model or
            from the DDP model around it; if there is none yet, the default group, and an error in the first
            step if DDP then averages over another. Local steps: the default group if None. Not for FSDP2.
        local_world_size: the number of ranks on a node, for collective="hierarchical"; the environment
            variable LOCAL_WORLD_SIZE by default. DDP only.
        replicate_group: the ranks that hold the same shard, if the mesh has one dimension and the replicas
            are yours to average. Not with a mesh of two dimensions, which knows them. FSDP2 only.
        shard_spec: with replicas, how gradients travel in the reduce-scatter, in any form of a spec; "none"
            leaves it to FSDP. FSDP2 only.
        gather_spec: how parameters travel when FSDP gathers them: "none", or an unbiased codec such as
            "int8". Shards and optimizer stay exact. FSDP2 only.

    Raises:
        ConfigError: a value that cannot work; the message names it and what can.
    """

    feedback: bool | str = "auto"
    exact: ExactRule = ()
    seed: int = 0
    collective: str = "auto"
    residual_dtype: str = "fp32"
    grad_scaler: torch.amp.GradScaler | None = None
    timeout: Timeout = None
    group: dist.ProcessGroup | None = field(default=None, metadata=_only("DDP", "local steps"))
    local_world_size: int | None = field(default=None, metadata=_only("DDP"))
    replicate_group: dist.ProcessGroup | None = field(default=None, metadata=_only("FSDP2"))
    shard_spec: Asked = field(default="none", metadata=_only("FSDP2"))
    gather_spec: str | Codec | Spec = field(default="none", metadata=_only("FSDP2"))

    def __post_init__(self) -> None:
        check_feedback(self.feedback)
        if not callable(self.exact):
            object.__setattr__(self, "exact", exact_patterns(self.exact))
        if not isinstance(self.replicate_group, dist.ProcessGroup | None):
            raise ConfigError(
                f"replicate_group={self.replicate_group!r:.200}: it must be a process group or None"
            )
        object.__setattr__(self, "seed", self.config().seed)

    @classmethod
    def of(cls, trainer: str, options: Options | None, overrides: Mapping[str, Any]) -> Options:
        """The options of a call, checked.

        Args:
            trainer: the trainer that asks: "DDP", "FSDP2" or "local steps".
            options: the object that was given, if any.
            overrides: the keyword arguments that were given beside it.

        Raises:
            ConfigError: an unknown name, an option that this trainer does not have, or a value that cannot
                work.
        """
        if not isinstance(options, cls | None):
            raise ConfigError(
                f"options={options!r:.200}: it must be a gradq.Options, as gradq.Options(seed=1), or None"
            )
        known = {each.name: each for each in dataclasses.fields(cls)}
        for name in overrides:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1) + sorted(known.keys() & name.split("_"))
                hint = f"did you mean {close[0]}=?" if close else f"there are: {', '.join(known)}"
                if name in _SPEC_WORDS:
                    hint = f"how gradients travel is said by the spec, as in spec={_SPEC_WORDS[name]!r}"
                raise ConfigError(f"{name}= is not an option; {hint}")
        found = dataclasses.replace(options or cls(), **overrides)
        if any(trainer not in known[name].metadata.get("trainers", (trainer,)) for name in found.changed()):
            raise ConfigError(_REFUSALS[trainer])
        return found

    def changed(self) -> dict[str, Any]:
        """The fields that differ from the default."""
        values = {each.name: (getattr(self, each.name), each.default) for each in dataclasses.fields(self)}
        return {n: value for n, (value, default) in values.items() if value is not default != value}

    def config(self, local_world_size: int = 1) -> SyncConfig:
        """What averaging needs of the options.

        Args:
            local_world_size: the number of ranks on a node for "hierarchical", else 1.
        """
        return SyncConfig(
            seed=self.seed,
            collective=self.collective,
            local_world_size=local_world_size,
            residual_dtype=self.residual_dtype,
            timeout=as_timedelta(self.timeout),
            loss_scale=scale_of(self.grad_scaler),
        )

    def __repr__(self) -> str:
        return f"Options({', '.join(f'{name}={value!r}' for name, value in self.changed().items())})"


class OptionFields(TypedDict, total=False):
    """The fields of `Options` as keyword arguments, for completion and type checkers."""

    feedback: bool | str
    exact: ExactRule
    seed: int
    collective: str
    residual_dtype: str
    grad_scaler: torch.amp.GradScaler | None
    timeout: Timeout
    group: dist.ProcessGroup | None
    local_world_size: int | None
    replicate_group: dist.ProcessGroup | None
    shard_spec: Asked
    gather_spec: str | Codec | Spec


def asked_for(name: str, options: object, overrides: Mapping[str, Any]) -> Any:
    """One option as it was given, unchecked: who hears of a wrong one depends on the group."""
    return overrides.get(name, getattr(options, name, None))


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """What stays the same for a run.

    Attributes:
        seed: the seed of the random rounding, an integer of 64 bits.
        collective: "auto", "direct", "two_phase" or "hierarchical".
        local_world_size: the number of ranks on a node for "hierarchical", else 1.
        residual_dtype: "fp32" or "bf16".
        timeout: the limit for one exchange; None takes the process group's. See `as_timedelta`.
        loss_scale: a function that is asked for the loss scale at the start of every step.
        chunk_numel: the number of elements for each rank in a chunk of a bucket, on the CPU; see
            `gradq.sync.layout`.

    Raises:
        ConfigError: a seed, collective or dtype of the wrong kind.
    """

    seed: int = 0
    collective: str = "auto"
    local_world_size: int = 1
    residual_dtype: str = "fp32"
    timeout: timedelta | None = None
    loss_scale: Callable[[], float] = lambda: 1.0
    chunk_numel: int = 1 << 19

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", _as_seed(self.seed))
        if not isinstance(self.collective, str):
            raise ConfigError(
                f"collective={self.collective!r:.200}: it must be a name: 'auto', 'direct', 'two_phase', ..."
            )
        choose(self.collective, world_size=2)
        if not isinstance(self.residual_dtype, str) or self.residual_dtype not in RESIDUAL_DTYPES:
            known = ", ".join(RESIDUAL_DTYPES)
            raise ConfigError(f"residual_dtype={self.residual_dtype!r:.200}: choose from {known}")


def as_timedelta(timeout: Timeout) -> timedelta | None:
    """The limit for one exchange.

    Args:
        timeout: a timedelta, a number of seconds, or None for the process group's own.

    Raises:
        ConfigError: it is not positive, not finite, or something else.
    """
    if timeout is None:
        return None
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise ConfigError(f"timeout={timeout!r:.200}: it must be a number of seconds or a datetime.timedelta")
    if not 0 < seconds <= _LONGEST_S or not math.isfinite(seconds):
        raise ConfigError(
            f"timeout={timeout!r:.200}: it must be positive and finite, in seconds; None takes the process "
            "group's"
        )
    return timedelta(seconds=seconds)


def scale_of(grad_scaler: object) -> Callable[[], float]:
    """A function that asks a `torch.amp.GradScaler`, or None, by how much gradients are too large.

    The function raises ConfigError where the scale cannot be divided by.

    Raises:
        ConfigError: it is no GradScaler.
    """
    if grad_scaler is None:
        return lambda: 1.0
    get_scale = getattr(grad_scaler, "get_scale", None)
    if not callable(get_scale):
        raise ConfigError(
            f"grad_scaler={grad_scaler!r:.200}: it must be the torch.amp.GradScaler in use, or None, not a "
            f"{type(grad_scaler).__name__}"
        )

    def scale() -> float:
        value = float(get_scale())
        if not 0 < value < math.inf:
            raise ConfigError(
                f"the GradScaler's scale is {value}: gradients scaled by it are lost. It halves after every "
                "step that is not finite, so look for NaN or Inf in the loss"
            )
        return value

    return scale


def _as_seed(seed: object) -> int:
    """The seed as a Python integer, so that all ranks compare the same thing."""
    try:
        if isinstance(seed, bool):
            raise TypeError
        number = operator.index(seed)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):  # RuntimeError: a tensor of several elements
        raise ConfigError(f"seed={seed!r:.200}: it must be an integer, the same on all ranks") from None
    if not _SEEDS[0] <= number < _SEEDS[1]:
        raise ConfigError(f"seed={seed!r:.40}: it must have at most 64 bits, from -2**63 to 2**64 - 1")
    return number
