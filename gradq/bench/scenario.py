"""Scenarios: one benchmark as data: a TOML file in `benchmarks/scenarios/`, or options of `gradq bench`."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import re
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradq.errors import ConfigError, SpecError
from gradq.policy import Spec

__all__ = ["BASELINES", "COMPUTE", "PLAIN", "Link", "Scenario", "load_scenario", "parse_delay", "parse_rate"]

PLAIN = "none"
COMPUTE = "compute"
BASELINES = (PLAIN, "bf16", "torch-powersgd:1")

_RATE_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_DELAY_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_CASTS = ("none", "fp32", "bf16", "fp16")


def parse_rate(text: str) -> float:
    """Bits a second from "1gbit", "250 Mbit/s", "10Gbps".

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?)(?:bit|bps|bit/s|b/s)\s*", text.lower())
    try:
        assert match is not None
        rate = float(match[1]) * _RATE_UNITS[match[2]]
        assert rate > 0
    except (AssertionError, ValueError):
        raise ConfigError(f"{text!r} is no rate: write for instance 250mbit, 1gbit or 2.5Gbit/s") from None
    return rate


def parse_delay(text: str) -> float:
    """Milliseconds from "0.2ms", "500us", "1s".

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*(us|ms|s)\s*", text.lower())
    try:
        assert match is not None
        return float(match[1]) * _DELAY_UNITS[match[2]]
    except (AssertionError, ValueError):
        raise ConfigError(f"{text!r} is no delay: write for instance 0.2ms, 500us or 1s") from None


@dataclass(frozen=True, kw_only=True)
class Link:
    """The link of every host, the same in both directions.

    Attributes:
        rate_bps: bits a second; None leaves it unshaped.
        delay_ms: added one way, from host to host.
        loss: fraction of packets dropped.
    """

    rate_bps: float | None = None
    delay_ms: float = 0.0
    loss: float = 0.0

    def __post_init__(self) -> None:
        if self.rate_bps is not None and not self.rate_bps >= 1e5:
            raise ConfigError(f"a link of {self.rate_bps!r} bit/s: at least 100 kbit/s")
        if not 0 <= self.delay_ms <= 10_000:
            raise ConfigError(f"delay_ms={self.delay_ms!r}: from 0 to 10000")
        if not 0 <= self.loss < 1:
            raise ConfigError(f"loss={self.loss!r}: a fraction from 0 to below 1")

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


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is measured. Every field may stand in a scenario file.

    Attributes:
        name: of the record.
        model: a built-in one ("gpt-tiny", "gpt-1m", "gpt-5m", "gpt-10m", "mlp-25m", "digits-cnn", see
            `gradq.bench.models`), or "path.py:function".
        data: "auto" (what belongs to the model), or "text[:PATH]", "digits", "prototypes", "cifar10:FOLDER",
            "images:FOLDER"; see `gradq.bench.data`.
        codecs: gradq specs ("int8", "int4+int4") and peers ("torch-fp16", "torch-powersgd:4", "free:int4",
            "path.py:function"; see `gradq.bench.contenders`). Plain DDP, bf16, torch's PowerSGD and a free
            codec are added where missing.
        nodes: hosts.
        ranks_per_node: processes on each.
        link: of every host.
        seeds: of weights, data and rounding; at least 3 for a statement about the loss.
        steps: optimizer steps of each codec.
        block: steps a codec makes before the next one takes its turn.
        warmup: turns that are not measured: buckets are rebuilt, buffers made, PowerSGD starts at its third
            step.
        budget_s: stop after the first turn that ends later than this, if `min_turns` were measured; None: no
            limit.
        min_turns: measured whatever the budget says.
        batch_size: samples a rank and batch.
        seq_len: bytes a sequence, for text.
        accumulate: batches a step; one exchange for all.
        precision: "fp32", or "bf16" for autocast.
        optimizer: "auto" (the model's own), "sgd" or "adamw".
        lr: learning rate; None takes the model's own.
        evaluate: whether to compute the final metric on held-out data.
        gpus_per_rank: 0 computes on the CPU. Not run on a GPU.
        timeout_s: of the process group.
        checkpoint_every: turns between checkpoints; 0: none. Only the Ray runner restarts from them.
    """

    name: str = "bench"
    model: str = "gpt-1m"
    data: str = "auto"
    codecs: tuple[str, ...] = (PLAIN, "bf16", "int8", "int4", "torch-powersgd:1", "torch-powersgd:4")
    nodes: int = 1
    ranks_per_node: int = 2
    link: Link = field(default_factory=Link)
    seeds: tuple[int, ...] = (0,)
    steps: int = 40
    block: int = 2
    warmup: int = 2
    budget_s: float | None = None
    min_turns: int = 3
    batch_size: int = 8
    seq_len: int = 64
    accumulate: int = 1
    precision: str = "fp32"
    optimizer: str = "auto"
    lr: float | None = None
    evaluate: bool = True
    gpus_per_rank: int = 0
    timeout_s: float = 600.0
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        for name in (
            "nodes",
            "ranks_per_node",
            "steps",
            "block",
            "min_turns",
            "batch_size",
            "seq_len",
            "accumulate",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: at least 1")
        for name in ("warmup", "gpus_per_rank", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: at least 0")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ConfigError(f"name={self.name!r}: letters, digits, dots, dashes; it becomes a file name")
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision={self.precision!r}: choose fp32 or bf16 (autocast)")
        if self.optimizer not in ("auto", "sgd", "adamw"):
            raise ConfigError(f"optimizer={self.optimizer!r}: choose auto, sgd or adamw")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds={self.seeds}: at least one, each once")
        if self.world_size < 2:
            raise ConfigError("one rank has nothing to exchange: nodes * ranks_per_node must be at least 2")
        if (turns := -(-self.steps // self.block)) <= self.warmup:
            raise ConfigError(
                f"steps={self.steps} make {turns} turns of {self.block}, warmup={self.warmup} of them are "
                "not measured: nothing would be"
            )
        if self.timeout_s <= 0:
            raise ConfigError(f"timeout_s={self.timeout_s}: more than 0")
        for codec in self.codecs:
            _check_codec(codec)

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.ranks_per_node

    @property
    def contenders(self) -> tuple[str, ...]:
        """What takes turns: the baselines, what was asked for, a free codec, and computing alone."""
        asked = [codec for codec in self.codecs if codec != COMPUTE]
        names = [PLAIN, "bf16", *asked]
        if not any(codec.startswith(("powersgd:", "torch-powersgd:")) for codec in asked):
            names.append("torch-powersgd:1")
        quantized = [codec for codec in asked if _is_gradq(codec) and codec not in _CASTS]
        if quantized and not any(codec.startswith("free:") for codec in asked):
            names.append(f"free:{quantized[-1]}")
        return (*dict.fromkeys(names), COMPUTE)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "scenario") -> Scenario:
        """The scenario of a table; see `load_scenario`.

        Raises:
            ConfigError: a key does not exist or a value has the wrong type; says where.
        """
        fields = dict(values)
        link = fields.pop("link", {})
        if not isinstance(link, Mapping):
            raise ConfigError(
                f'{where}: link is a table such as {{rate = "1gbit", delay = "0.2ms"}}, not {link!r}'
            )
        link = dict(link)
        try:
            if isinstance(rate := link.pop("rate", None), str):
                link["rate_bps"] = None if rate == "unshaped" else parse_rate(rate)
            if isinstance(delay := link.pop("delay", None), str):
                link["delay_ms"] = parse_delay(delay)
            checked = _checked(Link, link, f"{where}: link")
            return cls(link=Link(**checked), **_checked(cls, fields, where))
        except ConfigError as error:
            text = str(error)
            raise ConfigError(text if text.startswith(where) else f"{where}: {text}") from None


def _checked(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values with lists as tuples, checked against a dataclass's fields."""
    hints = typing.get_type_hints(cls)
    checked = {}
    for key, value in values.items():
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(sorted(hints))}"
            raise ConfigError(f"{where}: no such key: {key}{hint}")
        if not _fits(value, hints[key]):
            raise ConfigError(f"{where}: {key} = {value!r} is not {_describe(hints[key])}")
        checked[key] = tuple(value) if isinstance(value, list) else value
    return checked


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return isinstance(value, list | tuple) and all(_fits(entry, item) for entry in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return f"a list of {typing.get_args(hint)[0].__name__}"
    return str(getattr(hint, "__name__", hint))


def _is_gradq(codec: str) -> bool:
    return not codec.startswith(("torch-", "free:", "hivemind:")) and ".py:" not in codec


def _check_codec(codec: str) -> None:
    """Refuse what no contender can be made of.

    Raises:
        ConfigError: naming it.
    """
    if codec == COMPUTE or codec in ("torch-fp16", "torch-bf16") or codec.startswith("hivemind:"):
        return
    if codec.startswith("torch-powersgd:"):
        if not re.fullmatch(r"[1-9][0-9]*", codec.partition(":")[2]):
            raise ConfigError(f"codec {codec!r}: write torch-powersgd:RANK, for instance torch-powersgd:4")
    elif codec.startswith("torch-"):
        raise ConfigError(f"codec {codec!r}: torch's are torch-fp16, torch-bf16 and torch-powersgd:RANK")
    elif ".py:" in codec:
        path = Path(codec.rpartition(":")[0])
        if not path.is_file():
            raise ConfigError(f"codec {codec!r}: there is no file {path}")
    else:
        try:
            Spec.parse(codec.removeprefix("free:"))
        except SpecError as error:
            raise ConfigError(f"codec {codec!r}: {error}") from None


def load_scenario(path: Path) -> Scenario:
    """Read a scenario file.

    Its keys are the fields of `Scenario`; `link` is a table of `rate` ("1gbit"), `delay` ("0.2ms") and
    `loss`. The name defaults to the file's.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or says something that makes no sense.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read the scenario {path}: {error.strerror}") from None
    toml = _toml()
    try:
        values = toml.loads(text)
    except toml.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    return Scenario.from_dict({"name": path.stem, **values}, where=str(path))


def _toml() -> Any:
    name = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"a scenario file needs {name}: pip install 'gradq[cli]'") from None
