"""Records: a number with its recipe. One JSON file a measurement, in `benchmarks/results/`."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "SCHEMA_VERSION",
    "cpu_name",
    "environment",
    "git_commit",
    "hardware_slug",
    "percentile",
    "write_record",
]

SCHEMA_VERSION = 1


def cpu_name() -> str:
    """The processor as Linux names it."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    names = re.findall(r"model name\s*: (.*)", text)
    return names[0].strip() if names else platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """What a reader needs to judge a number: hardware, versions, and how busy the machine was."""
    versions = {}
    for package in ("gradq", "torch", "numba", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **versions,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def git_commit(folder: Path) -> str:
    """The commit of a checkout, with -dirty if a tracked file differs from it; "unknown" elsewhere."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def hardware_slug(facts: Mapping[str, Any]) -> str:
    """Processor and cores for a file name: "amd-epyc-2c"."""
    return re.sub(r"[^a-z0-9]+", "-", f"{facts['cpu']} {facts['cores']}c".lower()).strip("-")


def percentile(values: Sequence[float], fraction: float) -> float:
    """The nearest-rank percentile of some values; fraction 0.5 is the median."""
    ordered = sorted(values)
    return ordered[round(fraction * (len(ordered) - 1))]


def write_record(folder: Path, benchmark: str, **fields: Any) -> Path:
    """Write `<benchmark>_<hardware>_<date>.json`, replacing an older one of the same day.

    Args:
        folder: the folder of the records, which is made if missing.
        benchmark: the name of what was measured.
        **fields: the settings and results; "environment" and "commit" are filled in unless given.

    Returns:
        The file.
    """
    facts = fields.pop("environment", None) or environment()
    today = date.today().isoformat()
    record = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": benchmark,
        "date": today,
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "commit": fields.pop("commit", None) or git_commit(folder.parent),
        "environment": facts,
        **fields,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}_{hardware_slug(facts)}_{today}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
