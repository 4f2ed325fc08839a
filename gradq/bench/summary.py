"""What a record says: medians, losses over seeds, exposed communication, and the verdict in one sentence.

A sample is one block: the step time of the slowest rank. A ratio compares a codec's block with plain DDP's
block of the same turn, so what disturbs a whole turn cancels. Exposed communication is a block's step time
minus that of the compute-only block of the same turn: what encoding, the link and decoding add after all
overlap.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gradq.bench.reading import read_record
from gradq.bench.records import percentile
from gradq.bench.scenario import COMPUTE, PLAIN, Scenario

__all__ = ["BASELINE", "Losses", "Row", "Spread", "Summary", "summarise", "within_two_sd"]

Record = dict[str, Any]
Blocks = dict[tuple[int, int, int, str], Record]  # by attempt, seed, turn, codec

BASELINE = "bf16"
WORTH_IT = 0.97  # a codec must save 3 % of a step before we recommend it
LEAST_SAMPLES = 3  # for a verdict
_SMOOTH = 5


@dataclass(frozen=True)
class Spread:
    """A median with its 20th and 80th percentile and the number of samples."""

    median: float
    p20: float
    p80: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        low, median, high = (percentile(values, fraction) for fraction in (0.2, 0.5, 0.8))
        return cls(median, low, high, len(values))


@dataclass(frozen=True)
class Losses:
    """A codec's final validation losses, by seed, beside the baseline's of the same seeds.

    Attributes:
        values: a loss a seed.
        mean: the mean of them.
        sd: the standard deviation of the seeds' values; None below two seeds.
        difference: the difference of the means to the baseline's.
        pooled_sd: the root of the mean of both variances.
        within_two_sd: |difference| <= 2 pooled_sd; None below three seeds: two say too little.
        paired: the mean difference with the same seed and data; a sharper test.
    """

    values: tuple[float, ...]
    mean: float
    sd: float | None
    difference: float | None
    pooled_sd: float | None
    within_two_sd: bool | None
    paired: float | None

    @property
    def is_harmful(self) -> bool:
        """Whether it ended higher than the baseline beyond the noise, or in NaN or Inf."""
        worse = self.within_two_sd is False and not (self.difference or 0) <= 0
        return worse or not math.isfinite(self.mean)


@dataclass
class Row:
    """One codec's numbers. Times are of a step in ms, bytes of a step and rank.

    Attributes:
        codec: name of the codec in the scenario.
        step_ms: step time of the slowest rank.
        ratio: step time relative to plain DDP, block by block.
        exposed_ms: step - compute-only step, block by block.
        wire_bytes: payload, as the transport counts it; mean over ranks.
        busiest_wire_bytes: bytes of the rank that sends most.
        interface_bytes: bytes that left the interface, protocol overhead included; mean over ranks. None on
            loopback, which everything on the machine shares.
        codec_ms: encoding and decoding, on the worker thread.
        cpu_ms: processor time of a rank.
        busy: fraction of all cores in use.
        losses: final validation losses; None where the loss means nothing or was not asked for.
        curve: (step, mean loss over seeds, sd over seeds, seconds so far, bytes so far).
        time_to_loss_s: seconds until the smoothed training loss is what plain DDP has after 80 % of its
            steps; None if it never is.
    """

    codec: str
    step_ms: Spread
    ratio: Spread | None
    exposed_ms: Spread | None
    wire_bytes: float | None
    busiest_wire_bytes: float | None
    interface_bytes: float | None
    codec_ms: float | None
    cpu_ms: float | None
    busy: float | None
    losses: Losses | None = None
    curve: list[tuple[float, float, float, float, float]] = field(default_factory=list)
    time_to_loss_s: float | None = None

    @property
    def overhead(self) -> float | None:
        """Interface bytes over payload bytes, minus 1."""
        if not self.wire_bytes or self.interface_bytes is None:
            return None
        return self.interface_bytes / self.wire_bytes - 1


@dataclass
class Summary:
    """One scenario's results.

    Attributes:
        path: path of the record.
        header: first line of the record.
        scenario: what was measured.
        rows: a codec each, in the order of the scenario.
        refused: codecs that could not run, and why.
        events: failures, restarts, warnings.
        seeds: the seeds that have samples.
        finished: the seeds that ran to the end.
        parameters: number of parameters of the model.
        left_out: a sentence for each line of the record that could not be used.
    """

    path: Path
    header: Record
    scenario: Scenario
    rows: list[Row]
    refused: dict[str, str]
    events: list[Record]
    seeds: list[int]
    finished: list[int]
    parameters: int
    left_out: list[str] = field(default_factory=list)

    def row(self, codec: str) -> Row | None:
        """The row of a codec, if it ran."""
        return next((row for row in self.rows if row.codec == codec), None)

    @property
    def link(self) -> str:
        """The link as a table shows it."""
        if self.header.get("runner") == "namespaces":
            return str(self.scenario.link)
        return str(self.header.get("link", {}).get("asked", "as it is"))

    @property
    def title(self) -> str:
        """Model, ranks and link."""
        scenario = self.scenario
        nodes = f" on {scenario.nodes} nodes" if scenario.nodes > 1 else ""
        accumulate = f", {scenario.accumulate} batches a step" if scenario.accumulate > 1 else ""
        size = f" ({self.parameters / 1e6:.1f} M)" if self.parameters else ""
        return f"{scenario.model}{size}, {scenario.world_size} ranks{nodes}, {self.link}{accumulate}"

    def candidates(self) -> list[Row]:
        """Rows that a user could adopt, fastest first."""
        rows = [r for r in self.rows if r.codec != COMPUTE and not r.codec.startswith("free:") and r.ratio]
        return sorted(rows, key=lambda row: row.ratio.median if row.ratio else math.inf)

    def verdict(self) -> str:
        """What to do, in one sentence."""
        plain = self.row(PLAIN)
        if plain is None:
            return "No verdict: plain DDP was not measured."
        if plain.step_ms.samples < LEAST_SAMPLES:
            return f"No verdict: {plain.step_ms.samples} samples, at least {LEAST_SAMPLES} are needed."
        harmful = []
        for row in self.candidates():
            if row.codec == PLAIN or row.ratio is None:
                continue
            if row.ratio.median > WORTH_IT or row.ratio.p80 >= 1:
                continue
            if row.losses and row.losses.is_harmful:
                harmful.append(row.codec)
                continue
            text = f"{row.codec} is best here: {row.ratio.median:.2f} of plain DDP's step"
            base = self.row(BASELINE)
            if row.codec != BASELINE and base and base.ratio:
                text += f" (bf16: {base.ratio.median:.2f})"
            if row.losses is None or row.losses.within_two_sd is None:
                text += "; whether the model learns as well takes at least 3 seeds to say"
            elif row.codec != BASELINE:
                text += ", at a loss within 2 standard deviations of bf16's"
            return text + _but(harmful) + "."
        return (
            f"Do not compress here: plain DDP is best; nothing saves more than 3 % of a step{_but(harmful)}."
        )

    def to_dict(self) -> Record:
        """For --json."""
        return {
            "name": self.scenario.name,
            "title": self.title,
            "verdict": self.verdict(),
            "rows": [asdict(row) for row in self.rows],
            "refused": self.refused,
            "events": self.events,
            "left_out": self.left_out,
            "seeds": self.seeds,
            "finished": self.finished,
            "parameters": self.parameters,
            **{key: self.header.get(key) for key in ("environment", "commit", "command", "runner", "link")},
            "scenario": self.scenario.to_dict(),
        }


def _but(harmful: list[str]) -> str:
    if not harmful:
        return ""
    verb = "is" if len(harmful) == 1 else "are"
    return f" ({', '.join(harmful)} {verb} faster but ended at a higher loss)"


def within_two_sd(own: Sequence[float], base: Sequence[float]) -> tuple[float | None, bool | None]:
    """The pooled standard deviation of two sets of losses, and whether their means differ by at most two.

    Returns:
        (pooled sd, None below two values; within, None below three).
    """
    if min(len(own), len(base)) < 2:
        return None, None
    pooled = math.sqrt((statistics.variance(own) + statistics.variance(base)) / 2)
    if min(len(own), len(base)) < 3:
        return pooled, None
    return pooled, abs(statistics.mean(own) - statistics.mean(base)) <= 2 * pooled


def summarise(path: Path) -> Summary:
    """Read a record and work it out.

    Raises:
        ConfigError: it is not a record of `gradq bench`, of another schema, or damaged as a whole. Lines that
            are damaged are left out, and named in the summary.
    """
    reading = read_record(path)
    header, lines = reading.header, reading.lines
    scenario = Scenario.from_dict(header["scenario"], where=str(path))
    blocks: Blocks = {}
    for line in lines:
        if line["record"] == "block":  # a restart repeats turns since the checkpoint: the last one stands
            blocks[line["attempt"], line["seed"], line["turn"], line["codec"]] = line
    finals = {(r["seed"], r["codec"]): r["val_loss"] for r in lines if r["record"] == "final"}
    starts = [r for r in lines if r["record"] == "start"]
    shared = starts[0].get("interface_ranks", 1) if starts else 1
    if starts and starts[0]["interface"] == "lo":
        shared = 0  # the loopback counts the bytes of all ranks, so it tells nothing of one
    known = dict.fromkeys(codec for *_, codec in blocks)
    names = dict.fromkeys([codec for codec in scenario.contenders if codec in known] + [*known])
    rows = [_row(codec, blocks, shared) for codec in names]
    rows = [row for row in rows if row.step_ms.samples]
    for row in rows:
        row.losses = _losses(row.codec, finals)
        row.curve = _curve(row.codec, blocks)
    _time_to_loss(rows)
    return Summary(
        path=path,
        header=header,
        scenario=scenario,
        rows=rows,
        refused={r["codec"]: r["reason"] for r in lines if r["record"] == "refused"},
        events=[r for r in lines if r["record"] == "event"]
        + [
            {"event": "preflight warning", "reason": text, "seed": r["seed"]}
            for r in lines
            if r["record"] == "preflight"
            for text in r["warnings"]
        ],
        seeds=sorted({seed for _, seed, _, _ in blocks}),
        finished=sorted({r["seed"] for r in lines if r["record"] == "end"}),
        parameters=starts[0]["parameters"] if starts else 0,
        left_out=reading.left_out,
    )


def _row(codec: str, blocks: Blocks, shared: int) -> Row:
    own = [r for r in blocks.values() if r["codec"] == codec and not r["warmup"]]
    if not own:
        return Row(codec, Spread(math.nan, math.nan, math.nan, 0), *[None] * 8)  # type: ignore[arg-type]
    ratios: list[float] = []
    exposed: list[float] = []
    for record in own:
        step_ms = max(record["step_ms"])
        for other, values in ((PLAIN, ratios), (COMPUTE, exposed)):
            theirs = blocks.get((record["attempt"], record["seed"], record["turn"], other))
            if theirs is not None:
                value = max(theirs["step_ms"])
                values.append(step_ms / value if other == PLAIN else step_ms - value)

    def median(kind: str, pick: Any = statistics.mean) -> float | None:
        values = [pick(r[kind]) for r in own if kind in r]
        return statistics.median(values) if values else None

    timings = [
        statistics.mean(r["encode_ms"]) + statistics.mean(r["decode_ms"])
        for r in own
        if "encode_ms" in r and "decode_ms" in r
    ]
    interface = median("interface_bytes") if shared else None
    if interface is not None:  # every rank of a host reads the sum of them
        interface /= shared
    return Row(
        codec=codec,
        step_ms=Spread.of([max(r["step_ms"]) for r in own]),
        ratio=Spread.of(ratios) if ratios else None,
        exposed_ms=Spread.of(exposed) if exposed and codec != COMPUTE else None,
        wire_bytes=median("wire_bytes"),
        busiest_wire_bytes=median("wire_bytes", max),
        interface_bytes=interface,
        codec_ms=statistics.median(timings) if timings else None,
        cpu_ms=median("cpu_ms"),
        busy=median("busy"),
    )


def _losses(codec: str, finals: dict[tuple[int, str], float]) -> Losses | None:
    seeds = [seed for seed, name in finals if name == codec]
    if not seeds:
        return None
    own = [finals[seed, codec] for seed in seeds]
    base = [finals[seed, BASELINE] for seed in seeds if (seed, BASELINE) in finals]
    complete = len(base) == len(own)
    pooled, within = within_two_sd(own, base) if complete else (None, None)
    return Losses(
        values=tuple(own),
        mean=statistics.mean(own),
        sd=statistics.stdev(own) if len(own) > 1 else None,
        difference=statistics.mean(own) - statistics.mean(base) if complete else None,
        pooled_sd=pooled,
        within_two_sd=within,
        paired=statistics.mean(a - b for a, b in zip(own, base, strict=True)) if complete else None,
    )


def _curve(codec: str, blocks: Blocks) -> list[tuple[float, float, float, float, float]]:
    """Training loss against steps, seconds and bytes, over seeds; smoothed over a few blocks."""
    by_seed: dict[int, list[Record]] = {}
    last = {seed: attempt for attempt, seed, _, _ in sorted(blocks)}
    for (attempt, seed, _, name), record in sorted(blocks.items()):
        if name == codec and attempt == last[seed] and "loss" in record:
            by_seed.setdefault(seed, []).append(record)
    if not by_seed:
        return []
    points = []
    seconds = sent = steps = 0.0
    series = [[statistics.mean(r["loss"]) for r in records] for records in by_seed.values()]
    first = next(iter(by_seed.values()))
    for index in range(min(len(entry) for entry in series)):
        smooth = [statistics.mean(entry[max(0, index - _SMOOTH + 1) : index + 1]) for entry in series]
        record = first[index]
        steps += record["steps"]
        times = [max(records[index]["step_ms"]) for records in by_seed.values()]
        seconds += statistics.mean(times) * record["steps"] / 1e3
        sent += statistics.mean(record.get("wire_bytes", [0.0])) * record["steps"]
        sd = statistics.stdev(smooth) if len(smooth) > 1 else 0.0
        points.append((steps, statistics.mean(smooth), sd, seconds, sent))
    return points


def _time_to_loss(rows: list[Row]) -> None:
    plain = next((row for row in rows if row.codec == PLAIN), None)
    if plain is None or len(plain.curve) < 2 * _SMOOTH:
        return
    target = plain.curve[int(0.8 * len(plain.curve))][1]
    for row in rows:
        row.time_to_loss_s = next((point[3] for point in row.curve if point[1] <= target), None)
