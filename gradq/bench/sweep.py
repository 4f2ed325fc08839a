"""What several records say together: a table of links for each model, and where compression stops paying."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from gradq.bench.scenario import COMPUTE, PLAIN
from gradq.bench.summary import BASELINE, Summary
from gradq.bench.tables import Table, label

__all__ = ["Group", "break_even", "groups"]


@dataclass(frozen=True)
class Group:
    """Scenarios that differ in their link only, slowest first; an unshaped link stands last.

    Attributes:
        title: the title, which says what they have in common.
        summaries: one summary for each link.
        others: further records of the same links, for their losses.
    """

    title: str
    summaries: tuple[Summary, ...]
    others: tuple[Summary, ...] = ()

    def codecs(self) -> list[str]:
        """All that ran, in order."""
        return list(dict.fromkeys(row.codec for summary in self.summaries for row in summary.rows))

    def ratios(self) -> dict[str, list[tuple[float, float]]]:
        """(rate, ratio to plain DDP) by codec, where the link has a rate and plain DDP and the codec ran."""
        found: dict[str, list[tuple[float, float]]] = {}
        for summary in self.summaries:
            rate = summary.scenario.link.rate_bps
            for row in summary.rows if rate is not None else ():
                if row.codec not in (PLAIN, COMPUTE) and row.ratio is not None:
                    assert rate is not None
                    found.setdefault(row.codec, []).append((rate, row.ratio.median))
        return {codec: points for codec, points in found.items() if len(points) > 1}

    def table(self) -> Table:
        """A row a codec, a column a link, step time relative to plain DDP."""
        links = [summary.link for summary in self.summaries]
        rows = []
        ratios = self.ratios()
        for codec in self.codecs():
            if codec == PLAIN:
                continue
            texts = []
            for summary in self.summaries:
                row = summary.row(codec)
                texts.append(f"{row.ratio.median:.3f}" if row is not None and row.ratio else "")
            below = break_even(ratios.get(codec, [])) if codec != COMPUTE else ""
            rows.append([label(codec), *texts, below, self._loss(codec)])
        plain = [summary.row(PLAIN) for summary in self.summaries]
        rows.append(["plain DDP, ms", *(f"{row.step_ms.median:.0f}" if row else "" for row in plain), "", ""])
        return Table(["x plain DDP", *links, "pays below", "validation loss, within 2 sd of bf16"], rows)

    def _loss(self, codec: str) -> str:
        """Of the record with the most seeds: losses do not depend on the link."""
        members = (*self.summaries, *self.others)
        rows = [row for summary in members if (row := summary.row(codec)) and row.losses]
        losses = [row.losses for row in rows if row.losses and row.losses.within_two_sd is not None]
        if not losses:
            return ""
        best = max(losses, key=lambda entry: len(entry.values))
        verdict = "" if codec == BASELINE else ", yes" if best.within_two_sd else ", no"
        return f"{best.mean:.4f} ± {best.sd:.4f}{verdict}"


def groups(summaries: Sequence[Summary]) -> list[Group]:
    """Summaries of the same model, ranks and accumulation over at least two links.

    Of two with the same link the times are taken from the one with more nodes: losses are also measured with
    all ranks on one, where the time does not matter.
    """
    by_key: dict[str, list[Summary]] = {}
    for summary in summaries:
        scenario = summary.scenario
        key = f"{scenario.model}, {scenario.world_size} ranks"
        if scenario.accumulate > 1:
            key += f", {scenario.accumulate} batches a step"
        if scenario.link.delay_ms:
            key += f", {scenario.link.delay_ms:g} ms one way"
        by_key.setdefault(key, []).append(summary)
    found = []
    for key, members in by_key.items():
        columns: dict[float, Summary] = {}
        for summary in sorted(members, key=lambda summary: -summary.scenario.nodes):
            columns.setdefault(summary.scenario.link.rate_bps or math.inf, summary)
        if len(columns) > 1:
            chosen = tuple(columns[rate] for rate in sorted(columns))
            others = tuple(summary for summary in members if summary not in chosen)
            found.append(Group(key, chosen, others))
    return found


def break_even(points: Sequence[tuple[float, float]]) -> str:
    """The rate at which the ratio reaches 1, between measured ones on a logarithmic scale.

    Args:
        points: (rate in bit/s, ratio), by ascending rate.

    Returns:
        "7.3 Gbit/s", "nowhere" if it never pays, "> 10 Gbit/s" if it always does, "" without points.
    """
    if not points:
        return ""
    if points[0][1] >= 1:
        return "nowhere"
    for (rate, ratio), (next_rate, next_ratio) in itertools.pairwise(points):
        if next_ratio >= 1:
            share = math.log(1 / ratio) / math.log(next_ratio / ratio) if next_ratio > ratio else 0.0
            return _rate(rate * (next_rate / rate) ** share)
    return f"> {_rate(points[-1][0])}"


def _rate(bps: float) -> str:
    return f"{bps / 1e9:.3g} Gbit/s" if bps >= 1e9 else f"{bps / 1e6:.3g} Mbit/s"
