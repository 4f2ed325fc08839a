"""DistributedDataParallel: `compress` in one line, `HookState` and `hook` for frameworks that register hooks.

This module has no `from __future__ import annotations`: DDP compares the hook's annotations with real types.
"""

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from gradq import checkpoint
from gradq.codecs import Codec
from gradq.collectives import ranks_per_node
from gradq.errors import ConfigError, UnsupportedError
from gradq.hooks import averaged
from gradq.hooks._ddp_reducer import (
    Trainer,
    after_backward,
    hook_states,
    in_backward,
    unwrap_compiled,
    wrappers_of,
)
from gradq.hooks._fsdp_torch import is_fully_sharded
from gradq.hooks.copied import CopiedHandle
from gradq.metrics import Event, Stats
from gradq.options import SyncConfig, Timeout, as_timedelta, scale_of
from gradq.policy import Asked, ExactRule, ParameterInfo, Policy, Spec, label, resolve, sends_all_as_it_is
from gradq.sync.gradient_sync import GradientSync
from gradq.transport.handshake import meeting, telling

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["HookState", "compress", "hook"]

_log = logging.getLogger("gradq")


class HookState:
    """The state of the hook of one model, and the handle that `compress` returns.

    A copied or pickled state, such as that in `copy.deepcopy(model)`, is a `CopiedHandle`: it compresses
    nothing, and the copy of a model is averaged by DDP's own all-reduce.

    Constructing it is a collective call: all ranks of the group compare their settings and make process
    groups. Use it with the torch-native form::

        state = gradq.HookState(model, "int4")
        model.register_comm_hook(state, gradq.hook)

    Args:
        module: the model: DistributedDataParallel, which is best, or what it wraps. Compiled or not.
        spec: how gradients travel; a string, a codec, a `Spec`, a mapping of rules such as {"wte*": "int8",
            "*": "int4"} (see `MixedPolicy`), or a policy object such as `BitAllocation`. The strings:
            "none": DDP's own all-reduce, counted.
            "fp32", "bf16", "fp16": a cast, of everything.
            "int8" ... "int2", "rot4", "nf4", "sign" or any of `gradq.codecs.names()`: quantized. "int4" sends
            gradients in 4 bits and their means in more, by the number of ranks; "int4+int4" names the codec
            of both.
            "topk": the 1 % of largest magnitude in each block; "topk(percent=0.1)" fewer. Always with error
            feedback. Up to 4 ranks everyone sends to everyone; beyond, owners average and send on the largest
            2 % of the means (see `gradq.collectives.sparse`).
            "powersgd:4": matrices as a product of rank 4, one average a step, always with error feedback (see
            `gradq.collectives.low_rank`); all else exact. "powersgd:4+int8" sends what is left in that codec.
        group: the process group DDP averages over; found out where it is not given, from module or from the
            DDP model around it. If there is none yet, the default group, and an error in the first step if
            DDP then averages over another.
        feedback: error feedback: "auto" (at 4 bits and below, top-k and low rank; not for unbiased rotated
            codecs, which learn better without), True or False. It keeps two fp32 copies of the compressed
            gradients. Top-k and low rank do not converge without it, so False is an error there.
        exact: names or shell patterns of parameters that travel exact besides those with fewer than 1024
            elements or one dimension; or a predicate over `ParameterInfo` that decides alone. See
            `FixedPolicy` for casts such as "bf16".
        seed: of the stochastic rounding, an integer of 64 bits. Same seed, same bytes.
        collective: "auto" (direct at two ranks, and at any number where all that a rank sends is at most
            64 KiB; else two_phase; sparse for top-k), "direct", "two_phase" or "hierarchical" (exact inside a
            node, compressed between nodes; see `gradq.collectives.hierarchical`). Low rank averages its
            factors by it. A policy may choose for each parameter (`Assignment`).
        residual_dtype: "fp32", or "bf16" for half the memory at an unrecovered rounding of 2**-9.
        grad_scaler: a `torch.amp.GradScaler`: residuals are then kept in unscaled units.
        timeout: limit for one exchange, in seconds or as a timedelta; the group's by default.
        local_world_size: ranks a node, for collective="hierarchical"; LOCAL_WORLD_SIZE by default.

    Raises:
        ConfigError: an argument out of its range (SpecError for the spec).
        UnsupportedError: a model or process group that this version does not handle.
        MismatchError: ranks disagree; names the rank and the field.
    """

    _unsupported: UnsupportedError | None = None
    _closed = False
    _successor: "HookState | None" = None

    def __init__(
        self,
        module: nn.Module,
        spec: Asked = "int8",
        *,
        group: dist.ProcessGroup | None = None,
        feedback: bool | str = "auto",
        exact: ExactRule = (),
        seed: int = 0,
        collective: str = "auto",
        residual_dtype: str = "fp32",
        grad_scaler: torch.amp.GradScaler | None = None,
        timeout: Timeout = None,
        local_world_size: int | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise UnsupportedError(f"gradq.HookState takes the model, got {_kind(module)}")
        module = unwrap_compiled(module)
        with telling(module.process_group if isinstance(module, DistributedDataParallel) else None):
            group = None if group is None else averaged.check_group(group)
            default = averaged.check_group(dist.group.WORLD)
            wrapper = averaged.find_wrapper(module, group)
        self._trainer = None if wrapper is None else Trainer(wrapper)
        self._owed = False  # whether it is still to be seen what DDP threw away
        self._must_confirm, self._group_was_given = wrapper is None, group is not None
        group = group or (default if wrapper is None else averaged.check_group(wrapper.process_group))
        inner = module.module if isinstance(module, DistributedDataParallel) else module
        self._feedback, self._exact = feedback, exact
        with meeting(group):
            config = SyncConfig(
                seed=seed,
                collective=collective,
                local_world_size=_local_world_size(collective, local_world_size, group),
                residual_dtype=residual_dtype,
                timeout=as_timedelta(timeout),
                loss_scale=scale_of(grad_scaler),
            )
            self._names = averaged.averaged_names(inner, wrapper)
            self._unsupported = averaged.unsupported(inner, self._names)
            parameters = averaged.describe(inner, self._names)
            self.spec, policy = self._policy(spec)
            policy, message = self._useful(self.spec, policy, parameters, group.size())
            device = averaged.device_of(self._names)
        self.sync = GradientSync(parameters, policy, label(self.spec), group, config, device)
        weakref.finalize(module, self.sync.release)
        self._say(message)

    def _policy(self, spec: Asked, feedback: bool | str | None = None) -> tuple[Spec | Policy, Policy | None]:
        """What was asked for, and the policy it stands for.

        Raises:
            SpecError, ConfigError: see `policy.resolve`; UnsupportedError: they cannot be compressed.
        """
        feedback = self._feedback if feedback is None else feedback
        asked, policy = resolve(spec, exact=self._exact, feedback=feedback)
        if policy is not None and self._unsupported is not None:
            raise self._unsupported
        return asked, policy

    def _useful(
        self, asked: Spec | Policy, policy: Policy | None, parameters: Sequence[ParameterInfo], size: int
    ) -> tuple[Policy | None, str]:
        """The policy, None where a plain all-reduce does as well; what to say if nothing is compressed."""
        if policy is None or size == 1 or not sends_all_as_it_is(policy, parameters, size):
            return policy, ""
        plain = all(p.dtype in (torch.float32, torch.float64) for p in parameters)  # summed as precisely
        how = "a plain all-reduce averages them" if plain else "they are averaged exactly"
        why = "all are small, have one dimension or are named by exact="
        message = f"{label(asked)} compresses none of the {len(parameters)} parameters ({why}): {how}"
        return None if plain else policy, message

    def average(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Average one DDP bucket; what `hook` calls.

        Raises:
            UnsupportedError: a gradient or a parameter that gradq cannot handle.
        """
        if self._successor is not None:
            return self._successor.average(bucket)
        flat, parameters = bucket.buffer(), bucket.parameters()
        if self._must_confirm:
            self._check_parameters(parameters)
            averaged.confirm_group(parameters[0], self.sync.group, asked=self._group_was_given)
            self._must_confirm = False
            if self._trainer is None and (found := wrappers_of(parameters[0])):
                self._trainer = Trainer(found[-1])
        if self._trainer is not None:
            self._trainer.check_join()
            self._watch(self._trainer, bucket)
        if not self.sync.plan:
            return self.sync.average(flat, [], index=bucket.index(), last=bucket.is_last())
        if flat.is_sparse:
            raise UnsupportedError(
                "sparse gradients cannot be compressed; build nn.Embedding with sparse=False, or use the "
                'spec "none"'
            )
        self._check_parameters(parameters)
        names = [self._names[parameter] for parameter in parameters]
        return self.sync.average(flat, names, index=bucket.index(), last=bucket.is_last())

    def _watch(self, trainer: Trainer, bucket: GradBucket) -> None:
        """See to it that residuals stay where DDP throws the mean away."""
        if in_backward():
            if bucket.is_last() and self.sync.has_feedback and trainer.leaves_out:
                after_backward(self._keep_unused)
            return
        if bucket.index() == 0 and self._owed:  # this rank has joined: there is no backward to wait for
            self._keep_unused()
        self._owed = bucket.is_last() and self.sync.has_feedback and trainer.leaves_out

    def _keep_unused(self) -> None:
        self._owed = False
        if self._trainer is not None:
            unused = self._trainer.unused(self._names)
            self.sync.not_applied(dict(zip(self._names.values(), unused, strict=True)))

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

    def _check_parameters(self, parameters: Sequence[torch.Tensor]) -> None:
        if not all(parameter in self._names for parameter in parameters):
            raise UnsupportedError(
                "DDP averages a parameter that the module given to gradq.HookState does not have (or that "
                "did not require a gradient then); make the state from the same module, after "
                "DistributedDataParallel"
            )

    def set_spec(self, spec: Asked) -> None:
        """Use another spec from the next step on.

        All ranks call it between the same two steps. Residuals of parameters that no longer use feedback are
        dropped, and shard residuals where ranks own other pieces than before; the log says so.

        Raises:
            SpecError, ConfigError: the spec is wrong, or the handle is closed; MismatchError: the ranks
                disagree. The old one stays.
        """
        self._check_open("set_spec")
        with meeting(self.sync.group, "change its spec"):
            asked, policy = self._policy(spec)
            infos = list(self.sync.parameters.values())
            policy, message = self._useful(asked, policy, infos, self.sync.world_size)
        self.sync.set_policy(policy, label(asked))
        self.spec = asked
        self._say(message)

    def _say(self, message: str) -> None:
        """One warning for all ranks, if there is one."""
        if message and self.sync.rank == 0:
            _log.warning(message)

    def _check_open(self, what: str) -> None:
        """Raise if the handle is closed."""
        if self._closed:
            raise ConfigError(
                f"{what}: this handle is closed, and its model is averaged by a plain all-reduce; call "
                "gradq.compress on the model again"
            )

    @property
    def failure(self) -> BaseException | None:
        """What stopped the averaging, None while it works.

        The training loop gets it from `backward()` as a RuntimeError whose text has its type and message:
        DDP passes errors through C++, which keeps nothing else. This is the original, with its cause.
        """
        return self.sync.failure

    def stats(self, *, parameters: bool = False) -> Stats:
        """Totals of this rank since the start.

        Args:
            parameters: fill `Stats.parameters` too.
        """
        return self.sync.stats(parameters)

    def sample_nmse(self) -> None:
        """Measure the error of phase 1 in the next step; `stats` then shows it. Costs one more decode."""
        self.sync.sample_next = True

    def add_sink(self, sink: Callable[[Event], None]) -> None:
        """Call sink(event) for every measurement, from the thread that made it; it must be quick."""
        self.sync.metrics.add_sink(sink)

    def state_dict(self) -> dict[str, Any]:
        """Step and residuals, for torch.distributed.checkpoint on all ranks; see `gradq.checkpoint`.

        It has this rank's residuals only, and `torch.save` refuses it: see `gathered_state_dict`.
        """
        self._check_open("state_dict")
        return checkpoint.state_dict(self.sync)

    def gathered_state_dict(self) -> dict[str, Any]:
        """Step and all ranks' residuals on rank 0, for `torch.save` there. Collective.

        Returns:
            On rank 0 of the group a plain dictionary of CPU tensors, which `load_state_dict` takes on every
            rank, of any number of ranks; on all others an empty one. Rank 0 holds W times the residuals.
        """
        return checkpoint.gather_rows(self.state_dict(), self.sync)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; see `gradq.checkpoint.load_state_dict`. Collective."""
        self._check_open("load_state_dict")
        checkpoint.load_state_dict(self.sync, state)

    def close(self) -> None:
        """End gradq's threads and connections. The model goes on with plain all-reduce. Idempotent.

        It also happens when the model is deleted, or at the end of a `with` block.
        """
        self._closed = True
        self.sync.close()

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def replace_by(self, successor: "HookState") -> None:
        """Hand this closed state's place in its model to another one; DDP keeps a hook for ever."""
        self._successor = successor

    def __reduce__(self) -> tuple[type[CopiedHandle], tuple[str]]:
        """A copy or a pickle is a `CopiedHandle`: threads and process groups stay where they are."""
        return CopiedHandle, (label(self.spec),)

    def __repr__(self) -> str:
        return f"<gradq {label(self.spec)} over {self.sync.world_size} ranks, {self.stats()}>"


def _local_world_size(collective: str, asked: int | None, group: dist.ProcessGroup) -> int:
    """Ranks a node if that matters, else 1."""
    if collective == "hierarchical":
        return ranks_per_node(asked, group.rank(), group.size())
    if asked is not None:
        raise ConfigError('local_world_size= is for collective="hierarchical"')
    return 1


def hook(state: HookState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The communication hook: `model.register_comm_hook(gradq.HookState(model, "int4"), gradq.hook)`.

    Raises:
        UnsupportedError: it was called with something else than a state and DDP's bucket. ConfigError: the
            state is that of a copied model.
    """
    if not isinstance(state, HookState | CopiedHandle):
        raise UnsupportedError(
            f"gradq.hook got a {type(state).__name__} instead of its state; register it as "
            'model.register_comm_hook(gradq.HookState(model, "int4"), gradq.hook)'
        )
    if not isinstance(bucket, GradBucket):
        raise UnsupportedError(
            f"the hook got a {type(bucket).__name__} instead of a DDP bucket: torch.compile's "
            'optimize_ddp="python_reducer" is not supported; leave optimize_ddp at its default'
        )
    return state.average(bucket)


def compress(
    model: nn.Module,
    spec: Asked = "int8",
    *,
    group: dist.ProcessGroup | None = None,
    feedback: bool | str = "auto",
    exact: ExactRule = (),
    seed: int = 0,
    collective: str = "auto",
    residual_dtype: str = "fp32",
    grad_scaler: torch.amp.GradScaler | None = None,
    timeout: Timeout = None,
    local_world_size: int | None = None,
    replicate_group: dist.ProcessGroup | None = None,
    shard_spec: Asked = "none",
    gather_spec: str | Codec | Spec = "none",
) -> HookState:
    """Compress the gradients of a model before they are averaged: DistributedDataParallel or FSDP2.

    All ranks call it with the same arguments, once, after wrapping the model and before the first step.

    Args:
        model: a DistributedDataParallel model on CPU tensors over Gloo or MPI, or on CUDA over NCCL (or
            over Gloo, through host memory); or one that `fully_shard` was applied to (FSDP2, HSDP; see
            `gradq.hooks.fsdp`).
        spec: see `HookState`, like all that follow.
        group: process group; the model's own by default.
        feedback: "auto", True or False.
        exact: what travels exact besides small and one-dimensional parameters.
        seed: of the stochastic rounding.
        collective: "auto", "direct", "two_phase" or "hierarchical".
        residual_dtype: "fp32" or "bf16".
        grad_scaler: the GradScaler in use, if any.
        timeout: limit for one exchange, in seconds or as a timedelta.
        local_world_size: ranks a node, for "hierarchical".
        replicate_group: FSDP2 on a mesh of one dimension: the ranks that hold the same shard.
        shard_spec: FSDP2 with replicas: how gradients travel in the reduce-scatter.
        gather_spec: FSDP2: how parameters travel when they are gathered.

    Returns:
        The handle: `stats`, `set_spec`, `state_dict`, `load_state_dict`, `close`.

    Raises:
        UnsupportedError: not a DDP or FSDP2 model, its hook is taken, or see `HookState`.
        ConfigError, MismatchError: see `HookState`.

    Example:
        >>> model = DistributedDataParallel(model)          # doctest: +SKIP
        >>> handle = gradq.compress(model, "int4")          # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"gradq.compress takes the model, got {_kind(model)}{_WRAP_FIRST}")
    model = unwrap_compiled(model)
    if is_fully_sharded(model):
        from gradq.hooks.fsdp import ShardedHookState  # it builds on this module

        if group is not None or local_world_size is not None:
            raise ConfigError(
                "group= and local_world_size= are for DistributedDataParallel; FSDP2 knows its mesh"
            )
        return ShardedHookState(
            model,
            spec,
            feedback=feedback,
            exact=exact,
            seed=seed,
            collective=collective,
            residual_dtype=residual_dtype,
            grad_scaler=grad_scaler,
            timeout=timeout,
            replicate_group=replicate_group,
            shard_spec=shard_spec,
            gather_spec=gather_spec,
        )
    if not isinstance(model, DistributedDataParallel):
        raise UnsupportedError(_not_ddp(model))
    with telling(model.process_group):
        if replicate_group is not None or shard_spec != "none" or gather_spec != "none":
            raise ConfigError("replicate_group=, shard_spec= and gather_spec= are for FSDP2 models")
        closed = _closed_states(model)
    state = HookState(
        model,
        spec,
        group=group,
        feedback=feedback,
        exact=exact,
        seed=seed,
        collective=collective,
        residual_dtype=residual_dtype,
        grad_scaler=grad_scaler,
        timeout=timeout,
        local_world_size=local_world_size,
    )
    if closed:
        closed[-1].replace_by(state)
        return state
    try:
        model.register_comm_hook(state, hook)
    except RuntimeError as error:
        state.close()
        raise UnsupportedError(f"the model already has a communication hook: {error}") from error
    return state


def _closed_states(model: DistributedDataParallel) -> list[HookState]:
    """The model's states that were closed, if it may have another one.

    Raises:
        UnsupportedError: it may not.
    """
    if model.mixed_precision is not None:
        raise UnsupportedError(
            "DistributedDataParallel(mixed_precision=...) takes the model's only hook; use torch.autocast"
        )
    states = [state for state in hook_states(model) if isinstance(state, HookState)]
    for old in states:
        if not old.closed:
            raise UnsupportedError(
                f"the model already has a communication hook: gradq's, {label(old.spec)}. To change what "
                'it does, call handle.set_spec("int8"); to make another one, call handle.close() first'
            )
    return states


_WRAP_FIRST = "; wrap it first: model = DistributedDataParallel(model)"


def _kind(thing: object) -> str:
    """What something is, for a message."""
    return (
        f"the class {thing.__name__}" if isinstance(thing, type) else f"an object of {type(thing).__name__}"
    )


def _not_ddp(model: nn.Module) -> str:
    """What to say to a module that is neither wrapped nor sharded."""
    says = (
        "gradq.compress takes a DistributedDataParallel model or one with fully_shard applied (FSDP2), got "
        f"{type(model).__name__}"
    )
    inside = [path for path, child in model.named_modules() if isinstance(child, DistributedDataParallel)]
    if inside:
        return f"{says}; the DistributedDataParallel model is its {inside[0]!r}: pass that"
    return says + _WRAP_FIRST
