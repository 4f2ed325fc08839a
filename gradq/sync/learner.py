"""What `sync` does for an adaptive policy: measure its candidates, and plan again on all ranks together.

Where this happens is what keeps it safe. Measuring is part of a bucket's first stage, on the worker thread:
it is local. Planning again needs a collective on the group that DDP uses too, so it belongs to the main
thread; there, in the hook of a step's first bucket: every rank issues it at the same place among DDP's own
collectives, no bucket of the last step is under way (DDP has waited for all), and none of this step has been
encoded.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gradq import rng
from gradq.collectives import Step
from gradq.metrics import Event, Metrics
from gradq.policy import AdaptivePolicy, ParameterInfo, Plan, Policy
from gradq.sync.layout import work_dtype
from gradq.transport.handshake import gather, meeting

__all__ = ["Learner"]

_log = logging.getLogger("gradq")


class Learner:
    """Serves the policy in use; does nothing for one that is not adaptive.

    Args:
        group: the ranks.
        metrics: takes the measurements, and hands them to the policy.
        seed: the seed of the run.
    """

    def __init__(self, group: dist.ProcessGroup, metrics: Metrics, seed: int) -> None:
        self.policy: Policy | None = None
        self.label = ""
        self._group, self._metrics, self._seed = group, metrics, seed

    @property
    def adaptive(self) -> AdaptivePolicy | None:
        """The policy in use if it is adaptive."""
        return self.policy if isinstance(self.policy, AdaptivePolicy) else None

    def follow(self, policy: Policy | None, label: str, before: Plan, plan: Plan, step: int) -> None:
        """A plan becomes current: note whose it is, let an adaptive policy see the events, count changes."""
        if self.adaptive is not None and policy is self.policy:
            changed = [name for name, entry in plan.items() if entry != before.get(name)]
            self._metrics.record(Event("replan", len(changed), step))
            if changed:
                _log.info(
                    "step %d: %d parameters get another codec (%s, ...)", step, len(changed), changed[0]
                )
            return
        if self.adaptive is not None:
            self._metrics.remove_sink(self.adaptive.observe)
        self.policy, self.label = policy, label
        if self.adaptive is not None:
            self._metrics.add_sink(self.adaptive.observe)

    def is_due(self, step: int) -> bool:
        """Whether to plan again before this step; the same on all ranks."""
        return self.adaptive is not None and self.adaptive.is_due(step)

    def learn(self) -> None:
        """Give the policy all ranks' measurements; collective.

        Raises:
            MismatchError: the policy failed on another rank.
        """
        policy = self.adaptive
        assert policy is not None
        with meeting(self._group, "plan again"):
            measured = policy.measured()
        everyone = gather(measured, self._group)
        with meeting(self._group, "plan again"):
            policy.learn(everyone)

    def measure(self, parameters: Sequence[ParameterInfo], flat: Tensor, step: Step) -> None:
        """Record the energy of gradients and the errors that the policy's candidates make on them.

        Without residuals: these are facts of the gradients, whatever the plan. A step that is sampled costs
        one encode and one decode more for every candidate; the other steps nothing.

        Args:
            parameters: what flat holds, one after another.
            flat: [n], in any dtype that gradients have.
            step: the gradients of a step are `loss_scale` times too large; what is recorded is not.
        """
        policy, start = self.adaptive, 0
        if policy is None:
            return
        for parameter in parameters:
            x, start = flat[start : start + parameter.numel], start + parameter.numel
            candidates = policy.candidates(step.index, parameter.name)
            x = x.to(work_dtype(x.dtype)) if candidates else x
            energy = float(x.double().square().sum()) if candidates else 0.0
            if not candidates or not math.isfinite(energy):
                continue
            with self._metrics.timed("measure_ms", step=step.index, bucket=step.bucket, phase=0):
                where, unit = (step.index, step.bucket, 0, parameter.name), step.loss_scale**2
                self._metrics.record(Event("gradient_energy", energy / unit, *where))
                key = rng.dither_key(self._seed, step.index, rng.name_id(parameter.name), rng.CANDIDATE)
                decoded = torch.empty_like(x)
                for label, codec in candidates.items():
                    payload = torch.empty(codec.nbytes(x.numel()), dtype=torch.uint8, device=x.device)
                    codec.encode(x, payload, context=rng.EncodeContext(key=key))
                    codec.decode(payload, decoded)
                    error = float(decoded.sub_(x).double().square().sum())
                    self._metrics.record(Event("candidate_error", error / unit, *where, label))
