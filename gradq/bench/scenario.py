"""Scenarios: one benchmark as data, from a file (`scenario_file`) or from the options of `gradq bench`."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradq.bench.fields import checked, shown
from gradq.bench.link import Link, parse_delay, parse_rate
from gradq.errors import ConfigError
from gradq.policy import Spec

__all__ = ["COMPUTE", "PLAIN", "Scenario", "at"]

PLAIN = "none"
COMPUTE = "compute"

_CASTS = ("none", "fp32", "bf16", "fp16")
_LINK_KEYS = {"rate_bps": "rate", "delay_ms": "delay"}
_LINK_TABLE = 'write a table: link = {rate = "1gbit", delay = "0.2ms", loss = 0.01}'
# What people write that is no key, and what they mean.
_REMEDIES = {
    "hosts": "the number of hosts is nodes",
    "num_nodes": "the number of hosts is nodes",
    "nnodes": "the number of hosts is nodes",
    "ranks": "ranks of each host are ranks_per_node",
    "nproc_per_node": "ranks of each host are ranks_per_node",
    "world_size": "ranks are nodes times ranks_per_node",
    "gpus": "a GPU for each rank is gpus_per_rank = 1, with ranks_per_node as many as GPUs",
    "gpus_per_node": "a GPU for each rank is gpus_per_rank = 1, with ranks_per_node as many as GPUs",
    "codec": 'codecs is a list: codecs = ["int8"]',
    "spec": 'codecs is a list: codecs = ["int8"]',
    "specs": 'codecs is a list: codecs = ["int8"]',
    "seed": "seeds is a list: seeds = [0]",
    "epochs": "the length is steps, optimizer steps of each codec",
    "iterations": "the length is steps, optimizer steps of each codec",
    "learning_rate": "the learning rate is lr",
    "dataset": "the data set is data",
    "batch": "samples a rank and batch are batch_size",
    "timeout": "the time limit in seconds is timeout_s",
    "budget": "the time limit in seconds is budget_s",
    "dtype": 'autocast is precision = "bf16"',
    "amp": 'autocast is precision = "bf16"',
    "out": "where records go is said on the command line: --out",
    "cluster": "the cluster is said on the command line: --cluster",
} | dict.fromkeys(
    ("rate", "rate_bps", "bandwidth", "delay", "delay_ms", "latency", "loss", "packet_loss", "links"),
    f"links have a table of their own; {_LINK_TABLE}",
)
_LINK_REMEDIES = {
    "bandwidth": 'the rate is rate = "1gbit"',
    "speed": 'the rate is rate = "1gbit"',
    "latency": 'the delay one way is delay = "0.2ms"',
    "packet_loss": "the fraction of packets to drop is loss",
}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is measured. Every field may stand in a scenario file.

    Attributes:
        name: name of the record.
        model: a built-in one ("gpt-tiny", "gpt-1m", "gpt-5m", "gpt-10m", "mlp-25m", "digits-cnn", see
            `gradq.bench.models`), or "path.py:function".
        data: "auto" (what belongs to the model), or "text[:PATH]", "digits", "prototypes", "cifar10:FOLDER",
            "images:FOLDER"; see `gradq.bench.data`.
        codecs: gradq specs ("int8", "int4+int4") and peers ("torch-fp16", "torch-powersgd:4", "free:int4",
            "path.py:function"; see `gradq.bench.contenders`). Plain DDP, bf16, torch's PowerSGD and a free
            codec are added where missing.
        nodes: the number of hosts.
        ranks_per_node: the number of processes on each host.
        link: rate and delay of the link of every host.
        seeds: seeds of weights, data and rounding; at least 3 for a statement about the loss.
        steps: optimizer steps of each codec.
        block: the steps that a codec makes before the next one takes its turn.
        warmup: the turns that are not measured: buckets are rebuilt, buffers made, PowerSGD starts at its
            third step.
        budget_s: the time in seconds after which no further turn begins, if `min_turns` were measured;
            None: no limit.
        min_turns: the number of turns that are measured whatever the budget says.
        batch_size: the number of samples for a rank in a batch.
        seq_len: number of bytes in a sequence, for text.
        accumulate: the number of batches in a step; there is one exchange for all.
        precision: "fp32", or "bf16" for autocast.
        optimizer: "auto" (the model's own), "sgd" or "adamw".
        lr: learning rate; None takes the model's own.
        evaluate: whether to compute the final metric on held-out data.
        gpus_per_rank: the number of GPUs for a rank; 0 computes on the CPU. Not run on a GPU.
        timeout_s: limit for one operation of the process group, in seconds.
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
        for names, least in (
            (("nodes", "ranks_per_node", "steps", "block", "min_turns"), 1),
            (("batch_size", "seq_len", "accumulate"), 1),
            (("warmup", "gpus_per_rank", "checkpoint_every"), 0),
        ):
            for name in names:
                if not least <= getattr(self, name) <= 10**9:
                    raise ConfigError(f"{name} = {shown(getattr(self, name))}: from {least} to 10^9")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}", self.name):
            raise ConfigError(
                f"name = {shown(self.name)}: letters, digits, dots and dashes; it becomes a file name"
            )
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision = {shown(self.precision)}: choose fp32 or bf16 (autocast)")
        if self.optimizer not in ("auto", "sgd", "adamw"):
            raise ConfigError(f"optimizer = {shown(self.optimizer)}: choose auto, sgd or adamw")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or not 0 <= min(self.seeds) < 2**63:
            raise ConfigError(f"seeds = {shown(list(self.seeds))}: at least one, each once, from 0")
        if self.world_size < 2:
            raise ConfigError(
                "one rank has nothing to exchange: nodes * ranks_per_node must be at least 2 (--ranks 2, "
                "--hosts 2, or with --cluster --nodes 2 or --ranks-per-node 2)"
            )
        if (turns := -(-self.steps // self.block)) <= self.warmup:
            raise ConfigError(
                f"steps = {self.steps} make {turns} turns of {self.block}, warmup = {self.warmup} of them "
                f"are not measured: nothing would be; give at least {(self.warmup + 1) * self.block} steps"
            )
        for name, value in (("timeout_s", self.timeout_s), ("budget_s", self.budget_s), ("lr", self.lr)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name} = {value!r}: a finite number above 0")
        if not self.timeout_s <= 1e7:
            raise ConfigError(f"timeout_s = {self.timeout_s!r}: seconds, at most 10^7")
        if not self.codecs:
            raise ConfigError('codecs = []: name at least one, for instance codecs = ["int8"]')
        for codec in self.codecs:
            _check_codec(codec)

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.ranks_per_node

    @property
    def contenders(self) -> tuple[str, ...]:
        """What takes turns: the baselines, what was asked for, a free codec, and computing alone.

        torch's PowerSGD is that of the last low rank asked for, else of rank 1. The free codec is that of the
        last codec that quantizes; casts and low rank have none.
        """
        asked = [codec for codec in self.codecs if codec != COMPUTE]
        names = [PLAIN, "bf16", *asked]
        specs = {codec: Spec.parse(codec) for codec in asked if _is_gradq(codec)}
        if not any(codec.startswith("torch-powersgd:") for codec in asked):
            ranks = [spec.low_rank for spec in specs.values() if spec.low_rank]
            names.append(f"torch-powersgd:{ranks[-1] if ranks else 1}")
        quantized = [c for c, spec in specs.items() if not spec.low_rank and str(spec) not in _CASTS]
        if quantized and not any(codec.startswith("free:") for codec in asked):
            names.append(f"free:{quantized[-1]}")
        return (*dict.fromkeys(names), COMPUTE)

    def check_files(self) -> None:
        """Refuse peers whose file is not here, before any rank starts.

        Raises:
            ConfigError: naming the codec and the file.
        """
        for codec in self.codecs:
            path = Path(codec.rpartition(":")[0])
            if ".py:" in codec and not path.is_file():
                raise ConfigError(f"codec {codec!r}: there is no file {path}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "scenario") -> Scenario:
        """The scenario of a table; see `gradq.bench.scenario_file`.

        Raises:
            ConfigError: a key does not exist or a value has the wrong type; says where.
        """
        fields = dict(values)
        link = _link(fields.pop("link", {}), where)
        try:
            return cls(link=link, **checked(cls, fields, where, remedies=_REMEDIES))
        except ConfigError as error:
            raise at(error, where) from None


def _link(table: Any, where: str) -> Link:
    """The link of a file's table, or of a record's."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: link = {shown(table)} is not a table; {_LINK_TABLE}")
    table, place = dict(table), f"{where}: link"
    for key, example, field_name, parse in (
        ("rate", "100mbit", "rate_bps", parse_rate),
        ("delay", "0.2ms", "delay_ms", parse_delay),
    ):
        if key not in table:
            continue
        value = table.pop(key)
        if not isinstance(value, str):
            raise ConfigError(
                f'{place}: {key} = {shown(value)} has no unit; write it as text with one: {key} = "{example}"'
            )
        if field_name in table:
            raise ConfigError(f"{place}: {key} and {field_name} say the same; write {key} only")
        try:
            table[field_name] = None if value == "unshaped" and key == "rate" else parse(value)
        except ConfigError as error:
            raise ConfigError(f"{place}: {key} = {error}") from None
    try:
        return Link(**checked(Link, table, place, remedies=_LINK_REMEDIES, written=_LINK_KEYS))
    except ConfigError as error:
        raise at(error, place) from None


def at(error: ConfigError, where: str) -> ConfigError:
    """The error with the place of what is wrong in front of its message, once."""
    text = str(error)
    return ConfigError(text if text.startswith(where) else f"{where}: {text}")


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
        if not re.fullmatch(r"[1-9][0-9]{0,5}", codec.partition(":")[2]):
            raise ConfigError(
                f"codec {shown(codec)}: write torch-powersgd:RANK, for instance torch-powersgd:4"
            )
    elif codec.startswith("torch-"):
        raise ConfigError(f"codec {shown(codec)}: torch's are torch-fp16, torch-bf16 and torch-powersgd:RANK")
    elif ".py:" not in codec:
        try:
            spec = Spec.parse(codec.removeprefix("free:"))
        except ConfigError as error:
            raise ConfigError(f"codec {shown(codec)}: {error}") from None
        if codec.startswith("free:") and (spec.low_rank or spec.is_none):
            raise ConfigError(
                f"codec {shown(codec)}: a free codec sends the bytes of a codec, and {spec} has none; write "
                "for instance free:int4, or powersgd:4 and torch-powersgd:4 beside each other"
            )
