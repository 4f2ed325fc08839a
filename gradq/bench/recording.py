"""Recording: one JSON-lines file a scenario, written as things happen: a crash loses nothing that was done.

The first line is the header: schema version, scenario, environment, commit, command, runner and link. Then
come, by seed, "start", "refused", "block", "final", "event" and "end" lines. A block has one number a rank,
in lists.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gradq.bench.reading import read_lines
from gradq.bench.records import SCHEMA_VERSION, environment, git_commit
from gradq.bench.scenario import Scenario
from gradq.errors import BenchError, ConfigError

__all__ = ["Recorder", "finished_seeds"]

Record = dict[str, Any]

_PER_RANK = (
    "step_ms",
    "cpu_ms",
    "busy",
    "wire_bytes",
    "interface_bytes",
    "encode_ms",
    "exchange_ms",
    "decode_ms",
    "loss",
)


def finished_seeds(path: Path, scenario: Scenario) -> set[int]:
    """The seeds of this very scenario that a record already holds whole.

    Raises:
        ConfigError: the file is of another scenario.
    """
    lines = read_lines(path)
    if not lines:
        return set()
    theirs, ours = lines[0].get("scenario"), json.loads(json.dumps(scenario.to_dict()))
    if lines[0].get("record") != "header" or not isinstance(theirs, dict):
        raise ConfigError(
            f"{path} does not begin with a header of gradq bench: give this one another name (--name), "
            "another folder (--out), or remove the file"
        )
    differing = sorted(key for key in ours if key != "seeds" and theirs.get(key) != ours[key])
    if differing:
        raise ConfigError(
            f"{path} has results of another scenario (it differs in {', '.join(differing)}); give this one "
            "another name (--name), another folder (--out), or remove the file"
        )
    return {line["seed"] for line in lines if line.get("record") == "end" and "seed" in line}


class Recorder:
    """Appends to the record of a scenario, and puts the ranks' halves of a block together.

    Args:
        path: the file, which is made with its folder; an unfinished one of the same scenario is continued.
        scenario: the scenario that is measured.
        facts: what the header says of the runner: its name, its link.
    """

    def __init__(self, path: Path, scenario: Scenario, facts: Mapping[str, Any]) -> None:
        self.path, self.scenario = path, scenario
        self.broken = False
        self._parts: dict[tuple[int, int, str], dict[int, Record]] = {}
        earlier = read_lines(path)
        fresh = not earlier
        self._attempt = sum(line.get("record") in ("header", "resumed") for line in earlier)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not fresh:
                _mend(path)
            self._file = path.open("w" if fresh else "a")
        except OSError as error:
            raise BenchError(f"cannot write {path}: {error.strerror}") from error
        header = {
            "schema_version": SCHEMA_VERSION,
            "benchmark": "bench",
            "scenario": scenario.to_dict(),
            "environment": environment(),
            "commit": git_commit(Path(__file__).parent),
            "command": _command(),
            **facts,
        }
        self.write("header" if fresh else "resumed", header)

    def write(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Append one line, with the time.

        Raises:
            BenchError: it cannot be written (the disk is full); what stands in the file stays.
        """
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        try:
            self._file.write(json.dumps({"record": kind, "time": now, **fields}) + "\n")
            self._file.flush()
        except OSError as error:
            self.broken = True
            raise BenchError(
                f"cannot write {self.path}: {error.strerror}; what was measured until now is in it, and the "
                "same command continues"
            ) from error

    def take(self, seed: int, rank: int, record: Record) -> Record | None:
        """Take a rank's record.

        Returns:
            What was written, if this completed something.
        """
        kind = record["record"]
        if kind == "block":
            parts = self._parts.setdefault((seed, record["turn"], record["codec"]), {})
            parts[rank] = record
            if len(parts) < self.scenario.world_size:
                return None
            del self._parts[seed, record["turn"], record["codec"]]
            ordered = [parts[r] for r in range(self.scenario.world_size)]
            record = dict(ordered[0])
            for name in _PER_RANK:
                values = [part.get(name) for part in ordered]
                numbers = [round(float(value), 6) for value in values if value is not None]
                if len(numbers) == len(ordered):
                    record[name] = numbers
                else:
                    record.pop(name, None)
            record["attempt"] = self._attempt
        elif rank != 0 and kind != "event":
            return None
        written = {"seed": seed, **{key: value for key, value in record.items() if key != "record"}}
        self.write(kind, written)
        return {"record": kind, **written}

    def forget(self) -> None:
        """Drop halves of blocks: their ranks are gone."""
        self._parts.clear()

    def close(self) -> None:
        """Close the file. Idempotent."""
        with contextlib.suppress(OSError):  # the disk is full; `write` has said so
            self._file.close()


def _command() -> str:
    """What was typed, as well as it can be known."""
    program = Path(sys.argv[0])
    return shlex.join([*(["python", str(program)] if program.suffix == ".py" else ["gradq"]), *sys.argv[1:]])


def _mend(path: Path) -> None:
    """Cut off the beginning of a line that a crash left at the end."""
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
