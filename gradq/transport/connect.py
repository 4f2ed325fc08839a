"""Which channels and which executor serve a group and a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist

from gradq.metrics import Metrics
from gradq.transport.channels import open_peer_channels
from gradq.transport.contract import Channel
from gradq.transport.executor import Executor
from gradq.transport.streams import StreamExecutor, open_stream_channels

__all__ = ["BringsChannels", "executor_on", "open_channels"]


@runtime_checkable
class BringsChannels(Protocol):
    """A process group with channels of its own: `gradq.testing.InProcessGroup`."""

    def open_channels(
        self, count: int, metrics: Metrics, timeout: timedelta | None
    ) -> tuple[Sequence[Channel], Callable[[BaseException | None], None]]:
        """See `open_channels`."""


def executor_on(device: torch.device) -> Executor | StreamExecutor:
    """What drives collectives of a device: threads for CPU tensors, a side stream for CUDA tensors."""
    return Executor() if device.type == "cpu" else StreamExecutor(device)


def open_channels(
    group: dist.ProcessGroup,
    count: int,
    metrics: Metrics,
    timeout: timedelta | None = None,
    device: torch.device | None = None,
) -> tuple[Sequence[Channel], Callable[[BaseException | None], None]]:
    """Connect the ranks of a group once more, for gradq alone. All its ranks must call this together.

    Args:
        group: the process group whose ranks take part.
        count: number of channels.
        metrics: receiver of the exchange times.
        timeout: limit for one exchange; the group's own by default.
        device: device of the messages; the CPU by default.

    Returns:
        The channels, and a function that ends their connections; given an error, it leaves word of it for the
        other ranks.

    Raises:
        UnsupportedError: the group does not move CPU tensors over Gloo or MPI.
    """
    if group.size() == 1:
        return [], lambda error: None
    if isinstance(group, BringsChannels):
        return group.open_channels(count, metrics, timeout)
    if device is not None and device.type != "cpu":
        return open_stream_channels(group, count, metrics, timeout, device)
    return open_peer_channels(group, count, metrics, timeout)
