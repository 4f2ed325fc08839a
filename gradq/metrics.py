"""What happened and what it cost: events, and the sinks that take them.

Every part of gradq reports through `Metrics.record`; `Stats` is the built-in sink's summary, and any callable
may be added with `Metrics.add_sink`. Sinks are called from the worker threads and must be quick.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

__all__ = ["Event", "Metrics", "ParameterStats", "Stats"]


@dataclass(frozen=True)
class Event:
    """One measurement.

    Attributes:
        kind: "encode_ms", "exchange_ms", "decode_ms", "wire_bytes", "intra_node_bytes", "dense_bytes",
            "gather_bytes" and "dense_gather_bytes" (parameters that FSDP2 gathers; in no other kind),
            "step", "error_energy" or "signal_energy" (sums of squares, of a sampled step); of an adaptive
            policy: "gradient_energy", "candidate_error" (sums of squares, unscaled), "measure_ms", and
            "replan" (parameters that got another codec).
        value: the measurement, in the unit that the kind's suffix names.
        step: optimizer step.
        bucket: index of the bucket, -1 where it does not apply.
        phase: 1, 2, ..., 0 where it does not apply.
        parameter: name of the parameter, "" where it does not apply.
        codec: the candidate whose error it is, "" where it does not apply.
    """

    kind: str
    value: float
    step: int
    bucket: int = -1
    phase: int = 0
    parameter: str = ""
    codec: str = ""


@dataclass(frozen=True)
class ParameterStats:
    """How one parameter travels.

    Attributes:
        numel: elements.
        codec: spec of its codec, "phase 1+phase 2" where they differ.
        wire_bits_per_element: bits on the wire in phase 1, scales included.
        nmse: ‖x - Q(x)‖² / ‖x‖² of phase 1 on this rank in the sampled steps, None if none was sampled.
    """

    numel: int
    codec: str
    wire_bits_per_element: float
    nmse: float | None = None


@dataclass(frozen=True)
class Stats:
    """Totals of this rank since the start.

    Attributes:
        steps: finished optimizer steps.
        dense_bytes: what a ring all-reduce of the gradients in their own dtype would have sent.
        wire_bytes: payload bytes sent, scales, padding and headers included (TCP's own headers are not).
        intra_node_bytes: those of them that stayed inside the node, where a collective knows the nodes.
        gather_bytes: those of them that carried parameters (FSDP2 with `gather_spec`); dense_bytes then holds
            what FSDP would have sent of them too.
        encode_ms: time spent encoding (all phases, worker thread).
        exchange_ms: time between posting and completing exchanges; overlapping ones both count.
        decode_ms: time spent decoding and averaging.
        nmse: ‖x - Q(x)‖² / ‖x‖² of phase 1 over the sampled steps (`measure_next_step`), None if none was.
        parameters: per parameter, by name; empty unless asked for.
    """

    steps: int = 0
    dense_bytes: int = 0
    wire_bytes: int = 0
    encode_ms: float = 0.0
    exchange_ms: float = 0.0
    decode_ms: float = 0.0
    nmse: float | None = None
    intra_node_bytes: int = 0
    gather_bytes: int = 0
    parameters: dict[str, ParameterStats] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Compression ratio, dense bytes / wire bytes: higher is better; 1.0 before the first step."""
        return self.dense_bytes / self.wire_bytes if self.wire_bytes else 1.0

    @property
    def inter_node_bytes(self) -> int:
        """What left the node; all of wire_bytes unless the collective knows the nodes."""
        return self.wire_bytes - self.intra_node_bytes

    def plus(self, other: Stats) -> Stats:
        """These figures with another's bytes and times added."""
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in _SUMS})

    def __str__(self) -> str:
        """One line a person can read, per step."""
        steps = max(self.steps, 1)
        nmse = "" if self.nmse is None else f", nmse {self.nmse:.2e}"
        inside, gathered = self.intra_node_bytes / steps / 1e6, self.gather_bytes / steps / 1e6
        return (
            f"{self.steps} steps: {self.wire_bytes / steps / 1e6:.3f} MB a step on the wire"
            f"{f' ({inside:.3f} inside the node)' if inside else ''}"
            f"{f' ({gathered:.3f} of parameters)' if gathered else ''}, "
            f"{self.ratio:.2f}x fewer than dense; encode {self.encode_ms / steps:.2f} ms, "
            f"exchange {self.exchange_ms / steps:.2f} ms, decode {self.decode_ms / steps:.2f} ms{nmse}"
        )


_BYTES = ("dense_bytes", "wire_bytes", "intra_node_bytes", "gather_bytes")
_SUMS = (*_BYTES, "encode_ms", "exchange_ms", "decode_ms")


class Metrics:
    """Collects events of all threads of one rank."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals: dict[str, float] = defaultdict(float)
        self._energies: dict[tuple[str, str], float] = defaultdict(float)
        self._sinks: list[Callable[[Event], None]] = []

    def add_sink(self, sink: Callable[[Event], None]) -> None:
        """Call sink(event) for every later event, from the thread that caused it."""
        with self._lock:
            self._sinks.append(sink)

    def remove_sink(self, sink: Callable[[Event], None]) -> None:
        """Stop calling a sink."""
        with self._lock:
            self._sinks.remove(sink)

    def record(self, event: Event) -> None:
        """Count an event and hand it to the sinks."""
        with self._lock:
            if not math.isfinite(event.value):
                pass  # a sampled step with NaN or Inf in it says nothing of the codec
            elif event.kind in ("error_energy", "signal_energy"):
                self._energies[event.parameter, event.kind] += event.value
            elif not event.parameter:
                self._totals[event.kind] += event.value
            sinks = tuple(self._sinks)
        for sink in sinks:
            sink(event)

    @contextmanager
    def timed(self, kind: str, *, step: int, bucket: int, phase: int) -> Iterator[None]:
        """Record the duration of a block of code as an event."""
        start = time.perf_counter()
        yield
        self.record(Event(kind, 1e3 * (time.perf_counter() - start), step, bucket, phase))

    def stats(self, parameters: dict[str, ParameterStats] | None = None) -> Stats:
        """Totals so far; parameters are filled with their sampled errors."""
        with self._lock:
            totals, energies = dict(self._totals), dict(self._energies)
        errors = sum(value for (_, kind), value in energies.items() if kind == "error_energy")
        signals = sum(value for (_, kind), value in energies.items() if kind == "signal_energy")
        totals["dense_bytes"] = totals.get("dense_bytes", 0.0) + totals.pop("dense_gather_bytes", 0.0)
        totals["wire_bytes"] = totals.get("wire_bytes", 0.0) + totals.get("gather_bytes", 0.0)
        figures = {name: type(getattr(Stats, name))(totals.get(name, 0)) for name in _SUMS}
        filled = {}
        for name, entry in (parameters or {}).items():
            nmse = _nmse(energies.get((name, "error_energy")), energies.get((name, "signal_energy")))
            filled[name] = ParameterStats(entry.numel, entry.codec, entry.wire_bits_per_element, nmse)
        return Stats(
            steps=int(totals.get("step", 0)),
            nmse=_nmse(errors, signals) if energies else None,
            parameters=filled,
            **figures,
        )


def _nmse(error: float | None, signal: float | None) -> float | None:
    if error is None or signal is None:
        return None
    if signal == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / signal
