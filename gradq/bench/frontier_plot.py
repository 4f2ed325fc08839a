"""The picture of the frontier: error against bits with the floor, the error of the mean, speeds."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradq.bench.frontier import Row, floor
from gradq.errors import ConfigError

__all__ = ["plot_frontier"]

# The families, how their names begin, and their colours; later ones are drawn above earlier ones.
_FAMILIES = (
    ("exact", r"fp16|fp32|fp64|bf16", "#555555"),
    ("floating and block formats", r"fp8|mxfp|nvfp", "#8c6d31"),
    ("tables", r"nf4|lloyd|exp|power", "#9467bd"),
    ("classics: ternary, sign, QSGD, top-k", r"ternary|sign|qsgd|topk", "#d62728"),
    ("uniform", r"int", "#1f6fb4"),
    ("rotated", r"rot", "#ff7f0e"),
    ("trellis", r"trellis", "#2ca02c"),
)
_OTHER = ("other", r"", "#17becf")
_INK, _FAINT = "#222222", "#d9d9d9"


def _is_random(codec: str) -> bool:
    """Whether a spec says that its rounding or its scale makes it unbiased."""
    return "stochastic" in codec or "unbiased" in codec


def _family(codec: str) -> tuple[str, str, str]:
    return next((family for family in _FAMILIES if re.match(family[1], codec)), _OTHER)


def plot_frontier(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Draw rows into a PNG.

    Args:
        rows: results of `gradq.bench.frontier`; the first panel shows their last input.
        path: the file to write, which ends in .png.
        title: the title, which says what was measured and where.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("the picture needs matplotlib: pip install 'gradq[plot]'") from None
    timed = [row for row in rows if row.speed is not None]
    means = sorted({ranks for row in rows for ranks in row.means})
    shown = 8 if 8 in means else means[-1] if means else 0
    panels = 1 + bool(shown) + bool(timed)
    height = max(6.5, 0.155 * len(timed) + 1.5)
    figure = Figure(figsize=(6.6 * panels, height), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    name = list(rows[0].errors)[-1]
    labelled = [[(row.codec, row.bits, row.errors[name]) for row in rows]]
    _draw_errors(axes[0], labelled[0], f"NMSE, {name}", with_floor=True)
    if shown:
        labelled.append([(row.codec, row.bits, row.means[shown]) for row in rows if shown in row.means])
        _draw_errors(axes[1], labelled[1], f"error of the mean of {shown} ranks", with_floor=False)
    if timed:
        _draw_speeds(axes[-1], timed)
    families = [f for f in (*_FAMILIES, _OTHER) if any(_family(row.codec) == f for row in rows)]
    for label, _, color in families:
        axes[0].plot([], [], "o", color=color, label=label, markersize=6)
    axes[0].plot([], [], "o", color=_INK, markerfacecolor="white", label="hollow: unbiased", markersize=6)
    axes[0].legend(fontsize=8, frameon=True, framealpha=0.9, edgecolor="none", loc="lower left")
    figure.suptitle(title, fontsize=11, color=_INK)
    figure.draw_without_rendering()  # now the panels have their places, and labels can be put into them
    figure.set_layout_engine("none")
    for axis, points in zip(axes, labelled, strict=False):
        _label(axis, points)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _draw_errors(
    axes: Any, points: Sequence[tuple[str, float, float]], label: str, *, with_floor: bool
) -> None:
    for family in (*_FAMILIES, _OTHER):
        own = sorted((bits, error, codec) for codec, bits, error in points if _family(codec) == family)
        if not own:
            continue
        for key in {_series(codec) for _, _, codec in own}:
            line = [(bits, error) for bits, error, codec in own if _series(codec) == key]
            style = "-" if len(line) > 1 else ""
            axes.plot(*zip(*line, strict=True), style, color=family[2], linewidth=1, alpha=0.45)
        for bits, error, codec in own:
            face = "white" if _is_random(codec) else family[2]
            axes.plot(bits, error, "o", color=family[2], markersize=5.5, markerfacecolor=face)
    least = min(error for _, _, error in points if error > 0)
    most = max(bits for _, bits, _ in points)
    axes.set(yscale="log", xscale="log", xlabel="bits an element on the wire", ylabel=label)
    limits = min(0.8 * min(bits for _, bits, _ in points), 0.95), most * 1.35
    ticks = [t for t in (0.125, 0.25, 0.5, 1, 2, 3, 4, 5, 6, 8, 16, 32) if limits[0] <= t <= limits[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlim(*limits)
    axes.set_ylim(least / 2.5, max(error for _, _, error in points) * 2.5)
    axes.grid(color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if with_floor:
        left, right = axes.get_xlim()
        grid = [left * (right / left) ** (k / 200) for k in range(201)]
        bottom = axes.get_ylim()[0]
        axes.fill_between(grid, [bottom / 10] * 201, [floor(b) for b in grid], color="#eeeeee", zorder=0)
        axes.plot(grid, [floor(b) for b in grid], "--", color="#999999", linewidth=1)
        at = 3.0
        axes.annotate(
            "least error for normal numbers", (at, floor(at) / 2.2), fontsize=8, color="#777777", ha="right"
        )


def _series(codec: str) -> str:
    """Codecs that differ only in their bits are joined."""
    return re.sub(r"\d+", "#", codec, count=1)


def _label(axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Names beside their points, as many as fit without covering each other: the best of their bits first."""
    taken: list[tuple[float, float, float, float]] = []
    pixels = [axes.transData.transform((bits, error)) for _, bits, error in points]
    for x, y in pixels:
        taken.append((x - 5, y - 5, x + 5, y + 5))
    order = sorted(range(len(points)), key=lambda k: points[k][2] / floor(points[k][1]))
    size, seen = 7.0, set()
    frame = axes.get_window_extent()
    inside = (frame.x0 + 2, frame.y0 + 2, frame.x1 - 2, frame.y1 - 2)
    for k in order:
        codec = points[k][0]
        text = re.sub(r"\((rounding|scale)=\w+\)$", "", codec)
        if text in seen:
            continue
        width, high = 0.56 * size * len(text) * axes.figure.dpi / 72, 1.15 * size * axes.figure.dpi / 72
        x, y = pixels[k]
        for dx, dy in ((8, -high / 2), (-width - 8, -high / 2), (-width / 2, 7), (-width / 2, -high - 7)):
            box = (x + dx, y + dy, x + dx + width, y + dy + high)
            within = inside[0] < box[0] and box[2] < inside[2] and inside[1] < box[1] and box[3] < inside[3]
            if within and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                seen.add(text)
                offset = (72 * dx / axes.figure.dpi, 72 * dy / axes.figure.dpi)
                axes.annotate(
                    text,
                    points[k][1:],
                    xytext=offset,
                    textcoords="offset points",
                    fontsize=size,
                    color=_family(codec)[2],
                )
                break


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _draw_speeds(axes: Any, rows: Sequence[Row]) -> None:
    rows = sorted(rows, key=lambda row: row.speed.encode if row.speed else 0.0)
    for k, row in enumerate(rows):
        assert row.speed is not None
        color = _family(row.codec)[2]
        axes.plot([row.speed.encode, row.speed.decode], [k, k], "-", color=_FAINT, linewidth=1.2, zorder=1)
        axes.plot(row.speed.encode, k, "o", color=color, markersize=6, zorder=2)
        axes.plot(row.speed.decode, k, "o", color=color, markersize=5, markerfacecolor="white", zorder=2)
    axes.plot([], [], "o", color=_INK, label="encode")
    axes.plot([], [], "o", color=_INK, markerfacecolor="white", label="decode")
    axes.axvline(1, color="#999999", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [row.codec for row in rows], fontsize=7)
    axes.set(xscale="log", xlabel="speed, as a fraction of memcpy (with error feedback where it is on)")
    low = min(min(row.speed.encode, row.speed.decode) for row in rows if row.speed)
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2) if t >= 10 ** math.floor(math.log10(low))]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
