"""Scenario files: TOML, as in `benchmarks/scenarios/`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from gradq.bench.models import check_model
from gradq.bench.scenario import Scenario, at
from gradq.errors import ConfigError

__all__ = ["load_scenario"]


def load_scenario(path: Path) -> Scenario:
    """Read a scenario file.

    Its keys are the fields of `Scenario`; `link` is a table of `rate` ("1gbit"), `delay` ("0.2ms") and
    `loss`. The name defaults to the file's.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or says something that makes no sense.
    """
    toml = _toml()
    try:
        text = path.read_bytes().decode("utf-8-sig")  # some editors begin a file with a byte order mark
        values = toml.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read the scenario {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line, byte = error.object[: error.start].count(b"\n") + 1, error.object[error.start]
        raise ConfigError(
            f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8: save the file as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:  # a syntax error, a number too long, tables too deep
        raise ConfigError(f"{path} is not TOML: {error}; examples are in benchmarks/scenarios/") from None
    if not values:
        raise ConfigError(f'{path} is empty: write at least one key, such as model = "gpt-1m"')
    scenario = Scenario.from_dict({"name": path.stem, **values}, where=str(path))
    try:
        check_model(scenario.model)
        scenario.check_files()
    except ConfigError as error:
        raise at(error, str(path)) from None
    return scenario


def _toml() -> Any:
    name = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"a scenario file needs {name}: pip install 'gradq[cli]'") from None
