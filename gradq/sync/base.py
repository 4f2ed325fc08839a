"""Sync: what averages over one group of ranks, for any trainer: its plan, residuals, steps and connections.

`GradientSync` averages whole gradients and `ShardedSync` those of sharded parameters; both say with the hooks
below what they need besides.
"""

from __future__ import annotations

import logging
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from gradq import wire
from gradq.codecs import Codec
from gradq.codecs.uniform.format import BACKENDS
from gradq.collectives import Segment, Setting, Step, num_channels
from gradq.errors import ConfigError
from gradq.metrics import Event, Metrics, Stats
from gradq.options import SyncConfig
from gradq.policy import ParameterInfo, Plan, Policy
from gradq.sync.feedback import Feedback
from gradq.sync.finite import StepCheck
from gradq.sync.learner import Learner
from gradq.sync.plan import ResolvedPlan
from gradq.transport.connect import executor_on, open_channels
from gradq.transport.executor import end
from gradq.transport.handshake import meeting

__all__ = ["Sync"]

_log = logging.getLogger("gradq")


class Sync(ABC):
    """Averages over the ranks of a group.

    Args:
        parameters: all that will ever be averaged; the same on every rank.
        policy: which codec for which parameter; None leaves averaging to torch.
        label: what the policy is called when ranks compare notes.
        group: the ranks. All must construct together: process groups are made.
        config: see `SyncConfig`.
        device: device of the gradients; the CPU by default.

    Attributes:
        parameters: the argument, by name.
        step: number of the next step, from 0.
        resolved: the plan in use, and by which collectives it is carried out.
        feedback: the residuals.
        check: decides whether a step may enter the residuals.
        learner: serves the policy in use.
        metrics: receiver of everything that is measured.
        channels: how messages reach the other ranks; none if there are no others.
        executor: what drives collectives.
        sample_next: whether to measure the error of phase 1 in the next step.
        closed: whether `close` was called.
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
        self.sample_next = self.closed = False
        self._sample, self._loss_scale, self._under_way = False, 1.0, False
        self._compiled: set[object] = set()
        with meeting(group) as notes:
            self.resolved = ResolvedPlan.of(None, label, self.parameters, config, self.world_size)
            self.feedback = Feedback(config.residual_dtype)
            self.feedback.to(self.device)
            self.check = StepCheck(self.device, logs=self.rank == 0)
            self.learner = Learner(group, self.metrics, config.seed)
            self.executor = executor_on(self.device)
            resolved = self.resolve(policy, label)
            notes.update(self.notes(resolved, label))
        self._adopt(resolved, policy, label, "start")
        self.channels, self._close_channels = open_channels(
            group, num_channels(resolved.plain), self.metrics, config.timeout, self.device
        )
        self.executor.failed.tell = self._close_channels
        self._release = weakref.finalize(self, end, os.getpid(), self.executor.stop, self._close_channels)

    # --- what a kind of sync says -------------------------------------------------------------------------

    def resolve(self, policy: Policy | None, label: str) -> ResolvedPlan:
        """What is quick about a policy and can fail on one rank alone; changes nothing."""
        resolved = ResolvedPlan.of(policy, label, self.parameters, self.config, self.world_size)
        if resolved.plan and self.world_size > 1:  # a rank without kernels says so before the others compile
            BACKENDS.on(self.device)
        return resolved

    def notes(self, resolved: ResolvedPlan, label: str) -> dict[str, object]:
        """What all ranks must have in common."""
        config = vars(self.config)
        compared = {name: value for name, value in config.items() if name not in ("timeout", "loss_scale")}
        ours = {"wire format": wire.VERSION, "spec": label, "step": self.step}
        return {**ours, **compared, "parameters": resolved.notes()}

    def codecs(self, resolved: ResolvedPlan) -> set[tuple[Codec, bool]]:
        """The codecs that must be compiled for a plan, each with or without a residual."""
        return resolved.codecs()

    @abstractmethod
    def drop_layouts(self) -> None:
        """Forget how the last plan was laid out, and its buffers."""

    # --- the plan -----------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The codecs in use, by parameter; empty for the spec "none"."""
        return self.resolved.plan

    @property
    def is_plain(self) -> bool:
        """Whether averaging is left to torch: for the spec "none", and once this is closed."""
        return self.closed or not self.plan

    @property
    def has_feedback(self) -> bool:
        """Whether anything keeps a residual."""
        return self.resolved.has_feedback and not self.closed

    def segment(self, name: str) -> Segment:
        """How a parameter travels, in a chunk of its own."""
        return self.resolved.segment(name)

    def shard(self, name: str, owner: int) -> tuple[int, int]:
        """The elements [start, stop) of a parameter whose mean a rank owns."""
        return self.resolved.shard(name, owner)

    def set_policy(self, policy: Policy | None, label: str, *, verb: str = "change its spec") -> None:
        """Use another policy from the next step on. Call it between steps, on all ranks: they compare notes.

        Local residuals of parameters that still use feedback are kept, shard residuals if this rank's shard
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
            resolved = self.resolve(policy, label)
            notes.update(self.notes(resolved, label))
        self._adopt(resolved, policy, label, verb)

    def _adopt(self, resolved: ResolvedPlan, policy: Policy | None, label: str, verb: str) -> None:
        """Make a plan current. Compiling takes seconds: it comes after what fails at once was told to all."""
        codecs = self.codecs(resolved)
        needed = codecs | resolved.used
        if self.world_size > 1 and not needed <= self._compiled:
            with meeting(self.group, verb):
                resolved.warm_up(self.device, codecs)
            self._compiled |= needed
        before, self.resolved = self.resolved, resolved
        self.learner.follow(policy, label, before.plan, resolved.plan, self.step)
        if resolved.plan and resolved.plan == before.plan:
            return
        self.drop_layouts()
        unchanged = {name for name, entry in resolved.plan.items() if entry == before.plan.get(name)}
        shards = before.residual_shards(self.rank)
        kept = {n for n, shard in resolved.residual_shards(self.rank).items() if shards.get(n) == shard}
        dropped = self.feedback.local.keep({n for n, entry in resolved.plan.items() if entry.feedback1})
        dropped += self.feedback.shard.keep(kept)
        self.feedback.bases.keep(unchanged)
        if dropped:
            _log.info("new plan: dropped the residuals of %d parameters (%s, ...)", len(dropped), dropped[0])

    # --- steps --------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Start a step."""
        self._under_way = True
        self.check.begin()
        self._sample, self.sample_next = self.sample_next, False
        self._loss_scale = float(self.config.loss_scale())

    def step_of(self, bucket: int) -> Step:
        """The step under way, as collectives see it, for one bucket."""
        return Step(self.step, bucket, self._loss_scale, self._sample)

    def setting(self, device: torch.device) -> Setting:
        """What collectives of this plan share."""
        return Setting(
            rank=self.rank,
            world_size=self.world_size,
            seed=self.config.seed,
            channels=self.channels,
            feedback=self.feedback,
            metrics=self.metrics,
            device=device,
            local_world_size=self.config.local_world_size,
        )

    def verdict(self) -> bool | torch.Tensor:
        """Whether what this step lost may enter the residuals; see `finite.StepCheck.verdict`."""
        return self.check.verdict(self._loss_scale, self.step) if self.has_feedback else True

    def commit_step(self, verdict: bool | torch.Tensor | None = None) -> None:
        """Commit the residuals of the step under way, and count it: when all of it is averaged.

        Args:
            verdict: whether it may enter the residuals; `verdict` decides if it is not said.
        """
        self.feedback.finish(self.verdict() if verdict is None else verdict)
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

    def not_applied(self, unused: Mapping[str, bool | torch.Tensor]) -> None:
        """Of some parameters the mean of the last step was thrown away: what was owed them still is.

        Args:
            unused: by name, whether it was; a tensor of one bool if only the device knows.
        """
        self.feedback.revert_unused(unused)

    # --- the end ------------------------------------------------------------------------------------------

    def stats(self, parameters: bool = False) -> Stats:
        """Totals so far, and per parameter if asked."""
        return self.metrics.stats(self.resolved.stats() if parameters else {})

    def fail(self, error: BaseException) -> None:
        """This rank cannot go on: later averages raise the same, and the other ranks fail at once."""
        self.executor.failed.set(error)

    @property
    def failure(self) -> BaseException | None:
        """What stopped the averaging, None while it works."""
        return self.executor.failure

    def close(self) -> None:
        """End the threads and connections; afterwards averaging is left to torch. Idempotent."""
        if self._release.alive:
            self.executor.close()
        self.closed, self.learner.policy = True, None
        self.release()

    def release(self) -> None:
        """End the threads and connections without waiting for an exchange: nobody will average any more.

        The residuals can still be read and saved; what a step would write is given back.
        """
        self.drop_layouts()
        self.feedback.freeze()
        self._release()
