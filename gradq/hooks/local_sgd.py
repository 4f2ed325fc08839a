"""Local steps: ranks train alone for some steps, then average how far each has come.

Every rank takes `every` steps of its inner optimizer on its own data. Then the *pseudo-gradient* (where the
ranks started minus where this one is now) is averaged, compressed like any gradient, and an outer step moves
the common starting point: to the mean of the ranks (`LocalSGD`), or by Nesterov SGD (`DiLoCo`).

Streaming: the parameters are cut into fragments, and each is averaged at its own step of the cycle, so what
is sent at once falls by their number. With a delay, a fragment's exchange runs while the next inner steps are
taken, and is applied when they are done; what the rank learned meanwhile stays on top of the outer step.

The inner optimizer's state stays each rank's own, and so do buffers such as BatchNorm's statistics.

References:
    Stich, "Local SGD converges fast and communicates little", ICLR 2019.
    Douillard et al., "DiLoCo: Distributed low-communication training of language models", 2023.
    Douillard et al., "Streaming DiLoCo with overlapping communication", 2025 (fragments and delay; it mixes
    old and new parameters half and half where we add the steps taken meanwhile).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gradq import wire
from gradq.codecs import Codec
from gradq.errors import ConfigError, GradqError, MismatchError, UnsupportedError
from gradq.handshake import agree
from gradq.hooks import local_checkpoint
from gradq.metrics import Event, Stats
from gradq.policy import AdaptivePolicy, ExactRule, FixedPolicy, ParameterInfo, Policy, Spec
from gradq.sync import GradientSync
from gradq.sync_config import SyncConfig, Timeout, as_timedelta

__all__ = ["Bucket", "DiLoCo", "Fragment", "LocalSGD", "cut"]

_WORK_DTYPES = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}


@dataclass
class Bucket:
    """Parameters of one work dtype in one fragment.

    Attributes:
        index: among all buckets.
        parameters: by name.
        anchor: where the ranks started from, flat [n], on the CPU; equal on all ranks.
        momentum: of the outer step, flat [n]; None without.
    """

    index: int
    parameters: dict[str, Tensor]
    anchor: Tensor
    momentum: Tensor | None

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of flat [n] that belong to each parameter, in its shape."""
        parts = torch.split(flat, [parameter.numel() for parameter in self.parameters.values()])
        return {
            name: part.view(parameter.shape)
            for (name, parameter), part in zip(self.parameters.items(), parts, strict=True)
        }

    def read(self, flat: Tensor) -> None:
        """Copy the parameters into flat [n]."""
        for name, view in self.views(flat).items():
            view.copy_(self.parameters[name])

    def write(self, flat: Tensor) -> None:
        """Copy flat [n] into the parameters."""
        for name, view in self.views(flat).items():
            self.parameters[name].copy_(view)


@dataclass
class Fragment:
    """What is averaged together.

    Attributes:
        offset: averaged at the steps that equal this modulo `every`.
        buckets: one a work dtype.
    """

    offset: int
    buckets: list[Bucket]


@dataclass
class _Pending:
    """An average under way.

    Attributes:
        fragment: its index.
        due: the inner step at which to apply it.
        means: pseudo-gradients, flat, a bucket each; their means when the futures are done.
        sent: the parameters as they were when it started, a bucket each; empty without a delay.
        futures: to wait for.
    """

    fragment: int
    due: int
    means: list[Tensor]
    sent: list[Tensor]
    futures: list[Future[Tensor]] = field(default_factory=list)


def cut(numels: Sequence[int], count: int) -> list[int]:
    """Which of count fragments each parameter belongs to: in order, about equally many elements each.

    Raises:
        ConfigError: there are fewer parameters than fragments.
    """
    if count > len(numels):
        raise ConfigError(f"fragments={count}: the model has only {len(numels)} parameters to share out")
    owners: list[int] = []
    total, done = max(sum(numels), 1), 0
    for index, numel in enumerate(numels):
        middle = int((done + numel / 2) / total * count)
        least = max(count - (len(numels) - index), 0)  # leave a parameter for each fragment to come
        most = owners[-1] + 1 if owners else 0  # and none out
        owners.append(min(max(middle, least), most, count - 1))
        done += numel
    return owners


class LocalSGD:
    """Train locally, and replace the parameters by their mean over ranks every so many steps.

    All ranks construct it together; rank 0's parameters and buffers are given to all. Afterwards the training
    loop stays as it is: averaging happens inside the inner optimizer's `step`::

          optimizer = torch.optim.AdamW(model.parameters())
        + local = gradq.LocalSGD(model, optimizer, "int4", every=8)
          for batch in batches: ...

    Memory, in fp32 elements for each parameter, on the CPU wherever the model is: 1 for the common starting
    point, 1 for the pseudo-gradient, 1 with a delay, 2 with error feedback. On models outside the CPU it was
    not run.

    Args:
        model: a plain module, the same on all ranks; not wrapped in DistributedDataParallel.
        inner_optimizer: what the training loop steps; its step counts. None: call `step` yourself after every
            step, for instance because several optimizers step together, or because a GradScaler skips steps
            on some ranks only.
        spec: how pseudo-gradients travel; see `gradq.HookState`.
        every: inner steps between two averages of a parameter.
        fragments: cut the model into this many parts, averaged one after another, `every / fragments` steps
            apart.
        delay: inner steps that an average may take, at most `every // fragments`; 0 waits for it on the spot.
        group: the ranks; the default group if None.
        feedback: error feedback: "auto" (at 4 bits and below), True or False.
        exact: what travels exact besides small and one-dimensional parameters; see `gradq.HookState`.
        seed: of the stochastic rounding.
        collective: "auto", "direct" or "two_phase".
        residual_dtype: "fp32" or "bf16".
        timeout: of an exchange: how long the fastest rank waits for the slowest. The group's by default.

    Raises:
        ConfigError: an argument out of its range (SpecError for the spec).
        UnsupportedError: a DistributedDataParallel or FSDP model, or another that cannot be averaged.
        MismatchError: ranks disagree; names the rank and the field.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_optimizer: Optimizer | None,
        spec: str | Codec | Spec | Policy = "int8",
        *,
        every: int,
        fragments: int = 1,
        delay: int = 0,
        group: dist.ProcessGroup | None = None,
        feedback: bool | str = "auto",
        exact: ExactRule = (),
        seed: int = 0,
        collective: str = "auto",
        residual_dtype: str = "fp32",
        timeout: Timeout = None,
    ) -> None:
        if not dist.is_initialized():
            raise ConfigError('no process group: call torch.distributed.init_process_group("gloo") first')
        group = group if group is not None else dist.group.WORLD
        assert group is not None
        self.model, self.inner_optimizer = model, inner_optimizer
        self.every, self.delay = every, delay
        self.inner_step = self._steps_here = 0
        self.pending: _Pending | None = None
        config = SyncConfig(
            seed=seed, collective=collective, residual_dtype=residual_dtype, timeout=as_timedelta(timeout)
        )
        try:
            _check_schedule(every, fragments, delay)
            parameters = _trainable(model)
            _check_optimizer(inner_optimizer)
            self.fragments = self._cut(parameters, fragments)
            policy, label = _policy(spec, feedback, exact)
            agree({"local steps": self._settings(fragments)}, group)
            self.sync = GradientSync(_describe(parameters), policy, label, group, config)
        except MismatchError:
            raise
        except GradqError as error:  # the other ranks are waiting in the handshake: tell them
            with contextlib.suppress(MismatchError):
                agree({"error": str(error)}, group)
            raise
        self._dense_bytes = wire.ring_bytes(
            sum(parameter.nbytes for parameter in parameters.values()), self.sync.world_size
        )
        self._start_together()
        self._remove_hook: Callable[[], None] = lambda: None
        if inner_optimizer is not None:
            self._remove_hook = inner_optimizer.register_step_post_hook(lambda *_: self.step()).remove

    def _settings(self, fragments: int) -> str:
        """What all ranks must have in common, besides what `GradientSync` compares."""
        return f"{type(self).__name__}, every={self.every}, fragments={fragments}, delay={self.delay}"

    def _outer_step(self, anchor: Tensor, mean: Tensor, momentum: Tensor | None) -> None:
        """Move the common starting point; mean is scratch afterwards."""
        anchor.sub_(mean)

    def _has_momentum(self) -> bool:
        return False

    def _cut(self, parameters: dict[str, Tensor], count: int) -> list[Fragment]:
        owners = cut([parameter.numel() for parameter in parameters.values()], count)
        fragments, index = [], 0
        for fragment in range(count):
            mine = [item for item, owner in zip(parameters.items(), owners, strict=True) if owner == fragment]
            buckets = []
            for dtype in (torch.float32, torch.float64):
                members = {name: p for name, p in mine if _WORK_DTYPES[p.dtype] == dtype}
                if members:
                    anchor = torch.zeros(sum(p.numel() for p in members.values()), dtype=dtype)
                    momentum = torch.zeros_like(anchor) if self._has_momentum() else None
                    buckets.append(Bucket(index, members, anchor, momentum))
                    index += 1
            fragments.append(Fragment((fragment + 1) * self.every // count % self.every, buckets))
        return fragments

    @torch.no_grad()
    def _start_together(self) -> None:
        """Give rank 0's parameters and buffers to all."""
        group = self.sync.group
        root = dist.get_global_rank(group, 0)
        for bucket in self.buckets():
            bucket.read(bucket.anchor)
            dist.broadcast(bucket.anchor, root, group=group)
            bucket.write(bucket.anchor)
        for buffer in self.model.buffers():
            on_cpu = buffer.detach().cpu().contiguous()
            dist.broadcast(on_cpu, root, group=group)
            buffer.copy_(on_cpu)

    def buckets(self) -> list[Bucket]:
        """The buckets of all fragments, in order."""
        return [bucket for fragment in self.fragments for bucket in fragment.buckets]

    @torch.no_grad()
    def step(self) -> None:
        """Count one inner step, and start and apply what falls due. The inner optimizer's `step` calls it.

        Raises:
            PeerError, WireError: the average failed.
        """
        self.inner_step += 1
        self._steps_here += 1
        if self.pending is not None and self.inner_step >= self.pending.due:
            self._apply()
        for index, fragment in enumerate(self.fragments):
            if self.inner_step % self.every == fragment.offset:
                self._start(index, self.inner_step + self.delay)
                if not self.delay:
                    self._apply()

    @torch.no_grad()
    def synchronize(self) -> None:
        """Replace the parameters by their mean over ranks now: afterwards they are the same on all ranks.

        For the end of training. All ranks call it after the same step. What is under way is applied first.
        The mean is a plain one, also in `DiLoCo`: this is no outer step. After a step that has averaged the
        whole model it does nothing.
        """
        if self.pending is not None:
            self._apply()
        if self.inner_step % self.every == 0 and len(self.fragments) == 1 and not self.delay:
            return
        for index in range(len(self.fragments)):
            self._start(index, self.inner_step, keep_progress=False)
            self._apply(plain=True)

    def _start(self, index: int, due: int, keep_progress: bool = True) -> None:
        """Start to average a fragment; what the rank learns meanwhile can be kept on top of the outcome."""
        buckets = self.fragments[index].buckets
        pending = _Pending(index, due, [], [])
        for place, bucket in enumerate(buckets):
            flat = torch.empty_like(bucket.anchor)
            bucket.read(flat)
            if self.delay and keep_progress:
                pending.sent.append(flat.clone())
            torch.sub(bucket.anchor, flat, out=flat)
            pending.means.append(flat)
            future = self.sync.average(
                flat,
                list(bucket.parameters),
                index=bucket.index,
                first=place == 0,
                last=place == len(buckets) - 1,
            )
            pending.futures.append(future)
        self.pending = pending

    def _apply(self, plain: bool = False) -> None:
        """Wait for the average under way and take the outer step, or just the mean."""
        pending = self.wait()
        self.pending = None
        outer_step = LocalSGD._outer_step if plain else type(self)._outer_step
        for place, bucket in enumerate(self.fragments[pending.fragment].buckets):
            outer_step(self, bucket.anchor, pending.means[place], bucket.momentum)
            if not pending.sent:
                bucket.write(bucket.anchor)
                continue
            flat = pending.means[place]
            bucket.read(flat)
            bucket.write(flat.sub_(pending.sent[place]).add_(bucket.anchor))

    def wait(self) -> _Pending:
        """Wait for the average under way.

        Raises:
            PeerError, WireError: it failed.
        """
        assert self.pending is not None
        for future in self.pending.futures:
            try:
                future.wait()
            except RuntimeError:
                if self.sync.failure is not None:
                    raise self.sync.failure from None
                raise
        self.pending.futures.clear()
        return self.pending

    def resume_pending(self, fragment: int, due: int, has_sent: bool) -> None:
        """Make room for a finished average that a checkpoint brings; it is applied when it is due."""
        buckets = self.fragments[fragment].buckets
        means = [torch.empty_like(bucket.anchor) for bucket in buckets]
        sent = [torch.empty_like(bucket.anchor) for bucket in buckets] if has_sent else []
        self.pending = _Pending(fragment, due, means, sent)

    def stats(self, *, parameters: bool = False) -> Stats:
        """Totals of this rank since this object was made.

        `steps` are inner steps, and `dense_bytes` what a ring all-reduce of the gradients in every one of
        them would have sent, in the parameters' own dtype: `ratio` compares with synchronous training.

        Args:
            parameters: fill `Stats.parameters` too.
        """
        stats = self.sync.stats(parameters)
        return replace(stats, steps=self._steps_here, dense_bytes=self._steps_here * self._dense_bytes)

    def add_sink(self, sink: Callable[[Event], None]) -> None:
        """Call sink(event) for every measurement, from the thread that made it; it must be quick."""
        self.sync.metrics.add_sink(sink)

    def state_dict(self) -> dict[str, Any]:
        """All that training needs to continue, model and inner optimizer included. Collective.

        See `gradq.hooks.local_checkpoint`.
        """
        return local_checkpoint.state_dict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state saved by as many ranks; see `gradq.hooks.local_checkpoint`."""
        local_checkpoint.load_state_dict(self, state)

    def load_checkpoint(self, checkpoint_id: str | Path, key: str = "gradq") -> None:
        """Continue from a checkpoint saved by any number of ranks; what `gradq.load_checkpoint` calls."""
        local_checkpoint.load_checkpoint(self, checkpoint_id, key)

    def close(self) -> None:
        """Leave the inner optimizer alone and end gradq's threads and process groups. Idempotent."""
        self._remove_hook()
        self.sync.close()

    def __repr__(self) -> str:
        return f"<gradq {self._settings(len(self.fragments))}, {self.stats()}>"


class DiLoCo(LocalSGD):
    """Train locally, and move a common starting point by Nesterov SGD every so many steps.

    The same line as for `LocalSGD`::

          optimizer = torch.optim.AdamW(model.parameters())
        + diloco = gradq.DiLoCo(model, optimizer, "int4", every=30)
          for batch in batches: ...

    With the mean pseudo-gradient g: m ← μ m + g, then θ ← θ - lr (g + μ m). Needs one more fp32 element for
    each parameter than `LocalSGD`.

    Args:
        model: see `LocalSGD`, like all not named here.
        inner_optimizer: AdamW in the paper.
        spec: how pseudo-gradients travel.
        outer_lr: learning rate of the outer step.
        outer_momentum: μ; 0 is plain SGD.
        **options: of `LocalSGD`.

    Raises:
        ConfigError, UnsupportedError, MismatchError: see `LocalSGD`.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_optimizer: Optimizer | None,
        spec: str | Codec | Spec | Policy = "int4",
        *,
        every: int,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        **options: Any,
    ) -> None:
        self.outer_lr, self.outer_momentum = outer_lr, outer_momentum
        super().__init__(model, inner_optimizer, spec, every=every, **options)

    def _settings(self, fragments: int) -> str:
        outer = f"outer_lr={self.outer_lr}, outer_momentum={self.outer_momentum}"
        return f"{super()._settings(fragments)}, {outer}"

    def _has_momentum(self) -> bool:
        return True

    def _outer_step(self, anchor: Tensor, mean: Tensor, momentum: Tensor | None) -> None:
        assert momentum is not None
        momentum.mul_(self.outer_momentum).add_(mean)
        anchor.sub_(mean.add_(momentum, alpha=self.outer_momentum), alpha=self.outer_lr)


def _check_schedule(every: int, fragments: int, delay: int) -> None:
    if every < 1:
        raise ConfigError(f"every={every}: ranks average after 1 inner step or more")
    if not 1 <= fragments <= every:
        raise ConfigError(f"fragments={fragments}: choose from 1 to every={every}, one a step at most")
    if not 0 <= delay <= every // fragments:
        raise ConfigError(
            f"delay={delay}: choose from 0 to every // fragments = {every // fragments}, so that one average "
            "is applied before the next one starts"
        )


def _check_optimizer(optimizer: object) -> None:
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise UnsupportedError(
            f"inner_optimizer is a {type(optimizer).__name__}; pass the torch.optim.Optimizer that the "
            "training loop steps, or None and call step() after every step"
        )


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that require a gradient, by name.

    Raises:
        UnsupportedError: naming what cannot be averaged, and what to do.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise UnsupportedError(
            "the model is wrapped in DistributedDataParallel, which averages gradients in every step: local "
            "steps replace that. Pass the plain module"
        )
    parameters: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in parameters.items():
        if type(parameter.data).__name__ == "DTensor":
            raise UnsupportedError(
                f"parameter {name!r} is sharded (a DTensor); local steps need it whole on each rank"
            )
        if parameter.dtype not in _WORK_DTYPES:
            raise UnsupportedError(
                f"parameter {name!r} is {parameter.dtype}; local steps average fp32, bf16, fp16 and fp64"
            )
    if not parameters:
        raise UnsupportedError("no parameter of the model requires a gradient; there is nothing to average")
    return parameters


def _describe(parameters: dict[str, Tensor]) -> list[ParameterInfo]:
    """Pseudo-gradients have the work dtype."""
    return [
        ParameterInfo(name=name, shape=tuple(p.shape), dtype=_WORK_DTYPES[p.dtype], index=index)
        for index, (name, p) in enumerate(parameters.items())
    ]


def _policy(
    spec: str | Codec | Spec | Policy, feedback: bool | str, exact: ExactRule
) -> tuple[Policy | None, str]:
    """The policy a spec stands for, and what to call it."""
    if isinstance(spec, AdaptivePolicy):
        raise UnsupportedError(
            f"{type(spec).__name__} plans again at step boundaries, and fragments have none in common; "
            "give local steps a fixed spec"
        )
    if not isinstance(spec, str | Codec | Spec):
        return spec, type(spec).__name__
    parsed = Spec.parse(spec)
    policy = None if parsed.is_none else FixedPolicy(spec=parsed, exact=exact, feedback=feedback)
    return policy, str(parsed)
