"""What `LocalSGD` and `DiLoCo` have in common: fragments, the average under way, and who takes part."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.optim import Optimizer

from gradq import wire
from gradq.errors import PeerError, UnsupportedError
from gradq.hooks import averaged
from gradq.hooks.handle import Handle
from gradq.local_steps import inner_optimizer as inner
from gradq.local_steps import membership
from gradq.local_steps.fragments import WORK_DTYPES, Bucket, fragments_of, infos
from gradq.local_steps.schedule import Schedule
from gradq.metrics import Event, Stats
from gradq.options import Options, asked_for
from gradq.policy import AdaptivePolicy, Asked, Policy, label, resolve
from gradq.sync.gradient_sync import GradientSync
from gradq.transport.handshake import agree, telling

__all__ = ["LocalSteps", "Pending"]

_log = logging.getLogger("gradq")


@dataclass
class Pending:
    """An average under way.

    Attributes:
        fragment: the index of the fragment.
        due: the inner step at which to apply it.
        means: the pseudo-gradients, flat, a bucket each; their means when the futures are done.
        sent: the parameters as they were when it started, a bucket each; empty without a delay.
        futures: the futures of the means.
    """

    fragment: int
    due: int
    means: list[Tensor]
    sent: list[Tensor]
    futures: list[Future[Tensor]] = field(default_factory=list)


class LocalSteps(Handle):
    """Ranks train alone, and average how far each has come; what an outer step is, subclasses say.

    Args:
        model: a plain module, the same on all ranks.
        inner_optimizer: the optimizer whose steps are counted, or None.
        spec: how pseudo-gradients travel.
        schedule: a function that makes the `Schedule`; what it raises is told to the other ranks.
        options: the options of the run, if an object was given.
        overrides: the fields of `gradq.Options` that were given by name.

    Raises:
        ConfigError, UnsupportedError, MismatchError: see `gradq.LocalSGD`.

    Attributes:
        inner_step: the number of inner steps so far, those before a checkpoint too.
        pending: the average under way, if there is one.
        fragments: the parts of the model that are averaged.
    """

    sync: GradientSync
    has_momentum = False

    def __init__(
        self,
        model: nn.Module,
        inner_optimizer: Optimizer | None,
        spec: Asked,
        schedule: Callable[[], Schedule],
        options: Options | None,
        overrides: Mapping[str, Any],
    ) -> None:
        group = asked_for("group", options, overrides)
        with telling(None if group is dist.GroupMember.NON_GROUP_MEMBER else dist.group.WORLD):
            group = averaged.check_group(dist.group.WORLD if group is None else group)
        self.model, self.inner_optimizer = model, inner_optimizer
        self.inner_step = self._steps_here = self._dense_so_far = 0
        self.pending: Pending | None = None
        self._sinks: list[Callable[[Event], None]] = []
        self._before = Stats()  # the figures of the syncs before the present one
        with telling(group):
            chosen = Options.of("local steps", options, overrides)
            self._config = replace(chosen, grad_scaler=None).config()  # pseudo-gradients are not scaled
            self._notes = membership.Notes(group, self._config.timeout)
            self.schedule = schedule()
            parameters = membership.trained(model)
            if not parameters:
                raise UnsupportedError(
                    "no parameter of the model requires a gradient; there is nothing to average"
                )
            inner.check(inner_optimizer, chosen.grad_scaler, model.parameters())
            self._policy, self._spec_label = _policy(spec, chosen)
            agree(
                {
                    "local steps": self.settings(),
                    "trained parameters": membership.describe(parameters.items()),
                    "frozen parameters": membership.describe(membership.frozen(model).items()),
                    "buffers": membership.describe(membership.buffers(model).items()),
                },
                group,
            )
            self._set_members(parameters, group)
        self._start_together()
        self._counter: inner.StepCounter | None = None
        if inner_optimizer is not None:
            self._counter = inner.StepCounter(inner_optimizer, chosen.grad_scaler, self.step)

    @property
    def label(self) -> str:
        """The name of the class."""
        return type(self).__name__

    def settings(self) -> str:
        """What all ranks must have in common, besides what `GradientSync` compares.

        Raises:
            ConfigError: a value in it cannot work.
        """
        return f"{self.label}, {self.schedule}"

    @abstractmethod
    def outer_step(self, anchor: Tensor, mean: Tensor, momentum: Tensor | None) -> None:
        """Move the common starting point.

        Args:
            anchor: the starting point, flat.
            mean: the mean pseudo-gradient; scratch afterwards.
            momentum: the momentum that the last outer step left, if the class has one.
        """

    def _set_members(self, parameters: dict[str, Tensor], group: dist.ProcessGroup) -> None:
        """Cut the fragments of what is trained, and make what averages them. Collective."""
        self._members = self._asked = membership.digest(parameters)
        schedule = self.schedule
        self.fragments = fragments_of(parameters, schedule.fragments, schedule.every, self.has_momentum)
        self.sync = GradientSync(infos(parameters), self._policy, self._spec_label, group, self._config)
        nbytes = sum(parameter.nbytes for parameter in parameters.values())
        self._dense_bytes = wire.ring_bytes(nbytes, self.sync.world_size)

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

    def anchors(self) -> dict[str, Tensor]:
        """The state of all buckets; see `Bucket.state`."""
        return {name: view for bucket in self.buckets() for name, view in bucket.state().items()}

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
            if self.inner_step % self.schedule.every == fragment.offset:
                self._start(index, self.inner_step + self.schedule.delay)
                if not self.schedule.delay:
                    self._apply()
                    break  # the fragments may be others now

    @torch.no_grad()
    def synchronize(self) -> None:
        """Replace the parameters by their mean over ranks now: afterwards they are the same on all ranks.

        For the end of training. All ranks call it after the same step. What is under way is applied first.
        The mean is a plain one, also in `DiLoCo`, whose outer step is not taken. After a step that has
        averaged the whole model it does nothing.
        """
        if self.pending is not None:
            self._apply()
        self._post_note(final=True)
        self._notes.check()
        self._follow_model()
        whole = len(self.fragments) == 1 and not self.schedule.delay
        if whole and self.inner_step % self.schedule.every == 0:
            return
        for index in range(len(self.fragments)):
            self._start(index, self.inner_step, final=True)
            self._apply(plain=True)

    def _start(self, index: int, due: int, final: bool = False) -> None:
        """Start to average a fragment; with a delay a copy of it stays, to tell what is learned meanwhile."""
        self._post_note(final)
        buckets, pending = self.fragments[index].buckets, Pending(index, due, [], [])

        def pseudo_gradients() -> Iterator[tuple[Tensor, list[str]]]:
            for bucket in buckets:
                flat = torch.empty_like(bucket.anchor)
                bucket.read(flat)
                if self.schedule.delay and not final:
                    pending.sent.append(flat.clone())
                torch.sub(bucket.anchor, flat, out=flat)
                pending.means.append(flat)
                yield flat, list(bucket.parameters)

        pending.futures += self.sync.average_buckets(pseudo_gradients(), buckets[0].index)
        self.pending = pending

    def _apply(self, plain: bool = False) -> None:
        """Wait for the average under way, and take the outer step; plain: go to the mean instead."""
        pending = self.wait()
        self.pending = None
        for place, bucket in enumerate(self.fragments[pending.fragment].buckets):
            if plain:
                bucket.anchor.sub_(pending.means[place])
            else:
                self.outer_step(bucket.anchor, pending.means[place], bucket.momentum)
            if not pending.sent:
                bucket.write(bucket.anchor)
                continue
            flat, alpha = pending.means[place], self.schedule.alpha
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

    def _follow_model(self) -> None:
        """Average what is trained now: parameters unfrozen, frozen, added or removed before the last note.

        Those that have become trained, or are no longer, get the plain mean of all ranks first, so that all
        start together. Momentum starts at zero, the fragments are cut anew. Collective.
        """
        if self._asked == self._members:
            return
        now, old, group = membership.trained(self.model), self.sync, self.sync.group
        before, present = self.anchors(), membership.named(self.model)
        kept = {n for n, p in now.items() if _continues(before.get(f"anchor.{n}"), p)}
        left = {name for name in self.parameters() if name in present and name not in now}
        for name in sorted((now.keys() - kept) | left):
            membership.mean_over_ranks(present[name], group)
        self._set_members(now, group)
        for bucket in self.buckets():
            bucket.read(bucket.anchor)
        for name, view in self.anchors().items():
            if name.partition(".")[2] in kept:
                view.copy_(before[name])
        self.sync.step = old.step
        membership.take_residuals(old, self.sync)
        for sink in self._sinks:
            self.sync.metrics.add_sink(sink)
        self._before = self._before.plus(old.stats())
        old.close()
        _log.info("local steps average %d parameters from inner step %d on", len(now), self.inner_step)

    def wait(self) -> Pending:
        """Wait for the average under way.

        Raises:
            PeerError, WireError: it failed.
            MismatchError: ranks are at different places; see `membership.Notes`.
        """
        assert self.pending is not None
        gone: PeerError | None = None
        try:
            self._notes.check()
        except PeerError as error:
            gone = error  # the errors of the futures name the rank
        for future in self.pending.futures:
            self.sync.wait(future)
        self.pending.futures.clear()
        if gone is not None:
            raise gone
        return self.pending

    def resume_pending(self, fragment: int, due: int, has_sent: bool) -> None:
        """Make room for a finished average out of a checkpoint; it is applied when it is due."""
        buckets = self.fragments[fragment].buckets
        means = [torch.empty_like(bucket.anchor) for bucket in buckets]
        sent = [torch.empty_like(bucket.anchor) for bucket in buckets] if has_sent else []
        self.pending = Pending(fragment, due, means, sent)

    def stats(self, *, parameters: bool = False) -> Stats:
        """Totals of this rank since this object was made.

        `steps` are inner steps, and `dense_bytes` what a ring all-reduce of the gradients in every one of
        them would have sent, in the parameters' own dtype: `ratio` compares with synchronous training.

        Args:
            parameters: whether to fill `Stats.parameters` too.
        """
        stats = super().stats(parameters=parameters).plus(self._before)
        return replace(stats, steps=self._steps_here, dense_bytes=self._dense_so_far)

    def add_sink(self, sink: Callable[[Event], None]) -> None:
        """Call sink(event) for every measurement, from the thread that made it; it must be quick."""
        super().add_sink(sink)
        self._sinks.append(sink)

    def close(self) -> None:
        """Leave the inner optimizer alone and end gradq's threads and process groups. Idempotent."""
        if self._counter is not None:
            self._counter.close()
            if not (self._steps_here or self.closed):
                _log.warning("local steps ended without a step of the inner optimizer: nothing was averaged")
        super().close()

    def __repr__(self) -> str:
        return f"<gradq {self.settings()}, {self.stats()}>"


def _continues(anchor: Tensor | None, parameter: Tensor) -> bool:
    """Whether a parameter goes on being averaged from its anchor."""
    if anchor is None:
        return False
    return anchor.shape == parameter.shape and anchor.dtype == WORK_DTYPES[parameter.dtype]


def _policy(spec: Asked, options: Options) -> tuple[Policy | None, str]:
    """The policy that a spec stands for, and its name."""
    if isinstance(spec, AdaptivePolicy):
        raise UnsupportedError(
            f"{type(spec).__name__} plans again at step boundaries, and fragments have none in common; "
            "give local steps a fixed spec"
        )
    asked, policy = resolve(spec, exact=options.exact, feedback=options.feedback)
    return policy, label(asked)
