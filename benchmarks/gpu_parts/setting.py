"""Where a part runs, and its record: a line of JSON for every result, written at once."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["RECORD", "Setting", "read_record"]

RECORD = "record.jsonl"


@dataclass(frozen=True)
class Setting:
    """One part of a run; it can be pickled, so that ranks and pools take it along.

    Attributes:
        part: its name.
        folder: of the record.
        deadline: `time.time()` at which the part is ended.
        dry_run: CPU tensors take the place of CUDA tensors, and Triton's interpreter that of the GPU.
    """

    part: str
    folder: Path
    deadline: float
    dry_run: bool

    @property
    def device(self) -> torch.device:
        """The GPU, or what stands for it."""
        return torch.device("cpu") if self.dry_run else torch.device("cuda", 0)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    @property
    def processes(self) -> int:
        """How many processes may share the GPU and the processor."""
        return 2 if self.dry_run else max(1, min(12, (os.cpu_count() or 2) - 2))

    def add(self, **row: Any) -> None:
        """Append a result to the record. Lines are short, and a file opened to append takes them whole."""
        line = json.dumps({"part": self.part, **row}, default=str) + "\n"
        with (self.folder / RECORD).open("a") as file:
            file.write(line)

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Within it tensors are served by the Triton kernels; outside, those on the CPU by the reference."""
        before = os.environ.get("GRADQ_KERNELS")
        os.environ["GRADQ_KERNELS"] = "triton"
        try:
            yield
        finally:
            os.environ.pop("GRADQ_KERNELS", None)
            if before is not None:
                os.environ["GRADQ_KERNELS"] = before

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if not self.dry_run:
            torch.cuda.synchronize()


def read_record(folder: Path) -> list[dict[str, Any]]:
    """The lines of a record, without a last one that was cut off."""
    path, rows = folder / RECORD, []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows
