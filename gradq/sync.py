"""GradientSync: the main path. A bucket of gradients goes in, their mean over ranks comes out.

The life of a gradient:

1. A hook hands over a bucket; its parameters are looked up once per bucket layout (`_bucket`).
2. The policy has said which codec each parameter travels in; small ones travel exact in the same payload.
3. The bucket is cut into parts (`collectives/parts.py`). For each the collective encodes, exchanges, averages
   and decodes, stage by stage on the executor's threads (`_run`; read `collectives/direct.py`, then
   `two_phase.py`).
4. After the last bucket of a step the residuals are committed, unless a gradient was not finite (`finish`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from gradq import wire
from gradq.adaptive import Learner
from gradq.collectives import Bucket, Executor, Segment, Setting, Step, choose, open_channels
from gradq.collectives.base import Pending
from gradq.collectives.streams import done
from gradq.feedback import Feedback, still_finite
from gradq.handshake import agree
from gradq.metrics import Event, Metrics, ParameterStats, Stats
from gradq.policy import ParameterInfo, Plan, Policy, check_plan
from gradq.sync_config import SyncConfig

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
        self.feedback = Feedback(config.residual_dtype)
        self.feedback.to(self.device)
        self.step = 0
        self.sample_next = False
        self._finite: bool | Tensor = True
        self._sample, self._loss_scale = False, 1.0
        self._buckets: dict[int, Bucket] = {}
        self._executor = Executor.on(self.device)
        self.plan: Plan = {}
        self.learner = Learner(group, self.metrics, config.seed)
        self.set_policy(policy, label)
        count = max(2, self._collective.num_channels)
        self._channels, self._close_channels = open_channels(
            group, count, self.metrics, config.timeout, self.device
        )

    def set_policy(self, policy: Policy | None, label: str) -> None:
        """Use another policy from the next step on. Call it between steps, on all ranks: they compare notes.

        Local residuals of parameters that still use feedback are kept, shard residuals if the piece that
        this rank owns is the same too; all others are dropped, and a log line says so.

        Raises:
            ConfigError: the plan does not fit the model; MismatchError: ranks disagree. The old policy stays.
        """
        plan = dict(policy.plan(list(self.parameters.values()))) if policy is not None else {}
        if plan:
            check_plan(plan, self.parameters, label)
        agree(self._notes(plan, label), self.group)
        self.learner.follow(policy, label, self.plan, plan, self.step)
        if plan and plan == self.plan:
            return
        unchanged = {name for name, entry in plan.items() if entry == self.plan.get(name)}
        before, self.plan = self._shard_pieces(), plan
        self._buckets.clear()
        payload_bytes = int(sum(e.payload_bytes(self.parameters[name]) for name, e in plan.items()))
        self._collective = choose(self.config.collective, self.world_size, payload_bytes)
        self._collectives = {
            name: choose(entry.resolve(self.config.collective), self.world_size, plain=self._collective)
            for name, entry in plan.items()
        }
        self._has_feedback = any(entry.feedback1 or entry.feedback2 for entry in self.plan.values())
        dropped = self.feedback.local.keep({n for n, entry in self.plan.items() if entry.feedback1})
        kept = {name for name, piece in self._shard_pieces().items() if before.get(name) == piece}
        dropped += self.feedback.shard.keep(kept)
        self.feedback.bases.keep(unchanged)
        if dropped:
            _log.info("new plan: dropped the residuals of %d parameters (%s, ...)", len(dropped), dropped[0])
        if self.world_size > 1:
            for codec in {codec for entry in plan.values() for codec in (entry.phase1, entry.phase2)}:
                codec.warm_up(self.device, self.world_size)
            for collective in set(self._collectives.values()):
                collective.warm_up(self.device)

    def _shard_pieces(self) -> dict[str, tuple[int, int]]:
        """The part of each parameter of which this rank keeps a shard residual."""
        segments = [self.segment(name) for name in self.plan]
        return {s.name: s.piece(self.world_size, self.rank) for s in segments if s.feedback2}

    def _notes(self, plan: Plan, label: str) -> dict[str, object]:
        """What all ranks must have in common."""
        described = {
            name: (info.shape, str(info.dtype), str(plan.get(name, "plain")))
            for name, info in self.parameters.items()
        }
        config = self.config
        return {
            "wire format": wire.VERSION,
            "spec": label,
            "seed": config.seed,
            "collective": config.collective,
            "local_world_size": config.local_world_size,
            "residual_dtype": config.residual_dtype,
            "piece_numel": config.piece_numel,
            "step": self.step,
            "parameters": described,
        }

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
        first = index == 0 if first is None else first
        if first:
            self.begin()
        if self.world_size == 1:
            return self._pass_through(flat, last)
        if first and self.learner.learns(self.step):
            self.set_policy(self.learner.policy, self.learner.label)
        dense_bytes = wire.ring_bytes(flat.nbytes, self.world_size)
        self.metrics.record(Event("dense_bytes", dense_bytes, self.step, index))
        if not self.plan:
            return self._all_reduce(flat, dense_bytes, index, last)
        bucket = self._bucket(flat, tuple(names), index)
        step = Step(self.step, index, self._loss_scale, self._sample)
        futures = [
            self._executor.submit(self._run(bucket, number, flat, step, last), flat)
            for number in range(len(bucket.parts))
        ]
        return futures[-1]  # the others are done before it

    def begin(self) -> None:
        """Start a step."""
        self._finite, self._sample = True, self.sample_next
        self.sample_next = False
        self._loss_scale = float(self.config.loss_scale())

    def _bucket(self, flat: Tensor, names: tuple[str, ...], index: int) -> Bucket:
        """The bucket's collectives and buffers, made anew when DDP has changed its layout."""
        bucket = self._buckets.get(index)
        if bucket is None or not bucket.fits(flat, names):
            ways = [(self._collectives[name], self.segment(name)) for name in names]
            # a stream runs one stage after another, whatever their size
            most = self.config.piece_numel * self.world_size if flat.is_cpu else max(flat.numel(), 1)
            used, setting = set(self._collectives.values()), self._setting(flat.device)
            bucket = self._buckets[index] = Bucket(flat, names, ways, used, setting, most)
        return bucket

    def segment(self, name: str) -> Segment:
        """How a parameter travels, in a bucket of its own."""
        info, entry, local = self.parameters[name], self.plan[name], self.config.local_world_size
        return Segment(
            name=name,
            start=0,
            numel=info.numel,
            rotation=info.index,
            phase1=entry.phase1,
            phase2=entry.phase2,
            feedback1=entry.feedback1,
            feedback2=entry.feedback2 and self._collectives[name].has_phase2(self.world_size, local),
            matrix=info.matrix,
            low_rank=min(entry.low_rank, *info.matrix),
            local_world_size=local,
        )

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
            plain=self._collective,
            local_world_size=self.config.local_world_size,
        )

    def _run(self, bucket: Bucket, number: int, flat: Tensor, step: Step, last: bool) -> Iterator[Pending]:
        """The stages of one part of a bucket, for the executor."""
        if number == 0:
            self.learner.measure([self.parameters[name] for name in bucket.names], bucket.open(flat), step)
        yield from bucket.average(number, flat, step)
        if self._has_feedback:
            for piece in bucket.doubtful(number, flat):
                self._finite = still_finite(self._finite, piece)
        if last and number == len(bucket.parts) - 1:
            self.finish()

    def finish(self) -> None:
        """End a step."""
        self.feedback.finish(self.feedback.settle(self._finite))
        self.metrics.record(Event("step", 1, self.step))
        self.step += 1

    def _pass_through(self, flat: Tensor, last: bool) -> Future[Tensor]:
        """World size 1: the mean is the gradient."""
        if last:
            self.finish()
        return done(flat)

    def _all_reduce(self, flat: Tensor, dense_bytes: int, index: int, last: bool) -> Future[Tensor]:
        """The spec "none": what DDP does without a hook, counted."""
        self.metrics.record(Event("wire_bytes", dense_bytes, self.step, index))
        future = dist.all_reduce(flat.div_(self.world_size), group=self.group, async_op=True).get_future()
        if last:
            self.finish()
        averaged: Future[Tensor] = future.then(lambda done: done.value()[0])
        return averaged

    def stats(self, parameters: bool = False) -> Stats:
        """Totals so far, and per parameter if asked."""
        table = {}
        for name, entry in self.plan.items() if parameters else ():
            info = self.parameters[name]
            bits = 8 * entry.payload_bytes(info) / max(info.numel, 1)
            table[name] = ParameterStats(info.numel, str(entry), bits)
        return self.metrics.stats(table)

    @property
    def failure(self) -> BaseException | None:
        """What stopped the averaging, None while it works."""
        return self._executor.failure

    def close(self) -> None:
        """End the threads and the process groups; afterwards `average` is a plain all-reduce. Idempotent."""
        self.plan, self._has_feedback, self.learner.policy = {}, False, None
        self._executor.close()
        self._close_channels()
        self._close_channels = lambda: None
