"""The link of every host in a benchmark, and how its rate and delay are written: "1gbit", "0.2ms"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gradq.errors import ConfigError

__all__ = ["Link", "parse_delay", "parse_rate"]

_RATE_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_DELAY_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_NUMBER = r"\s*([0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15})\s*"


def parse_rate(text: str) -> float:
    """Bits a second from "1gbit", "250 Mbit/s", "10Gbps".

    Raises:
        ConfigError: it is not a rate, has no unit, or is zero.
    """
    match = re.fullmatch(rf"{_NUMBER}([kmgt]?)(?:bit|bps|bit/s|b/s)\s*", text.lower())
    rate = 0.0 if match is None else float(match[1]) * _RATE_UNITS[match[2]]
    if not rate > 0:
        raise ConfigError(f"{_short(text)} is not a rate: write for instance 250mbit, 1gbit or 2.5Gbit/s")
    return rate


def parse_delay(text: str) -> float:
    """Milliseconds from "0.2ms", "500us", "1s".

    Raises:
        ConfigError: it is not a delay, or has no unit.
    """
    match = re.fullmatch(rf"{_NUMBER}(us|ms|s)\s*", text.lower())
    if match is None:
        raise ConfigError(f"{_short(text)} is not a delay: write for instance 0.2ms, 500us or 1s")
    return float(match[1]) * _DELAY_UNITS[match[2]]


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


@dataclass(frozen=True, kw_only=True)
class Link:
    """The link of every host, the same in both directions.

    Attributes:
        rate_bps: the rate in bits a second; None leaves it unshaped.
        delay_ms: the delay that is added one way, from host to host.
        loss: the fraction of packets that are dropped.

    Raises:
        ConfigError: a value is out of its range, or not a number.
    """

    rate_bps: float | None = None
    delay_ms: float = 0.0
    loss: float = 0.0

    def __post_init__(self) -> None:
        if self.rate_bps is not None and not 1e5 <= self.rate_bps <= 1e13:
            raise ConfigError(
                f"a link of {self.rate_bps!r} bit/s: from 100 kbit/s to 10 Tbit/s, or leave the rate out"
            )
        if not 0 <= self.delay_ms <= 10_000:
            raise ConfigError(f"a delay of {self.delay_ms!r} ms: from 0 to 10000 ms")
        if not 0 <= self.loss < 1:
            raise ConfigError(
                f"a packet loss of {self.loss!r}: a fraction from 0 to below 1, such as 0.01 for 1 %"
            )

    @property
    def shaped(self) -> bool:
        """Whether anything is asked of it."""
        return self.rate_bps is not None or self.delay_ms > 0 or self.loss > 0

    def __str__(self) -> str:
        """What a table shows: "1 Gbit/s", "unshaped", "100 Mbit/s + 20 ms"."""
        if self.rate_bps is None:
            text = "unshaped"
        elif self.rate_bps >= 1e9:
            text = f"{self.rate_bps / 1e9:g} Gbit/s"
        else:
            text = f"{self.rate_bps / 1e6:g} Mbit/s"
        text += f" + {self.delay_ms:g} ms" if self.delay_ms else ""
        return text + (f", {100 * self.loss:g} % loss" if self.loss else "")
