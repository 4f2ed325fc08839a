"""Reads a profiler's trace: does the host wait for the GPU inside a range of ours?

The trace is what `torch.profiler` exports for Chrome: events with a category, a name, a start `ts` and a
duration `dur` in microseconds, and the thread. A wait is a call to the CUDA runtime or driver that returns
only when the GPU has got there, and so is a copy to the host: the copy itself is a GPU event, which has the
number (`correlation`) of the call that enqueued it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Findings", "read_trace", "waits_inside"]

WAITS = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaFree",
    "cudaMalloc", "cudaHostAlloc", "cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize",
)  # fmt: skip
CALLS = ("cuda_runtime", "cuda_driver")


@dataclass
class Findings:
    """What a trace shows.

    Attributes:
        ranges: how many ranges of the name there are.
        calls: CUDA calls inside them, of any kind; 0 where there is no GPU.
        waits: how often each call or copy made the host wait inside them.
    """

    ranges: int = 0
    calls: int = 0
    waits: dict[str, int] = field(default_factory=dict)


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of an exported trace."""
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def waits_inside(events: Iterable[Mapping[str, Any]], name: str) -> Findings:
    """Waits of the host inside the ranges (`torch.profiler.record_function`) of a name, on their threads."""
    whole = [event for event in events if event.get("ph") == "X"]
    ranges = [e for e in whole if e.get("name") == name and e.get("cat") in ("user_annotation", "cpu_op")]
    to_host = {
        event.get("args", {}).get("correlation")
        for event in whole
        if event.get("cat") == "gpu_memcpy" and "DtoH" in str(event.get("name"))
    } - {None}
    found = Findings(ranges=len(ranges))
    for event in whole:
        if event.get("cat") not in CALLS or not any(_inside(event, outer) for outer in ranges):
            continue
        found.calls += 1
        what = str(event["name"])
        if event.get("args", {}).get("correlation") in to_host:
            what = "copy to the host"
        elif what not in WAITS:
            continue
        found.waits[what] = found.waits.get(what, 0) + 1
    return found


def _inside(event: Mapping[str, Any], outer: Mapping[str, Any]) -> bool:
    same_thread = event.get("tid") == outer.get("tid") and event.get("pid") == outer.get("pid")
    return same_thread and outer["ts"] <= event["ts"] <= outer["ts"] + outer["dur"]
