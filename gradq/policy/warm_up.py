"""Warm-up: what must be compiled before a plan is used."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from gradq.policy.base import Plan

__all__ = ["warm_up_calls"]


def warm_up_calls(plan: Plan, device: torch.device, world_size: int) -> list[Callable[[], None]]:
    """Calls that run every kernel of the plan's codecs once, for `gradq.kernels.turns.in_turns`.

    Args:
        plan: the plan that will be used.
        device: device of the gradients.
        world_size: number of ranks.

    Raises:
        KernelError: a codec has no kernels for the device (also when the calls are made).
    """
    # what low rank feeds back never goes through a codec
    used = {(entry.phase1, entry.feedback1 and not entry.low_rank) for entry in plan.values()}
    used |= {(entry.phase2, entry.feedback2) for entry in plan.values()}
    return [partial(codec.warm_up, device, world_size, feedback) for codec, feedback in sorted(used, key=str)]
