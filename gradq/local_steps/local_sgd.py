"""Local steps: ranks train alone for some steps, then average how far each has come.

Every rank takes `every` steps of its inner optimizer on its own data. Then the *pseudo-gradient* (where the
ranks started minus where this one is now) is averaged, compressed like any gradient, and an outer step moves
the common starting point: to the mean of the ranks (`LocalSGD`), or by Nesterov SGD (`DiLoCo`).

Streaming: the parameters are cut into fragments, and each is averaged at its own step of the cycle, so what
is sent at once falls by their number. With a delay, a fragment's exchange runs while the next inner steps are
taken, and is applied when they are done. With the common start a, this rank's parameters p(t) at a step t
of the schedule, and a delay of d steps::

    g = mean over ranks of a - p(t)                sent at step t, waited for at step t + d
    a' = outer step of a along g
    p(t + d) <- a' + (p(t + d) - p(t))             what was learned meanwhile stays on top; or, with alpha,
    p(t + d) <- alpha p(t + d) + (1 - alpha) a'

torchft counts from the other end: it sends at step t - d and applies at t, the same exchange d steps earlier,
and mixes by its `fragment_update_alpha` (0 by default: what was learned meanwhile is dropped).

What is trained may change on the way, on all ranks after the same step: the next average notes it, and from
then on a parameter that was unfrozen or added is averaged (after a plain mean over ranks, so that all start
together), and one that was frozen or removed is not. A frozen parameter has rank 0's value everywhere.

The inner optimizer's state stays each rank's own, and so do buffers after the start, such as BatchNorm's
statistics: a checkpoint keeps those of every rank, and whoever saves the model at the end saves those of its
own rank (`torch.optim.swa_utils.update_bn` makes them anew).

References:
    Stich, "Local SGD converges fast and communicates little", ICLR 2019.
    Douillard et al., "DiLoCo: Distributed low-communication training of language models", 2023.
    Douillard et al., "Streaming DiLoCo with overlapping communication", 2025 (fragments, delay, and mixing
    half and half).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.optim import Optimizer

from gradq import wire
from gradq.errors import ConfigError, MismatchError, PeerError, UnsupportedError
from gradq.hooks import averaged
from gradq.hooks.copied import CopiedHandle
from gradq.local_steps import checkpoint as local_checkpoint
from gradq.local_steps import inner_optimizer as inner
from gradq.local_steps import membership
from gradq.local_steps.fragments import WORK_DTYPES, Bucket, Fragment, fragments_of
from gradq.metrics import Event, Stats
from gradq.options import SyncConfig, Timeout, as_timedelta
from gradq.policy import AdaptivePolicy, Asked, ExactRule, ParameterInfo, Policy, label, resolve
from gradq.sync.gradient_sync import GradientSync
from gradq.transport.handshake import agree, telling

__all__ = ["DiLoCo", "LocalSGD"]

_log = logging.getLogger("gradq")


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


class LocalSGD:
    """Train locally, and replace the parameters by their mean over ranks every so many steps.

    All ranks construct it together; rank 0's parameters (frozen ones too) and buffers are given to all. They
    need one step of the inner optimizer in every iteration of every rank: see grad_scaler. The training loop
    stays as it is: averaging happens inside the inner optimizer's `step`::

          optimizer = torch.optim.AdamW(model.parameters())
        + local = gradq.LocalSGD(model, optimizer, "int4", every=8)
          for batch in batches: ...

    Memory, in fp32 elements for each parameter, on the CPU wherever the model is: 1 for the common starting
    point, 1 for the pseudo-gradient, 1 with a delay, 2 with error feedback. On models outside the CPU it was
    not run.

    Args:
        model: a plain module, the same on all ranks; not wrapped in DistributedDataParallel.
        inner_optimizer: what the training loop steps; its step counts, also if it is one that wraps another.
            Of several, the one that steps last. None: call `step` yourself after every iteration, for
            instance because a rank may leave out steps.
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
        timeout: limit for one exchange: how long the fastest rank waits for the slowest. The group's if None.
        grad_scaler: the GradScaler that steps inner_optimizer, if any: a step that it skips on one rank
            counts too, so that all ranks average at the same iterations.
        fragment_update_alpha: with a delay, this share of the rank's own parameters stays when an average is
            applied, from 0 to 1. None adds what was learned meanwhile, see this module. With long delays 0.5
            learned better (benchmarks/diloco.py).

    Raises:
        ConfigError: an argument out of its range (SpecError for the spec).
        UnsupportedError: a DistributedDataParallel or FSDP model, or another that cannot be averaged.
        MismatchError: ranks disagree; names the rank and the field.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_optimizer: Optimizer | None,
        spec: Asked = "int8",
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
        grad_scaler: torch.amp.GradScaler | None = None,
        fragment_update_alpha: float | None = None,
    ) -> None:
        group = averaged.check_group(dist.group.WORLD if group is None else group)
        self.model, self.inner_optimizer = model, inner_optimizer
        self.every, self.delay = every, delay
        self.fragment_update_alpha = fragment_update_alpha
        self.inner_step = self._steps_here = self._dense_so_far = 0
        self.pending: _Pending | None = None
        self._num_fragments = fragments
        self._sinks: list[Callable[[Event], None]] = []
        self._before = Stats()  # of what was averaged with other members
        with telling(group):
            self._config = SyncConfig(
                seed=seed, collective=collective, residual_dtype=residual_dtype, timeout=as_timedelta(timeout)
            )
            self._notes = membership.Notes(group, self._config.timeout)
            _check_schedule(every, fragments, delay, fragment_update_alpha)
            parameters = membership.trained(model)
            if not parameters:
                raise UnsupportedError(
                    "no parameter of the model requires a gradient; there is nothing to average"
                )
            inner.check(inner_optimizer, grad_scaler, model.parameters())
            self.fragments = self._cut(parameters)
            self._policy, self._label = _policy(spec, feedback, exact)
            agree(
                {
                    "local steps": self._settings(fragments),
                    "trained parameters": membership.describe(parameters.items()),
                    "frozen parameters": membership.describe(membership.frozen(model).items()),
                    "buffers": membership.describe(membership.buffers(model).items()),
                },
                group,
            )
            self.sync = self._make_sync(parameters, group)
        self._count_dense_bytes(parameters)
        self._start_together()
        self._counter: inner.StepCounter | None = None
        if inner_optimizer is not None:
            self._counter = inner.StepCounter(inner_optimizer, grad_scaler, self.step)

    def _cut(self, parameters: dict[str, Tensor]) -> list[Fragment]:
        self._members = self._asked = membership.digest(parameters)
        return fragments_of(parameters, self._num_fragments, self.every, self._has_momentum())

    def _make_sync(self, parameters: dict[str, Tensor], group: dist.ProcessGroup) -> GradientSync:
        return GradientSync(_describe(parameters), self._policy, self._label, group, self._config)

    def _count_dense_bytes(self, parameters: dict[str, Tensor]) -> None:
        nbytes = sum(parameter.nbytes for parameter in parameters.values())
        self._dense_bytes = wire.ring_bytes(nbytes, self.sync.world_size)

    def _settings(self, fragments: int) -> str:
        """What all ranks must have in common, besides what `GradientSync` compares."""
        mixing = "" if self.fragment_update_alpha is None else f", alpha={self.fragment_update_alpha}"
        return f"{type(self).__name__}, every={self.every}, fragments={fragments}, delay={self.delay}{mixing}"

    def _outer_step(self, anchor: Tensor, mean: Tensor, momentum: Tensor | None) -> None:
        """Move the common starting point; mean is scratch afterwards."""
        anchor.sub_(mean)

    def _has_momentum(self) -> bool:
        return False

    @torch.no_grad()
    def _start_together(self) -> None:
        """Give rank 0's parameters and buffers to all, frozen ones too."""
        membership.give_from_first([*self.model.parameters(), *self.model.buffers()], self.sync.group)
        for bucket in self.buckets():
            bucket.read(bucket.anchor)

    def buckets(self) -> list[Bucket]:
        """The buckets of all fragments, in order."""
        return [bucket for fragment in self.fragments for bucket in fragment.buckets]

    def parameters(self) -> dict[str, Tensor]:
        """What is averaged, by name, in the order of the buckets."""
        return {name: p for bucket in self.buckets() for name, p in bucket.parameters.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Count one inner step, and start and apply what falls due. The inner optimizer's `step` calls it.

        Raises:
            PeerError, WireError: the average failed.
        """
        self.inner_step += 1
        self._steps_here += 1
        self._dense_so_far += self._dense_bytes
        if self.pending is not None and self.inner_step >= self.pending.due:
            self._apply()
        for index, fragment in enumerate(self.fragments):
            if self.inner_step % self.every == fragment.offset:
                self._start(index, self.inner_step + self.delay)
                if not self.delay:
                    self._apply()
                    break  # the fragments may be others now

    @torch.no_grad()
    def synchronize(self) -> None:
        """Replace the parameters by their mean over ranks now: afterwards they are the same on all ranks.

        For the end of training. All ranks call it after the same step. What is under way is applied first.
        The mean is a plain one, also in `DiLoCo`: this is no outer step. After a step that has averaged the
        whole model it does nothing.
        """
        if self.pending is not None:
            self._apply()
        self._post_note(final=True)
        self._check_notes()
        self._follow_model()
        if self.inner_step % self.every == 0 and len(self.fragments) == 1 and not self.delay:
            return
        for index in range(len(self.fragments)):
            self._start(index, self.inner_step, final=True)
            self._apply(plain=True)

    def _start(self, index: int, due: int, final: bool = False) -> None:
        """Start to average a fragment; what the rank learns meanwhile can be kept on top of the outcome."""
        self._post_note(final)
        buckets = self.fragments[index].buckets
        pending = _Pending(index, due, [], [])
        for place, bucket in enumerate(buckets):
            flat = torch.empty_like(bucket.anchor)
            bucket.read(flat)
            if self.delay and not final:
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
            flat, alpha = pending.means[place], self.fragment_update_alpha
            bucket.read(flat)
            if alpha is None:
                flat.sub_(pending.sent[place]).add_(bucket.anchor)
            else:
                flat.mul_(alpha).add_(bucket.anchor, alpha=1 - alpha)
            bucket.write(flat)
        self._follow_model()

    def _post_note(self, final: bool) -> None:
        """Tell the other ranks where this one stands and what it trains."""
        parameters = membership.trained(self.model)
        for bucket in self.buckets():  # a parameter may have been replaced by another tensor of its kind
            for name, member in bucket.parameters.items():
                now = parameters.get(name, member)
                if now.shape == member.shape and now.dtype == member.dtype:
                    bucket.parameters[name] = now
        self._asked = membership.digest(parameters) if parameters else self._members
        self._notes.post(self.inner_step, final, self._asked)
        sent = 8 * self._notes.NUMEL * (self.sync.world_size - 1)
        self.sync.metrics.record(Event("wire_bytes", sent, self.sync.step))

    def _check_notes(self) -> None:
        """Compare the ranks' notes.

        Raises:
            MismatchError: they differ; PeerError: a rank is gone.
        """
        try:
            self._notes.check()
        except MismatchError:
            raise
        except RuntimeError as error:
            raise PeerError(f"rank {self.sync.rank}: the other ranks did not answer: {error}") from error

    def _follow_model(self) -> None:
        """Average what is trained now: parameters unfrozen, frozen, added or removed before the last note.

        Those that have become trained, or are no longer, get the plain mean of all ranks first, so that all
        start together. Momentum starts at zero, the fragments are cut anew. Collective.
        """
        if self._asked == self._members:
            return
        now, old, group = membership.trained(self.model), self.sync, self.sync.group
        kept = dict(self._anchors(now))
        present = membership.named(self.model)
        left = {n for bucket in self.buckets() for n in bucket.parameters if n in present and n not in now}
        for name in sorted((now.keys() - kept.keys()) | left):
            membership.mean_over_ranks(present[name], group)
        self.fragments = self._cut(now)
        for bucket in self.buckets():
            bucket.read(bucket.anchor)
            anchors = bucket.views(bucket.anchor)
            momenta = {} if bucket.momentum is None else bucket.views(bucket.momentum)
            for name in anchors.keys() & kept.keys():
                anchor, momentum = kept[name]
                anchors[name].copy_(anchor)
                if momentum is not None:
                    momenta[name].copy_(momentum)
        self.sync = self._make_sync(now, group)
        self.sync.step = old.step
        _take_residuals(old, self.sync)
        for sink in self._sinks:
            self.sync.metrics.add_sink(sink)
        self._before = _added(self._before, old.stats())
        old.close()
        self._count_dense_bytes(now)
        _log.info("local steps average %d parameters from inner step %d on", len(now), self.inner_step)

    def _anchors(self, now: dict[str, Tensor]) -> Iterator[tuple[str, tuple[Tensor, Tensor | None]]]:
        """Anchor and momentum of each parameter that goes on being averaged, by name."""
        for bucket in self.buckets():
            momenta = {} if bucket.momentum is None else bucket.views(bucket.momentum)
            for name, anchor in bucket.views(bucket.anchor).items():
                new = now.get(name)
                if new is not None and new.shape == anchor.shape and WORK_DTYPES[new.dtype] == anchor.dtype:
                    yield name, (anchor, momenta.get(name))

    def wait(self) -> _Pending:
        """Wait for the average under way.

        Raises:
            PeerError, WireError: it failed.
            MismatchError: ranks are at different places; see `membership.Notes`.
        """
        assert self.pending is not None
        gone: PeerError | None = None
        try:
            self._check_notes()
        except PeerError as error:
            gone = error  # the averages know which rank
        for future in self.pending.futures:
            try:
                future.wait()
            except RuntimeError:
                if self.sync.failure is not None:
                    raise self.sync.failure from None
                raise
        self.pending.futures.clear()
        if gone is not None:
            raise gone
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
        stats = _added(self.sync.stats(parameters), self._before)
        return replace(stats, steps=self._steps_here, dense_bytes=self._dense_so_far)

    def add_sink(self, sink: Callable[[Event], None]) -> None:
        """Call sink(event) for every measurement, from the thread that made it; it must be quick."""
        self._sinks.append(sink)
        self.sync.metrics.add_sink(sink)

    def state_dict(self) -> dict[str, Any]:
        """All that training needs to continue, model and inner optimizer included. Collective.

        See `gradq.local_steps.checkpoint`.
        """
        return local_checkpoint.state_dict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state saved by as many ranks; see `gradq.local_steps.checkpoint`."""
        local_checkpoint.load_state_dict(self, state)

    def load_checkpoint(self, checkpoint_id: str | Path, key: str = "gradq") -> None:
        """Continue from a checkpoint saved by any number of ranks; what `gradq.load_checkpoint` calls."""
        local_checkpoint.load_checkpoint(self, checkpoint_id, key)

    def close(self) -> None:
        """Leave the inner optimizer alone and end gradq's threads and process groups. Idempotent."""
        if self._counter is not None:
            self._counter.close()
            if not self._steps_here:
                _log.warning("local steps ended without a step of the inner optimizer: nothing was averaged")
        self.sync.close()

    def __reduce__(self) -> tuple[type[CopiedHandle], tuple[str]]:
        """A copy or a pickle is a `CopiedHandle`, as of `HookState`."""
        return CopiedHandle, (type(self).__name__,)

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
        spec: Asked = "int4",
        *,
        every: int,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        **options: Any,
    ) -> None:
        self.outer_lr, self.outer_momentum = outer_lr, outer_momentum
        super().__init__(model, inner_optimizer, spec, every=every, **options)

    def _settings(self, fragments: int) -> str:
        for name, value in (("outer_lr", self.outer_lr), ("outer_momentum", self.outer_momentum)):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"{name}={value!r:.200}: it is a finite number")
        outer = f"outer_lr={self.outer_lr}, outer_momentum={self.outer_momentum}"
        return f"{super()._settings(fragments)}, {outer}"

    def _has_momentum(self) -> bool:
        return True

    def _outer_step(self, anchor: Tensor, mean: Tensor, momentum: Tensor | None) -> None:
        assert momentum is not None
        momentum.mul_(self.outer_momentum).add_(mean)
        anchor.sub_(mean.add_(momentum, alpha=self.outer_momentum), alpha=self.outer_lr)


def _check_schedule(every: int, fragments: int, delay: int, alpha: float | None) -> None:
    for name, value in (("every", every), ("fragments", fragments), ("delay", delay)):
        if type(value) is not int:
            raise ConfigError(f"{name}={value!r:.200}: it is a number of inner steps, an integer")
    if every < 1:
        raise ConfigError(f"every={every}: ranks average after 1 inner step or more")
    if not 1 <= fragments <= every:
        raise ConfigError(f"fragments={fragments}: choose from 1 to every={every}, one a step at most")
    if not 0 <= delay <= every // fragments:
        raise ConfigError(
            f"delay={delay}: choose from 0 to every // fragments = {every // fragments}, so that one average "
            "is applied before the next one starts"
        )
    if alpha is not None and not (delay and 0 <= alpha <= 1):
        raise ConfigError(
            f"fragment_update_alpha={alpha}: choose from 0 to 1, together with a delay of 1 or more: without "
            "one there are no steps of the rank's own to mix in"
        )


def _describe(parameters: dict[str, Tensor]) -> list[ParameterInfo]:
    """Pseudo-gradients have the work dtype."""
    return [
        ParameterInfo(name=name, shape=tuple(p.shape), dtype=WORK_DTYPES[p.dtype], index=index)
        for index, (name, p) in enumerate(parameters.items())
    ]


def _policy(spec: Asked, feedback: bool | str, exact: ExactRule) -> tuple[Policy | None, str]:
    """The policy a spec stands for, and what to call it."""
    if isinstance(spec, AdaptivePolicy):
        raise UnsupportedError(
            f"{type(spec).__name__} plans again at step boundaries, and fragments have none in common; "
            "give local steps a fixed spec"
        )
    asked, policy = resolve(spec, exact=exact, feedback=feedback)
    return policy, label(asked)


def _take_residuals(old: GradientSync, new: GradientSync) -> None:
    """Keep what is owed to parameters that go on; shard residuals where this rank still owns the piece."""
    for name in old.feedback.local.names():
        residual = old.feedback.local.current(name)
        if name in new.plan and new.plan[name].feedback1 and new.parameters[name].numel == residual.numel():
            new.feedback.local.replace(name, residual)
    for name in old.feedback.shard.names():
        if name in new.plan and new.plan[name].feedback2:
            pieces = [sync.segment(name).piece(sync.world_size, sync.rank) for sync in (old, new)]
            if pieces[0] == pieces[1]:
                new.feedback.shard.replace(name, old.feedback.shard.current(name))


def _added(stats: Stats, earlier: Stats) -> Stats:
    """Bytes and times of both; the rest of the first."""
    names = ("dense_bytes", "wire_bytes", "intra_node_bytes", "encode_ms", "exchange_ms", "decode_ms")
    return replace(stats, **{name: getattr(stats, name) + getattr(earlier, name) for name in names})
