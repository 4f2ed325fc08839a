"""Reading records that may be cut off, damaged, foreign or of another version: what fits, and what does not.

A record is a measurement that took hours. One bad line must not take the others with it, and nothing is left
out without a word.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradq.bench.records import SCHEMA_VERSION
from gradq.errors import ConfigError

__all__ = ["Reading", "check_collectives", "parse_json", "read_lines", "read_record", "read_text"]

Record = dict[str, Any]
Check = Callable[[Any], bool]

_HUGE = 1e15


@dataclass(frozen=True)
class Reading:
    """A record of `gradq bench` as far as it can be read.

    Attributes:
        header: first line of the record.
        lines: all others that are whole and have what their kind needs.
        left_out: a sentence for each line that is not among them.
    """

    header: Record
    lines: list[Record]
    left_out: list[str]


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not text in UTF-8 (byte {error.start}): this is not a record of gradq's"
        ) from None


def parse_json(text: str) -> Any:
    """The value of a JSON text; a ValueError whatever is wrong with it."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_lines(path: Path) -> list[Record]:
    """The complete lines of a file that may still grow or end in the middle of one; none if it is not there.

    Raises:
        ConfigError: it cannot be read, or a complete line is not a JSON object.
    """
    lines = []
    text = read_text(path) if path.exists() else ""
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            lines.append(_object(line))
        except ValueError:
            raise ConfigError(
                f"{path}, line {number} is not JSON: this is not a record of gradq's, or it is damaged; "
                "remove it, or write to another folder (--out)"
            ) from None
    return lines


def _object(text: str) -> Record:
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}")
    return value


def read_record(path: Path) -> Reading:
    """Read a record of `gradq bench`.

    Raises:
        ConfigError: it cannot be read, is no such record, is of another schema, or its header is damaged.
    """
    text = read_text(path)
    if not text:
        raise ConfigError(f"{path} is empty: nothing was written to it")
    first, *others = text.split("\n")
    try:
        header = _object(first)
    except ValueError:
        state = "not JSON" if others else "cut off"
        raise ConfigError(f"{path} is not a record of gradq bench, or damaged: line 1 is {state}") from None
    _check_header(header, path)
    kept: list[Record] = []
    left_out: list[str] = []
    for number, part in enumerate(others, start=2):
        if not part:
            continue
        try:
            line = _object(part)
        except ValueError:
            left_out.append(f"line {number} is {'not JSON' if number <= len(others) else 'cut off'}")
            continue
        if problem := _problem(line):
            left_out.append(f"line {number} {problem}")
        else:
            kept.append(line)
    return Reading(header, kept, left_out)


def _check_header(header: Record, path: Path) -> None:
    if header.get("record") != "header" or header.get("benchmark") != "bench":
        raise ConfigError(f"{path} is not a record of gradq bench")
    _check_schema(header, path)
    for key in ("scenario", "environment"):
        if not isinstance(header.get(key), dict):
            raise ConfigError(f"{path}, line 1: the header has no table {key!r}: it is damaged")
    for key in ("commit", "command", "time"):
        if not isinstance(header.setdefault(key, "unknown"), str):
            raise ConfigError(f"{path}, line 1: {key} is not a text: the header is damaged")
    link = header.get("link", {})
    measured = link.get("measured", []) if isinstance(link, dict) else None
    if not isinstance(measured, list) or not all(_fits(entry, _MEASURED) for entry in measured):
        raise ConfigError(f"{path}, line 1: the link is damaged")


def _check_schema(record: Mapping[str, Any], path: Path) -> None:
    found = record.get("schema_version")
    if found != SCHEMA_VERSION:
        newer = isinstance(found, int) and found > SCHEMA_VERSION
        remedy = "update gradq" if newer else "it is damaged"
        raise ConfigError(f"{path} has schema {found!r}, this gradq reads {SCHEMA_VERSION}; {remedy}")


def check_collectives(record: Record, path: Path) -> None:
    """Check what `gradq bench collectives` wrote.

    Raises:
        ConfigError: another schema, or something is missing or of the wrong type; the message names it.
    """
    _check_schema(record, path)
    settings, rows = record.get("settings"), record.get("rows")
    if not isinstance(settings, dict) or not {"ranks", "link"} <= settings.keys():
        raise ConfigError(f"{path}: settings without ranks and link: it is damaged")
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{path} has no rows")
    for number, row in enumerate(rows, start=1):
        if not _fits(row, _COLLECTIVE):
            raise ConfigError(f"{path}, row {number}: {_misfit(row, _COLLECTIVE)}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_count(value: Any) -> bool:
    return _is_whole(value) and value > 0


def _is_amount(value: Any) -> bool:
    """A number from 0 that a sum of many cannot take beyond fp64."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _HUGE


def _is_time(value: Any) -> bool:
    return _is_amount(value) and value > 0


def _is_loss(value: Any) -> bool:
    """A codec that diverges ends at NaN or Inf: this is a result."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= _HUGE or not math.isfinite(value)


def _is_list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and bool(value) and all(check(entry) for entry in value)


_AMOUNTS = _is_list_of(_is_amount)
_PER_RANK = ("cpu_ms", "busy", "wire_bytes", "interface_bytes", "encode_ms", "exchange_ms", "decode_ms")
_MEASURED: dict[str, Check] = {"from": _is_whole, "to": _is_whole, "mbit_s": _is_amount}
_COLLECTIVE: dict[str, Check] = {
    **dict.fromkeys(("size_bytes", "count", "time_ms", "algbw_gbps", "busbw_gbps"), _is_amount),
    **dict.fromkeys(("wire_bytes", "ratio", "wrong"), _is_amount),
    **dict.fromkeys(("dtype", "codec"), _is_text),
}
# kind → what it must have
_NEEDS: dict[str, dict[str, Check]] = {
    "block": {
        **dict.fromkeys(("attempt", "seed", "turn"), _is_whole),
        "codec": _is_text,
        "steps": _is_count,
        "warmup": _is_flag,
        "step_ms": _is_list_of(_is_time),
    },
    "final": {"seed": _is_whole, "codec": _is_text, "val_loss": _is_loss},
    "start": {"seed": _is_whole, "parameters": _is_whole, "interface": _is_text},
    "refused": {"codec": _is_text, "reason": _is_text},
    "event": {"event": _is_text},
    "preflight": {"seed": _is_whole, "warnings": lambda value: value == [] or _is_list_of(_is_text)(value)},
    "end": {"seed": _is_whole},
}
# kind → what it may have
_MAY: dict[str, dict[str, Check]] = {
    "block": {**dict.fromkeys(_PER_RANK, _AMOUNTS), "loss": _is_list_of(_is_loss)},
    "start": {"interface_ranks": _is_count},
    "event": {"reason": _is_text, "seed": _is_whole},
}


def _fits(value: Any, needs: Mapping[str, Check]) -> bool:
    return isinstance(value, dict) and all(key in value and check(value[key]) for key, check in needs.items())


def _misfit(value: Any, needs: Mapping[str, Check]) -> str:
    if not isinstance(value, dict):
        return "is not a table"
    missing = [key for key in needs if key not in value]
    if missing:
        return f"has no {missing[0]}"
    wrong = next(key for key, check in needs.items() if not check(value[key]))
    return f"has a {wrong} that makes no sense"


def _problem(line: Record) -> str:
    """What is wrong with a line; "" for nothing."""
    kind = line.get("record")
    if not isinstance(kind, str):
        return "does not say what it records"
    needs = _NEEDS.get(kind, {})
    needs = needs | {key: check for key, check in _MAY.get(kind, {}).items() if key in line}
    return "" if _fits(line, needs) else f"({kind}) {_misfit(line, needs)}"
