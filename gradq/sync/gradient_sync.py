"""GradientSync: the main path. A bucket of gradients goes in, their mean over ranks comes out.

The life of a gradient:

1. A hook hands over a bucket; its parameters are looked up once per bucket layout (`_bucket`).
2. The policy has said which codec each parameter travels in; small ones travel exact in the same payload.
3. The bucket is cut into parts (`sync/parts.py`). For each the collective encodes, exchanges, averages
   and decodes, stage by stage on the executor's threads (`_run`; read `collectives/direct.py`, then
   `two_phase.py`).
4. After the last bucket of a step the residuals are committed, unless a gradient was not finite or an outlier
   (`finish`); what the trainer does not apply after all is taken back (`not_applied`, `discard_step`).
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from gradq import wire
from gradq.collectives import Segment, Setting, Step, dense
from gradq.errors import ConfigError
from gradq.metrics import Event, Metrics, Stats
from gradq.options import SyncConfig
from gradq.policy import ParameterInfo, Plan, Policy
from gradq.sync.bucket import Bucket
from gradq.sync.feedback import Feedback
from gradq.sync.finite import StepCheck
from gradq.sync.layout import Ways
from gradq.sync.learner import Learner
from gradq.transport.connect import executor_on, open_channels
from gradq.transport.contract import Pending
from gradq.transport.executor import end
from gradq.transport.handshake import meeting
from gradq.transport.streams import done

__all__ = ["GradientSync"]

_log = logging.getLogger("gradq")


class GradientSync:
    """Averages gradients over the ranks of a group.

    Args:
        parameters: all that will ever be averaged; the same on every rank.
        policy: which codec for which parameter; None leaves averaging to a plain all-reduce.
        label: what the policy is called when ranks compare notes.
        group: the ranks. All must construct together: process groups are made.
        config: see `SyncConfig`.
        device: of the gradients; the CPU by default.
    """

    def __init__(
        self,
        parameters: Sequence[ParameterInfo],
        policy: Policy | None,
        label: str,
        group: dist.ProcessGroup,
        config: SyncConfig,
        device: torch.device | None = None,
    ) -> None:
        self.group, self.config = group, config
        self.rank, self.world_size = group.rank(), group.size()
        self.device = device or torch.device("cpu")
        self.parameters = {p.name: replace(p, world_size=self.world_size) for p in parameters}
        self.metrics = Metrics()
        self.step = 0
        self.sample_next = False
        self._sample, self._loss_scale, self._under_way = False, 1.0, False
        self._buckets: dict[int, Bucket] = {}
        with meeting(group) as notes:
            self._ways = self._nothing = Ways.of(None, label, self.parameters, config, self.world_size)
            self.feedback = Feedback(config.residual_dtype)
            self.feedback.to(self.device)
            self.check = StepCheck(self.device)
            self.learner = Learner(group, self.metrics, config.seed)
            self._executor = executor_on(self.device)
            ways = self._prepare(policy, label)
            notes.update(self._notes(ways, label))
        self._warm_up(ways)
        self._adopt(ways, policy, label)
        count = max(2, self._ways.plain.num_channels)
        self._channels, self._close_channels = open_channels(
            group, count, self.metrics, config.timeout, self.device
        )
        self._executor.failed.tell = self._close_channels
        self._release = weakref.finalize(self, end, os.getpid(), self._executor, self._close_channels)

    def set_policy(self, policy: Policy | None, label: str, *, verb: str = "change its spec") -> None:
        """Use another policy from the next step on. Call it between steps, on all ranks: they compare notes.

        Local residuals of parameters that still use feedback are kept, shard residuals if this rank's piece
        is the same too; all others are dropped, and a log line says so.

        Args:
            policy: which codec for which parameter.
            label: its name.
            verb: what a rank that fails cannot do, for the other ranks' message.

        Raises:
            ConfigError: the plan does not fit the model.
            MismatchError: ranks disagree, or another one failed. The old policy stays.
        """
        with meeting(self.group, verb) as notes:
            ways = self._prepare(policy, label)
            notes.update(self._notes(ways, label))
        self._warm_up(ways, verb)
        self._adopt(ways, policy, label)

    def _prepare(self, policy: Policy | None, label: str) -> Ways:
        """What is quick about a policy and can fail on one rank alone; changes nothing."""
        ways = Ways.of(policy, label, self.parameters, self.config, self.world_size)
        ways.load_kernels(self.device)
        return ways

    def _warm_up(self, ways: Ways, verb: str = "start") -> None:
        """Compile, which takes seconds: after all ranks have heard of what fails at once."""
        if self.world_size > 1 and ways.plan != self.plan:
            with meeting(self.group, verb):
                ways.warm_up(self.device)

    def _adopt(self, ways: Ways, policy: Policy | None, label: str) -> None:
        """Make what `_prepare` made current; cannot fail."""
        before, self._ways = self._ways, ways
        self.learner.follow(policy, label, before.plan, ways.plan, self.step)
        if ways.plan and ways.plan == before.plan:
            return
        self._buckets.clear()
        unchanged = {name for name, entry in ways.plan.items() if entry == before.plan.get(name)}
        pieces = before.shard_pieces(self.rank)
        kept = {name for name, piece in ways.shard_pieces(self.rank).items() if pieces.get(name) == piece}
        dropped = self.feedback.local.keep({n for n, entry in ways.plan.items() if entry.feedback1})
        dropped += self.feedback.shard.keep(kept)
        self.feedback.bases.keep(unchanged)
        if dropped:
            _log.info("new plan: dropped the residuals of %d parameters (%s, ...)", len(dropped), dropped[0])

    @property
    def plan(self) -> Plan:
        """The codecs in use, by parameter; empty if gradients are left to a plain all-reduce."""
        return self._ways.plan

    @property
    def has_feedback(self) -> bool:
        """Whether anything keeps a residual."""
        return self._ways.has_feedback

    def _notes(self, ways: Ways, label: str) -> dict[str, object]:
        """What all ranks must have in common."""
        config = vars(self.config)
        compared = {name: value for name, value in config.items() if name not in ("timeout", "loss_scale")}
        ours = {"wire format": wire.VERSION, "spec": label, "step": self.step}
        return {**ours, **compared, "parameters": ways.notes()}

    def average(
        self, flat: Tensor, names: Sequence[str], *, index: int, last: bool, first: bool | None = None
    ) -> Future[Tensor]:
        """Average one bucket.

        Args:
            flat: the gradients of the named parameters, one after another; replaced by their mean.
            names: of the parameters, in order.
            index: of the bucket.
            last: whether this bucket ends the step.
            first: whether it starts one; bucket 0 does if this is not said.

        Returns:
            A future of flat.
        """
        try:
            return self._average(flat, names, index, last, index == 0 if first is None else first)
        except BaseException as error:  # the other ranks must not wait for this one
            self.fail(error)
            raise

    def _average(
        self, flat: Tensor, names: Sequence[str], index: int, last: bool, first: bool
    ) -> Future[Tensor]:
        if first:
            self.begin()
        if self.world_size == 1:  # the mean is the gradient
            if last:
                self.finish()
            return done(flat)
        if first and self.learner.is_due(self.step):
            self.learner.learn()
            self.set_policy(self.learner.policy, self.learner.label, verb="plan again")
        dense_bytes = wire.ring_bytes(dense.nbytes(flat), self.world_size)
        self.metrics.record(Event("dense_bytes", dense_bytes, self.step, index))
        if not self.plan:  # what DDP does without a hook, counted
            self.metrics.record(Event("wire_bytes", dense_bytes, self.step, index))
            if last:
                self.finish()
            return dense.all_reduce(flat, self.group)
        bucket = self._bucket(flat, tuple(names), index)
        step = Step(self.step, index, self._loss_scale, self._sample)
        futures = [
            self._executor.submit(self._run(bucket, number, flat, step, last), flat)
            for number in range(len(bucket.parts))
        ]
        return futures[-1]  # the others are done before it

    def fail(self, error: BaseException) -> None:
        """This rank cannot go on: later averages raise the same, and the other ranks fail at once."""
        self._executor.failed.set(error)

    def begin(self) -> None:
        """Start a step."""
        self._under_way = True
        self.check.begin()
        self._sample, self.sample_next = self.sample_next, False
        self._loss_scale = float(self.config.loss_scale())

    def _bucket(self, flat: Tensor, names: tuple[str, ...], index: int) -> Bucket:
        """The bucket's collectives and buffers, made anew when DDP has changed its layout."""
        bucket = self._buckets.get(index)
        if bucket is None or not bucket.fits(flat, names):
            ways = [(self._ways.collectives[name], self.segment(name)) for name in names]
            # a stream runs one stage after another, whatever their size
            most = self.config.piece_numel * self.world_size if flat.is_cpu else max(flat.numel(), 1)
            used, setting = set(self._ways.collectives.values()), self._setting(flat.device)
            bucket = self._buckets[index] = Bucket(flat, names, ways, used, setting, most)
        return bucket

    def segment(self, name: str) -> Segment:
        """How a parameter travels, in a bucket of its own."""
        return self._ways.segment(name)

    def piece_numel(self, name: str, owner: int) -> int:
        """Elements of a parameter that a rank owns in phase 2."""
        start, stop = self.segment(name).piece(self.world_size, owner)
        return stop - start

    def _setting(self, device: torch.device) -> Setting:
        return Setting(
            rank=self.rank,
            world_size=self.world_size,
            seed=self.config.seed,
            channels=self._channels,
            local=self.feedback.local,
            shard=self.feedback.shard,
            metrics=self.metrics,
            device=device,
            bases=self.feedback.bases,
            plain=self._ways.plain,
            local_world_size=self.config.local_world_size,
        )

    def _run(self, bucket: Bucket, number: int, flat: Tensor, step: Step, last: bool) -> Iterator[Pending]:
        """The stages of one part of a bucket, for the executor."""
        if number == 0:
            work = bucket.open(flat)
            if self.learner.adaptive is not None:
                self.learner.measure([self.parameters[name] for name in bucket.names], work, step)
        yield from bucket.average(number, flat, step)
        if self.has_feedback:
            self.check.add(bucket.mean(number, flat), flat.dtype)
        if last and number == len(bucket.parts) - 1:
            self.finish()

    def judge(self) -> bool | Tensor:
        """Whether what this step lost may enter the residuals; see `finite.StepCheck.verdict`."""
        return self.check.verdict(self._loss_scale, self.step) if self.has_feedback else True

    def finish(self, good: bool | Tensor | None = None) -> None:
        """End a step.

        Args:
            good: whether it may enter the residuals; `judge` decides if it is not said.
        """
        self.feedback.finish(self.judge() if good is None else good)
        self.metrics.record(Event("step", 1, self.step))
        self.step += 1
        self._under_way = False

    def discard_step(self) -> None:
        """The gradients of the last step were not applied: residuals are again what they were before it.

        Call it on all ranks, after a backward and before the next one. A second call does nothing.

        Raises:
            ConfigError: a step is under way.
        """
        if self._under_way and self.failure is None:
            raise ConfigError("discard_step() is for a step that has ended: call it after backward()")
        self.feedback.revert()
        self.check.revert()

    def not_applied(self, unused: Mapping[str, bool | Tensor]) -> None:
        """Of some parameters the mean of the last step was thrown away: what was owed them still is.

        Args:
            unused: by name, whether it was; a tensor of one bool if only the device knows.
        """
        self.feedback.revert_unused(unused)

    def stats(self, parameters: bool = False) -> Stats:
        """Totals so far, and per parameter if asked."""
        return self.metrics.stats(self._ways.stats() if parameters else {})

    @property
    def failure(self) -> BaseException | None:
        """What stopped the averaging, None while it works."""
        return self._executor.failure

    def close(self) -> None:
        """End the threads and connections; afterwards `average` is a plain all-reduce. Idempotent."""
        if self._release.alive:
            self._executor.close()
        self._ways, self.learner.policy = self._nothing, None
        self.release()

    def release(self) -> None:
        """End the threads and connections without waiting for an exchange: nobody will average any more.

        The residuals can still be read and saved; what a step would write is given back.
        """
        self._buckets.clear()
        self.feedback.freeze()
        self._release()
