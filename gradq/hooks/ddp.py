"""DistributedDataParallel: `compress` in one line, `HookState` and `hook` for frameworks that register hooks.

This module has no `from __future__ import annotations`: DDP compares the hook's annotations with real types.
"""

import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from gradq import checkpoint
from gradq.codecs import Codec
from gradq.errors import ConfigError, GradqError, MismatchError, UnsupportedError
from gradq.handshake import agree
from gradq.metrics import Event, Stats
from gradq.policy import ExactRule, FixedPolicy, ParameterInfo, Policy, Spec
from gradq.sync import GradientSync, SyncConfig

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
        spec: how gradients travel; a string, a codec, a `Spec`, or a policy object. The strings:
            "none": DDP's own all-reduce, counted.
            "fp32", "bf16", "fp16": a cast, of everything.
            "int8" ... "int2", "rot4", "nf4", "sign" or any of `gradq.codecs.names()`: quantized. "int4" sends
            gradients in 4 bits and their means in 8; "int4+int4" names the codec of both.
            "topk": the 1 % of largest magnitude in each block; "topk(percent=0.1)" fewer. Always with error
            feedback. Up to 4 ranks everyone sends to everyone; beyond, owners average and send on the largest
            2 % of the means (see `gradq.collectives.sparse`).
            "powersgd:4": matrices as a product of rank 4, one average a step, always with error feedback (see
            `gradq.collectives.low_rank`); all else exact. "powersgd:4+int8" sends what is left in that codec.
        group: the process group DDP averages over; DDP's own, or the default group.
        feedback: error feedback: "auto" (at 4 bits and below, top-k and low rank), True or False. It keeps
            two fp32 copies of the compressed gradients. Top-k and low rank do not converge without it, so
            False is an error there.
        exact: names or shell patterns of parameters that travel exact besides those with fewer than 1024
            elements or one dimension; or a predicate over `ParameterInfo` that decides alone. See
            `FixedPolicy` for casts such as "bf16".
        seed: of the stochastic rounding. Same seed, same bytes.
        collective: "auto" (direct at two ranks, else two_phase; sparse for top-k), "direct" or "two_phase".
            Low rank averages its factors by it. A policy may choose for each parameter (`Assignment`).
        residual_dtype: "fp32", or "bf16" for half the memory at an unrecovered rounding of 2**-9.
        grad_scaler: a `torch.amp.GradScaler`: residuals are then kept in unscaled units.
        timeout: of an exchange; the group's by default.

    Raises:
        ConfigError: an argument out of its range (SpecError for the spec).
        UnsupportedError: a model or process group that this version does not handle.
        MismatchError: ranks disagree; names the rank and the field.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: str | Codec | Spec | Policy = "int8",
        *,
        group: dist.ProcessGroup | None = None,
        feedback: bool | str = "auto",
        exact: ExactRule = (),
        seed: int = 0,
        collective: str = "auto",
        residual_dtype: str = "fp32",
        grad_scaler: torch.amp.GradScaler | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise ConfigError('no process group: call torch.distributed.init_process_group("gloo") first')
        if group is None:
            group = module.process_group if isinstance(module, DistributedDataParallel) else dist.group.WORLD
        assert group is not None
        inner = module.module if isinstance(module, DistributedDataParallel) else module
        self._names = {p: name for name, p in inner.named_parameters() if p.requires_grad}
        self._feedback, self._exact = feedback, exact
        config = SyncConfig(
            seed=seed,
            collective=collective,
            residual_dtype=residual_dtype,
            timeout=timeout,
            loss_scale=(lambda: 1.0) if grad_scaler is None else grad_scaler.get_scale,
        )
        try:
            parameters = _describe(inner, self._names)
            self.spec, policy = self._policy(spec)
            self.sync = GradientSync(parameters, policy, _label(self.spec), group, config)
        except MismatchError:
            raise
        except GradqError as error:  # the other ranks are waiting in the handshake: tell them
            with contextlib.suppress(MismatchError):
                agree({"error": str(error)}, group)
            raise

    def _policy(self, spec: str | Codec | Spec | Policy) -> tuple[Spec | Policy, Policy | None]:
        """What was asked for, and the policy it stands for."""
        if not isinstance(spec, str | Codec | Spec):
            return spec, spec
        parsed = Spec.parse(spec)
        if parsed.is_none:
            return parsed, None
        return parsed, FixedPolicy(spec=parsed, exact=self._exact, feedback=self._feedback)

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

    def set_spec(self, spec: str | Codec | Spec | Policy) -> None:
        """Use another spec from the next step on.

        All ranks call it between the same two steps. Residuals of parameters that no longer use feedback are
        dropped, and so are shard residuals; the log says so.

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
        """Step and residuals, for torch.distributed.checkpoint; see `gradq.checkpoint`. Collective."""
        return checkpoint.state_dict(self.sync)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; see `gradq.checkpoint.load_state_dict`."""
        checkpoint.load_state_dict(self.sync, state)

    def close(self) -> None:
        """End gradq's threads and process groups. The model goes on with plain all-reduce. Idempotent."""
        self.sync.close()

    def __repr__(self) -> str:
        return f"<gradq {_label(self.spec)} over {self.sync.world_size} ranks, {self.stats()}>"


def _label(spec: Spec | Policy) -> str:
    """A name that is equal on all ranks; the `repr` of a policy may hold addresses."""
    return str(spec) if isinstance(spec, Spec) else type(spec).__name__


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
    spec: str | Codec | Spec | Policy = "int8",
    *,
    group: dist.ProcessGroup | None = None,
    feedback: bool | str = "auto",
    exact: ExactRule = (),
    seed: int = 0,
    collective: str = "auto",
    residual_dtype: str = "fp32",
    grad_scaler: torch.amp.GradScaler | None = None,
    timeout: timedelta | None = None,
) -> HookState:
    """Compress the gradients of a DistributedDataParallel model before they are averaged.

    All ranks call it with the same arguments, once, after wrapping the model and before the first step.

    Args:
        model: a DistributedDataParallel model on CPU tensors over Gloo.
        spec: see `HookState`, like all that follow.
        group: process group; the model's own by default.
        feedback: "auto", True or False.
        exact: what travels exact besides small and one-dimensional parameters.
        seed: of the stochastic rounding.
        collective: "auto", "direct" or "two_phase".
        residual_dtype: "fp32" or "bf16".
        grad_scaler: the GradScaler in use, if any.
        timeout: of an exchange.

    Returns:
        The handle: `stats`, `set_spec`, `state_dict`, `load_state_dict`, `close`.

    Raises:
        UnsupportedError: not a DDP model, its hook is taken, or see `HookState`.
        ConfigError, MismatchError: see `HookState`.

    Example:
        >>> model = DistributedDataParallel(model)          # doctest: +SKIP
        >>> handle = gradq.compress(model, "int4")          # doctest: +SKIP
    """
    if not isinstance(model, DistributedDataParallel):
        raise UnsupportedError(
            f"gradq.compress takes a DistributedDataParallel model, got {type(model).__name__}; "
            "wrap it first: model = DistributedDataParallel(model)"
        )
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
    parameters = []
    for index, (parameter, name) in enumerate(names.items()):
        if parameter.dtype not in _DTYPES:
            raise UnsupportedError(
                f"parameter {name!r} is {parameter.dtype}; gradq averages fp32, bf16, fp16 and fp64 gradients"
            )
        if parameter.device.type != "cpu":
            raise UnsupportedError(
                f"parameter {name!r} is on {parameter.device}; this version of gradq runs on CPU tensors"
            )
        parameters.append(
            ParameterInfo(name=name, shape=tuple(parameter.shape), dtype=parameter.dtype, index=index)
        )
    if not parameters:
        raise UnsupportedError(
            "the model has no parameters that require gradients; there is nothing to average"
        )
    return parameters
