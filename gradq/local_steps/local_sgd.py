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

import math
import os
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradq.errors import ConfigError
from gradq.local_steps import checkpoint
from gradq.local_steps.schedule import Schedule
from gradq.local_steps.steps import LocalSteps
from gradq.options import Options
from gradq.policy import Asked

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from gradq.options import OptionFields

__all__ = ["DiLoCo", "LocalSGD"]


class LocalSGD(LocalSteps):
    """Train locally, and replace the parameters by their mean over ranks every so many steps.

    All ranks construct it together; rank 0's parameters (frozen ones too) and buffers are given to all. They
    need one step of the inner optimizer in every iteration of every rank: see `grad_scaler` in
    `gradq.Options`. The training loop stays as it is: averaging happens inside the inner optimizer's `step`::

          optimizer = torch.optim.AdamW(model.parameters())
        + local = gradq.LocalSGD(model, optimizer, "int4", every=8)
          for batch in batches: ...

    Memory, in fp32 elements for each parameter, on the CPU wherever the model is: 1 for the common starting
    point, 1 for the pseudo-gradient, 1 with a delay, 2 with error feedback. On models outside the CPU it was
    not run.

    Args:
        model: a plain module, the same on all ranks; not wrapped in DistributedDataParallel.
        inner_optimizer: the optimizer that the training loop steps; its steps are counted, also if it is one
            that wraps another. Of several, the one that steps last. None: call `step` yourself after every
            iteration, for instance because a rank may leave out steps.
        spec: how pseudo-gradients travel; see `gradq.HookState`.
        options: the options of the run, see `gradq.Options`. The timeout is how long the fastest rank waits
            for the slowest.
        every: the number of inner steps between two averages of a parameter.
        fragments: the number of parts into which the model is cut; they are averaged one after another,
            `every / fragments` steps apart.
        delay: the number of inner steps that an average may take, at most `every // fragments`; 0 waits for
            it on the spot.
        fragment_update_alpha: with a delay, the share of the rank's own parameters that stays when an average
            is applied, from 0 to 1. None adds what was learned meanwhile, see this module. With long delays
            0.5 learned better (benchmarks/diloco.py).
        **overrides: any field of `gradq.Options`, which replaces that of options.

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
        options: Options | None = None,
        *,
        every: int,
        fragments: int = 1,
        delay: int = 0,
        fragment_update_alpha: float | None = None,
        **overrides: Unpack[OptionFields],
    ) -> None:
        schedule = partial(
            Schedule, every=every, fragments=fragments, delay=delay, alpha=fragment_update_alpha
        )
        super().__init__(model, inner_optimizer, spec, schedule, options, overrides)

    def outer_step(self, anchor: Tensor, mean: Tensor, momentum: Tensor | None) -> None:
        """Go to the mean of the ranks; see `LocalSteps.outer_step`."""
        anchor.sub_(mean)

    def state_dict(self) -> dict[str, Any]:
        """All that training needs to continue, model and inner optimizer included. Collective.

        See `gradq.local_steps.checkpoint`.
        """
        return checkpoint.state_dict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state saved by as many ranks; see `gradq.local_steps.checkpoint`."""
        checkpoint.load_state_dict(self, state)

    def load_checkpoint(self, checkpoint_id: str | os.PathLike[str], key: str = "gradq") -> None:
        """See `Handle.load_checkpoint`."""
        checkpoint.load_checkpoint(self, checkpoint_id, key)


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
        inner_optimizer: the optimizer that the training loop steps, AdamW in the paper.
        spec: how pseudo-gradients travel.
        options: see `LocalSGD`.
        every: see `LocalSGD`.
        fragments: see `LocalSGD`.
        delay: see `LocalSGD`.
        fragment_update_alpha: see `LocalSGD`.
        outer_lr: the learning rate of the outer step.
        outer_momentum: μ; 0 is plain SGD.
        **overrides: any field of `gradq.Options`.

    Raises:
        ConfigError, UnsupportedError, MismatchError: see `LocalSGD`.
    """

    has_momentum = True

    def __init__(
        self,
        model: nn.Module,
        inner_optimizer: Optimizer | None,
        spec: Asked = "int4",
        options: Options | None = None,
        *,
        every: int,
        fragments: int = 1,
        delay: int = 0,
        fragment_update_alpha: float | None = None,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        **overrides: Unpack[OptionFields],
    ) -> None:
        self.outer_lr, self.outer_momentum = outer_lr, outer_momentum
        super().__init__(
            model,
            inner_optimizer,
            spec,
            options,
            every=every,
            fragments=fragments,
            delay=delay,
            fragment_update_alpha=fragment_update_alpha,
            **overrides,
        )

    def settings(self) -> str:
        """See `LocalSteps.settings`; with the outer step's."""
        for name, value in (("outer_lr", self.outer_lr), ("outer_momentum", self.outer_momentum)):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"{name}={value!r:.200}: it must be a finite number")
        outer = f"outer_lr={self.outer_lr}, outer_momentum={self.outer_momentum}"
        return f"{super().settings()}, {outer}"

    def outer_step(self, anchor: Tensor, mean: Tensor, momentum: Tensor | None) -> None:
        """Take a step of Nesterov SGD; see `LocalSteps.outer_step`."""
        assert momentum is not None
        momentum.mul_(self.outer_momentum).add_(mean)
        anchor.sub_(mean.add_(momentum, alpha=self.outer_momentum), alpha=self.outer_lr)
