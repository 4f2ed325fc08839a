"""The cost model: how long a step takes over a link of a given rate, from measured parts."""

from __future__ import annotations

import math

from gradq.errors import ConfigError

__all__ = ["expected_step_ms"]


def expected_step_ms(compute_ms: float, codec_ms: float, wire_bytes: float, gbps: float) -> float:
    """Expected time of a training step over a link: computing, then the codec, then the link, one by one.

        compute_ms + codec_ms + 8 * wire_bytes / rate

    Nothing is assumed to overlap, so a scheduler that overlaps does better, with every codec. Left out are
    the latency of the link and what the exchange costs the processor; the latter grows with the bytes, so
    leaving it out favours the codec that sends most.

    Args:
        compute_ms: time of forward, backward and optimizer, without communication.
        codec_ms: encoding and decoding, in a step.
        wire_bytes: the bytes that the busiest rank sends in a step; receiving as much is free on a
            full-duplex link.
        gbps: rate of that rank's link, in 10**9 bits a second.

    Returns:
        Milliseconds.

    Raises:
        ConfigError: the rate is not positive, or another argument is negative or not finite.

    Example:
        >>> expected_step_ms(compute_ms=100, codec_ms=0, wire_bytes=25_000_000, gbps=1)
        300.0
    """
    for name, value in (("compute_ms", compute_ms), ("codec_ms", codec_ms), ("wire_bytes", wire_bytes)):
        if not (value >= 0 and math.isfinite(value)):
            raise ConfigError(f"{name}={value!r}: it must be a finite number of at least 0")
    if not gbps > 0:
        raise ConfigError(f"gbps={gbps!r}: the rate of a link must be positive")
    return compute_ms + codec_ms + wire_bytes * 8 / (gbps * 1e6)
