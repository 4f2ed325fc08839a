"""Warm-up: what must be compiled before codecs are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch

from gradq.codecs import Codec

__all__ = ["warm_up_calls"]


def warm_up_calls(
    codecs: Iterable[tuple[Codec, bool]], device: torch.device, world_size: int
) -> list[Callable[[], None]]:
    """Calls that run every kernel of some codecs once, for `gradq.kernels.turns.in_turns`.

    Args:
        codecs: the codecs that will be used, each with or without a residual.
        device: device of the gradients.
        world_size: number of ranks.

    Raises:
        KernelError: a codec has no kernels for the device (also when the calls are made).
    """
    return [
        partial(codec.warm_up, device, world_size, feedback)
        for codec, feedback in sorted(set(codecs), key=str)
    ]
