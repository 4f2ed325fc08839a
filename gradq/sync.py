"""GradientSync: the main path. A bucket of gradients goes in, their mean over ranks comes out.

The life of a gradient:

1. A hook hands over a bucket; its parameters are looked up once per bucket layout (`_bucket`).
2. The policy has said which codec each parameter travels in; small ones travel exact in the same payload.
3. The collective encodes, exchanges, averages and decodes, stage by stage on the executor's threads (`_run`;
   read `collectives/direct.py`, then `two_phase.py`).
4. After the last bucket of a step the residuals are committed, unless a gradient was not finite (`_finish`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from gradq import wire
from gradq.collectives import Collective, Executor, Segment, Setting, Step, choose, open_channels
from gradq.collectives.base import Pending
from gradq.collectives.streams import done
from gradq.errors import ConfigError
from gradq.feedback import Feedback, still_finite
from gradq.handshake import agree
from gradq.metrics import Event, Metrics, ParameterStats, Stats
from gradq.policy import ParameterInfo, Plan, Policy

__all__ = ["GradientSync", "SyncConfig"]

_log = logging.getLogger("gradq")


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """What stays the same for a run.

    Attributes:
        seed: of the dither.
        collective: "auto", "direct" or "two_phase".
        residual_dtype: "fp32" or "bf16".
        timeout: of an exchange; None takes the process group's.
        loss_scale: asked at the start of every step.
    """

    seed: int = 0
    collective: str = "auto"
    residual_dtype: str = "fp32"
    timeout: timedelta | None = None
    loss_scale: Callable[[], float] = lambda: 1.0


@dataclass
class _Bucket:
    names: tuple[str, ...]
    dtype: torch.dtype
    collective: Collective
    work: Tensor | None  # fp32 copy of a bucket in a narrower dtype


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
        self.parameters = {parameter.name: parameter for parameter in parameters}
        self.group, self.config = group, config
        self.rank, self.world_size = group.rank(), group.size()
        self.device = device or torch.device("cpu")
        self.metrics = Metrics()
        self.feedback = Feedback(config.residual_dtype)
        self.feedback.to(self.device)
        self.step = 0
        self.sample_next = False
        self._finite: bool | Tensor = True
        self._sample, self._loss_scale = False, 1.0
        self._buckets: dict[int, _Bucket] = {}
        self._executor = Executor.on(self.device)
        self.set_policy(policy, label)
        self._channels, self._close_channels = open_channels(
            group, 2, self.metrics, config.timeout, self.device
        )

    def set_policy(self, policy: Policy | None, label: str) -> None:
        """Use another policy from the next step on. Call it between steps, on all ranks: they compare notes.

        Local residuals of parameters that still use feedback are kept; all others, and the shard residuals,
        are dropped, and a log line says so.

        Raises:
            ConfigError: the plan leaves parameters out; MismatchError: ranks disagree. The old policy stays.
        """
        plan = dict(policy.plan(list(self.parameters.values()))) if policy is not None else {}
        if plan and plan.keys() != self.parameters.keys():
            wrong = sorted(plan.keys() ^ self.parameters.keys())
            raise ConfigError(
                f"the policy {label} must plan for exactly the parameters it is given, not {wrong}"
            )
        agree(self._notes(plan, label), self.group)
        self.plan = plan
        self._buckets.clear()
        payload_bytes = sum(e.phase1.nbytes(self.parameters[name].numel) for name, e in plan.items())
        self._collective = choose(self.config.collective, self.world_size, payload_bytes)
        self._has_feedback = any(entry.feedback1 or entry.feedback2 for entry in self.plan.values())
        dropped = self.feedback.local.keep({n for n, entry in self.plan.items() if entry.feedback1})
        dropped += self.feedback.shard.keep(set())
        if dropped:
            _log.info("new plan: dropped the residuals of %d parameters (%s, ...)", len(dropped), dropped[0])
        if self.world_size > 1:
            for codec in {codec for entry in plan.values() for codec in (entry.phase1, entry.phase2)}:
                codec.warm_up(self.device, self.world_size)

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
            "residual_dtype": config.residual_dtype,
            "step": self.step,
            "parameters": described,
        }

    def average(self, flat: Tensor, names: Sequence[str], *, index: int, last: bool) -> Future[Tensor]:
        """Average one bucket.

        Args:
            flat: the gradients of the named parameters, one after another; replaced by their mean.
            names: of the parameters, in order.
            index: of the bucket; 0 starts a step.
            last: whether this bucket ends the step.

        Returns:
            A future of flat.
        """
        if index == 0:
            self._finite, self._sample = True, self.sample_next
            self.sample_next = False
            self._loss_scale = float(self.config.loss_scale())
        if self.world_size == 1:
            return self._pass_through(flat, last)
        dense_bytes = wire.ring_bytes(flat.nbytes, self.world_size)
        self.metrics.record(Event("dense_bytes", dense_bytes, self.step, index))
        if not self.plan:
            return self._all_reduce(flat, dense_bytes, index, last)
        bucket = self._bucket(flat, tuple(names), index)
        step = Step(self.step, index, self._loss_scale, self._sample)
        return self._executor.submit(self._run(bucket, flat, step, last), flat)

    def _bucket(self, flat: Tensor, names: tuple[str, ...], index: int) -> _Bucket:
        """The bucket's collective and buffers, made anew when DDP has changed its layout."""
        bucket = self._buckets.get(index)
        if bucket is None or bucket.names != names or bucket.dtype != flat.dtype:
            segments, start = [], 0
            for name in names:
                segments.append(self.segment(name, start))
                start += segments[-1].numel
            assert start == flat.numel(), (
                f"bucket {index} has {flat.numel()} elements, its parameters {start}"
            )
            work_dtype = flat.dtype if flat.dtype == torch.float64 else torch.float32
            work = None if flat.dtype == work_dtype else torch.empty_like(flat, dtype=work_dtype)
            collective = self._collective(segments, work_dtype, self._setting(flat.device))
            bucket = self._buckets[index] = _Bucket(names, flat.dtype, collective, work)
        return bucket

    def segment(self, name: str, start: int = 0) -> Segment:
        """How a parameter travels if it starts at this element of a bucket."""
        info, entry = self.parameters[name], self.plan[name]
        return Segment(
            name=name,
            start=start,
            numel=info.numel,
            rotation=info.index,
            phase1=entry.phase1,
            phase2=entry.phase2,
            feedback1=entry.feedback1,
            feedback2=entry.feedback2 and self._collective.num_channels > 1,
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
        )

    def _run(self, bucket: _Bucket, flat: Tensor, step: Step, last: bool) -> Iterator[Pending]:
        """The stages of one bucket, for the executor."""
        work = flat if bucket.work is None else bucket.work.copy_(flat)
        yield from bucket.collective.average(work, step)
        if work is not flat:
            flat.copy_(work)
        if self._has_feedback:
            self._finite = still_finite(self._finite, flat)
        if last:
            self._finish()

    def _finish(self) -> None:
        self.feedback.finish(self.feedback.settle(self._finite))
        self.metrics.record(Event("step", 1, self.step))
        self.step += 1

    def _pass_through(self, flat: Tensor, last: bool) -> Future[Tensor]:
        """World size 1: the mean is the gradient."""
        if last:
            self._finish()
        return done(flat)

    def _all_reduce(self, flat: Tensor, dense_bytes: int, index: int, last: bool) -> Future[Tensor]:
        """The spec "none": what DDP does without a hook, counted."""
        self.metrics.record(Event("wire_bytes", dense_bytes, self.step, index))
        future = dist.all_reduce(flat.div_(self.world_size), group=self.group, async_op=True).get_future()
        if last:
            self._finish()
        averaged: Future[Tensor] = future.then(lambda done: done.value()[0])
        return averaged

    def stats(self, parameters: bool = False) -> Stats:
        """Totals so far, and per parameter if asked."""
        table = {}
        for name, entry in self.plan.items() if parameters else ():
            numel = self.parameters[name].numel
            table[name] = ParameterStats(numel, str(entry), entry.phase1.wire_bits_per_element(numel))
        return self.metrics.stats(table)

    @property
    def failure(self) -> BaseException | None:
        """What stopped the averaging, None while it works."""
        return self._executor.failure

    def close(self) -> None:
        """End the threads and the process groups; afterwards `average` is a plain all-reduce. Idempotent."""
        self.plan, self._has_feedback = {}, False
        self._executor.close()
        self._close_channels()
        self._close_channels = lambda: None
