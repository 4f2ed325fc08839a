"""What collectives need of a transport: a channel that posts exchanges, and a way to wait for one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from gradq import wire

__all__ = ["Channel", "Pending"]


class Pending(Protocol):
    """An exchange under way."""

    def wait(self) -> None:
        """Return when everything has arrived; raise if it cannot."""


class Channel(Protocol):
    """A way to reach all peers that one stage has for itself."""

    def post(self, send: Sequence[Tensor], receive: Sequence[Tensor], header: wire.Header) -> Pending:
        """Start to send send[r] to every rank r and to receive receive[r] from it; own entries are unused.

        Args:
            send: W messages, uint8; the header is written into their first bytes. An empty one is not sent.
            receive: W buffers of the expected sizes; empty where the peer's message is.
            header: this rank's header; a received one must equal it but for the sender.
        """
