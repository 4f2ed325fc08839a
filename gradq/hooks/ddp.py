"""DistributedDataParallel: `compress` in one line, `HookState` and `hook` for frameworks that register hooks.

This module has no `from __future__ import annotations`: DDP compares the hook's annotations with real types.
"""

import contextlib
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from gradq import checkpoint
from gradq.codecs import Codec
from gradq.collectives import ranks_per_node
from gradq.errors import ConfigError, GradqError, MismatchError, UnsupportedError
from gradq.handshake import agree
from gradq.hooks._fsdp_torch import is_fully_sharded
from gradq.metrics import Event, Stats
from gradq.policy import ExactRule, FixedPolicy, MixedPolicy, ParameterInfo, Policy, Rules, Spec, roles
from gradq.sync import GradientSync
from gradq.sync_config import SyncConfig

__all__ = ["HookState", "compress", "hook"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class HookState:
    """The state of the hook of one model, and the handle that `compress` returns.

    Constructing it is a collective call: all ranks of the group compare their settings and make process
    groups. Use it with the torch-native form::

        state = gradq.HookState(model, "int4")
        model.register_comm_hook(state, gradq.hook)

    Args:
        module: the model, wrapped in DistributedDataParallel or not.
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
        group: the process group DDP averages over; DDP's own, or the default group.
        feedback: error feedback: "auto" (at 4 bits and below, top-k and low rank; not for unbiased rotated
            codecs, which learn better without), True or False. It keeps two fp32 copies of the compressed
            gradients. Top-k and low rank do not converge without it, so False is an error there.
        exact: names or shell patterns of parameters that travel exact besides those with fewer than 1024
            elements or one dimension; or a predicate over `ParameterInfo` that decides alone. See
            `FixedPolicy` for casts such as "bf16".
        seed: of the stochastic rounding. Same seed, same bytes.
        collective: "auto" (direct at two ranks, else two_phase; sparse for top-k), "direct", "two_phase" or
            "hierarchical" (exact inside a node, compressed between nodes; see
            `gradq.collectives.hierarchical`). Low rank averages its factors by it. A policy may choose for
            each parameter (`Assignment`).
        residual_dtype: "fp32", or "bf16" for half the memory at an unrecovered rounding of 2**-9.
        grad_scaler: a `torch.amp.GradScaler`: residuals are then kept in unscaled units.
        timeout: of an exchange; the group's by default.
        local_world_size: ranks a node, for collective="hierarchical"; LOCAL_WORLD_SIZE by default.

    Raises:
        ConfigError: an argument out of its range (SpecError for the spec).
        UnsupportedError: a model or process group that this version does not handle.
        MismatchError: ranks disagree; names the rank and the field.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: str | Codec | Spec | Policy | Rules = "int8",
        *,
        group: dist.ProcessGroup | None = None,
        feedback: bool | str = "auto",
        exact: ExactRule = (),
        seed: int = 0,
        collective: str = "auto",
        residual_dtype: str = "fp32",
        grad_scaler: torch.amp.GradScaler | None = None,
        timeout: timedelta | None = None,
        local_world_size: int | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise ConfigError('no process group: call torch.distributed.init_process_group("gloo") first')
        if group is None:
            group = module.process_group if isinstance(module, DistributedDataParallel) else dist.group.WORLD
        assert group is not None
        inner = module.module if isinstance(module, DistributedDataParallel) else module
        self._names = {p: name for name, p in inner.named_parameters() if p.requires_grad}
        self._feedback, self._exact = feedback, exact
        try:
            config = SyncConfig(
                seed=seed,
                collective=collective,
                local_world_size=_local_world_size(collective, local_world_size, group),
                residual_dtype=residual_dtype,
                timeout=timeout,
                loss_scale=(lambda: 1.0) if grad_scaler is None else grad_scaler.get_scale,
            )
            parameters = _describe(inner, self._names)
            self.spec, policy = self._policy(spec)
            device = _device(self._names)
            self.sync = GradientSync(parameters, policy, _label(self.spec), group, config, device)
        except MismatchError:
            raise
        except GradqError as error:  # the other ranks are waiting in the handshake: tell them
            with contextlib.suppress(MismatchError):
                agree({"error": str(error)}, group)
            raise

    def _policy(
        self, spec: str | Codec | Spec | Policy | Rules, feedback: bool | str | None = None
    ) -> tuple[Spec | Policy, Policy | None]:
        """What was asked for, and the policy it stands for."""
        feedback = self._feedback if feedback is None else feedback
        if isinstance(spec, Mapping):
            spec = MixedPolicy(rules=spec, exact=self._exact, feedback=feedback)
        if not isinstance(spec, str | Codec | Spec):
            return spec, spec
        parsed = Spec.parse(spec)
        if parsed.is_none:
            return parsed, None
        return parsed, FixedPolicy(spec=parsed, exact=self._exact, feedback=feedback)

    def average(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Average one DDP bucket; what `hook` calls.

        Raises:
            UnsupportedError: a gradient or a parameter that gradq cannot handle.
        """
        flat = bucket.buffer()
        if flat.is_sparse:
            raise UnsupportedError(
                "sparse gradients cannot be compressed; build nn.Embedding with sparse=False"
            )
        try:
            names = [self._names[parameter] for parameter in bucket.parameters()]
        except KeyError:
            raise UnsupportedError(
                "DDP averages a parameter that the module given to gradq.HookState does not have (or that "
                "did not require a gradient then); make the state from the same module"
            ) from None
        return self.sync.average(flat, names, index=bucket.index(), last=bucket.is_last())

    def set_spec(self, spec: str | Codec | Spec | Policy | Rules) -> None:
        """Use another spec from the next step on.

        All ranks call it between the same two steps. Residuals of parameters that no longer use feedback are
        dropped, and shard residuals where ranks own other pieces than before; the log says so.

        Raises:
            SpecError, ConfigError: the spec is wrong; MismatchError: the ranks disagree. The old one stays.
        """
        asked, policy = self._policy(spec)
        self.sync.set_policy(policy, _label(asked))
        self.spec = asked

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
        checkpoint.load_state_dict(self.sync, state)

    def close(self) -> None:
        """End gradq's threads and process groups. The model goes on with plain all-reduce. Idempotent."""
        self.sync.close()

    def __repr__(self) -> str:
        return f"<gradq {_label(self.spec)} over {self.sync.world_size} ranks, {self.stats()}>"


def _label(spec: Spec | Policy) -> str:
    """A name that is equal on all ranks; the `repr` of a policy may hold addresses."""
    return str(spec) if isinstance(spec, Spec) else getattr(spec, "label", type(spec).__name__)


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
        UnsupportedError: it was called with something else than DDP's bucket.
    """
    if not isinstance(bucket, GradBucket):
        raise UnsupportedError(
            f"the hook got a {type(bucket).__name__} instead of a DDP bucket: torch.compile's "
            'optimize_ddp="python_reducer" is not supported; leave optimize_ddp at its default'
        )
    return state.average(bucket)


def compress(
    model: nn.Module,
    spec: str | Codec | Spec | Policy | Rules = "int8",
    *,
    group: dist.ProcessGroup | None = None,
    feedback: bool | str = "auto",
    exact: ExactRule = (),
    seed: int = 0,
    collective: str = "auto",
    residual_dtype: str = "fp32",
    grad_scaler: torch.amp.GradScaler | None = None,
    timeout: timedelta | None = None,
    local_world_size: int | None = None,
    replicate_group: dist.ProcessGroup | None = None,
    shard_spec: str | Codec | Spec | Policy | Rules = "none",
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
        timeout: of an exchange.
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
        raise UnsupportedError(
            f"gradq.compress takes a DistributedDataParallel model or one with fully_shard applied (FSDP2), "
            f"got {type(model).__name__}; wrap it first: model = DistributedDataParallel(model)"
        )
    if replicate_group is not None or shard_spec != "none" or gather_spec != "none":
        raise ConfigError("replicate_group=, shard_spec= and gather_spec= are for FSDP2 models")
    if model.mixed_precision is not None:
        raise UnsupportedError(
            "DistributedDataParallel(mixed_precision=...) takes the model's only hook; use torch.autocast"
        )
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
    try:
        model.register_comm_hook(state, hook)
    except RuntimeError as error:
        state.close()
        raise UnsupportedError(f"the model already has a communication hook: {error}") from error
    return state


def _describe(module: nn.Module, names: dict[Tensor, str]) -> list[ParameterInfo]:
    """The parameters DDP will average.

    Raises:
        UnsupportedError: naming the parameter and what is wrong with it.
    """
    for path, child in module.named_modules():
        if isinstance(child, nn.Embedding | nn.EmbeddingBag) and child.sparse and child.weight.requires_grad:
            raise UnsupportedError(
                f"module {path!r} makes sparse gradients, which cannot be compressed; use sparse=False"
            )
    parameters, role = [], roles(module)
    for index, (parameter, name) in enumerate(names.items()):
        if parameter.dtype not in _DTYPES:
            raise UnsupportedError(
                f"parameter {name!r} is {parameter.dtype}; gradq averages fp32, bf16, fp16 and fp64 gradients"
            )
        if parameter.device.type not in ("cpu", "cuda"):
            raise UnsupportedError(
                f"parameter {name!r} is on {parameter.device}; gradq runs on CPU and CUDA tensors"
            )
        parameters.append(
            ParameterInfo(
                name=name,
                shape=tuple(parameter.shape),
                dtype=parameter.dtype,
                index=index,
                role=role.get(name, ""),
            )
        )
    if not parameters:
        raise UnsupportedError(
            "the model has no parameters that require gradients; there is nothing to average"
        )
    return parameters


def _device(names: dict[Tensor, str]) -> torch.device:
    """The device of all parameters.

    Raises:
        UnsupportedError: there are several, naming a parameter on each.
    """
    devices = {parameter.device: name for parameter, name in names.items()}
    if len(devices) > 1:
        found = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise UnsupportedError(
            f"the parameters of a model must be on one device of a rank, not {found}; give each rank its own"
        )
    return next(iter(devices))
