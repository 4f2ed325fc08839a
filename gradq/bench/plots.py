"""Plots of a report. Each is drawn once and saved twice: as PNG, and as SVG whose colours follow the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gradq.bench.scenario import COMPUTE, PLAIN
from gradq.bench.summary import Summary
from gradq.bench.tables import label
from gradq.errors import ConfigError

__all__ = ["draw_bandwidth", "draw_losses", "draw_steps", "save"]

# replaced by the page's own in the SVG
_INK, _MUTED, _GRID = "#1b1c1d", "#6b6c6d", "#dfe0e1"
_COLORS = {
    PLAIN: "#7d7f84",
    "bf16": "#c98500",
    "int8": "#2f7fd0",
    "int4": "#d2277a",
    "int4+int4": "#8b5cd6",
    "rot4": "#2f9e62",
    "torch-powersgd:1": "#129ea6",
    "torch-powersgd:4": "#6f9417",
}
_OTHERS = ("#e0603a", "#5a6fd8", "#a8743c", "#b04fb8", "#3f8f8f")

_NO_MATPLOTLIB = "a report's plots need matplotlib: pip install 'gradq[plot]'"

Figure = Any
Axes = Any


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Sequence[Axes]]:
    try:
        from matplotlib.figure import Figure as Empty
    except ImportError:
        raise ConfigError(_NO_MATPLOTLIB) from None
    figure = Empty(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        for spine in one.spines.values():
            spine.set_color(_MUTED)
        one.tick_params(colors=_MUTED, labelsize=9)
        one.grid(color=_GRID, linewidth=0.8)
        one.set_axisbelow(True)
        one.xaxis.label.set_color(_INK)
        one.yaxis.label.set_color(_INK)
    return figure, axes


def _color(codec: str, codecs: Sequence[str]) -> str:
    codec = codec.removeprefix("free:")
    if codec in _COLORS:
        return _COLORS[codec]
    others = [name for name in codecs if name not in _COLORS]
    return _OTHERS[others.index(codec) % len(_OTHERS)] if codec in others else _MUTED


def draw_steps(summary: Summary) -> Figure:
    """Bars of a step: computing, exposed codec time at most, and the rest of what is exposed."""
    rows = [row for row in summary.rows if row.exposed_ms is not None]
    compute = summary.row(COMPUTE)
    if not rows or compute is None:
        return None
    figure, (axes,) = _figure(7.2, 0.42 * len(rows) + 1.3)
    compute_ms = compute.step_ms.median
    for index, row in enumerate(rows):
        exposed = max(0.0, row.step_ms.median - compute_ms)
        codec = min(row.codec_ms or 0.0, exposed)
        parts = (
            (min(compute_ms, row.step_ms.median), _MUTED),
            (codec, "#d2277a"),
            (exposed - codec, "#2f7fd0"),
        )
        start = 0.0
        for width, color in parts:
            axes.barh(index, width, left=start, color=color, height=0.62)
            start += width
        axes.plot([row.step_ms.p20, row.step_ms.p80], [index, index], color=_INK, linewidth=1.2)
        ratio = f"{row.ratio.median:.2f}x" if row.ratio else ""
        axes.annotate(
            f" {row.step_ms.median:.0f} ms  {ratio}",
            (max(start, row.step_ms.p80), index),
            va="center",
            fontsize=9,
            color=_INK,
        )
    axes.set_yticks(range(len(rows)), [label(row.codec) for row in rows])
    axes.tick_params(axis="y", colors=_INK, length=0)
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms a step: computing, encoding and decoding, exposed communication")
    handles = [
        _patch(_MUTED, "computing"),
        _patch("#d2277a", "encode + decode, as far as exposed"),
        _patch("#2f7fd0", "exposed communication"),
    ]
    figure.legend(
        handles=handles, loc="outside upper left", ncols=3, fontsize=8, frameon=False, labelcolor=_INK
    )
    return figure


def _patch(color: str, text: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=color, label=text)


def draw_losses(summary: Summary) -> Figure:
    """Training loss against steps, seconds and bytes, with bands of one standard deviation over seeds."""
    rows = [row for row in summary.rows if len(row.curve) > 2]
    if not rows:
        return None
    figure, axes = _figure(10.5, 3.5, columns=3)
    codecs = [row.codec for row in rows]
    for row in rows:
        steps, means, sds, seconds, sent = zip(*row.curve, strict=True)
        low = [mean - sd for mean, sd in zip(means, sds, strict=True)]
        high = [mean + sd for mean, sd in zip(means, sds, strict=True)]
        color = _color(row.codec, codecs)
        for one, xs in zip(axes, (steps, seconds, [value / 1e6 for value in sent]), strict=True):
            if one is axes[2] and not any(xs):
                continue
            one.plot(xs, means, color=color, linewidth=1.6, label=label(row.codec))
            if any(sds):
                one.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)
    for one, text in zip(axes, ("steps", "seconds", "MB sent by a rank"), strict=True):
        one.set_xlabel(text)
    from matplotlib.ticker import LogLocator, NullFormatter

    for one in axes[1:]:
        one.set_xscale("log")
        one.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        one.xaxis.set_major_formatter("{x:g}")
        one.xaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("training loss, nats")
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, texts, loc="outside upper left", ncols=6, fontsize=8, frameon=False, labelcolor=_INK
    )
    return figure


def draw_bandwidth(title: str, ratios: dict[str, list[tuple[float, float]]]) -> Figure:
    """Step time relative to plain DDP against the rate of the link.

    Args:
        title: title of the plot.
        ratios: (rate in bit/s, ratio) by codec, by ascending rate.
    """
    figure, (axes,) = _figure(7.2, 4.2)
    for codec, points in ratios.items():
        axes.plot(
            [rate / 1e6 for rate, _ in points],
            [ratio for _, ratio in points],
            color=_color(codec, list(ratios)),
            linestyle="--" if codec.startswith("free:") else "-",
            marker="o",
            markersize=4,
            linewidth=1.8,
            label=label(codec),
        )
    axes.axhline(1.0, color=_INK, linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("Mbit/s of each host's link")
    axes.set_ylabel("step time, plain DDP = 1")
    from matplotlib.ticker import FixedLocator, NullFormatter

    rates = sorted({rate / 1e6 for points in ratios.values() for rate, _ in points})
    axes.xaxis.set_major_locator(FixedLocator(rates))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    ticks = [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0]
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low / 1.5 <= tick <= high * 1.5]))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    axes.legend(fontsize=8, frameon=False, labelcolor=_INK)
    return figure


def save(draw: Callable[[], Figure], path: Path) -> str:
    """Draw, write the PNG, and return the SVG; "" if there is nothing to draw.

    The SVG's ink, grid and ground are the page's --ink, --muted and --grid.
    """
    try:
        from matplotlib import rc_context
    except ImportError:
        raise ConfigError(_NO_MATPLOTLIB) from None

    buffer = io.StringIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": path.stem, "text.parse_math": False}
    with rc_context(settings):  # a dollar sign in a name is no formula
        figure = draw()
        if figure is None:
            return ""
        figure.savefig(path, dpi=150, facecolor="white")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for color, name in ((_INK, "ink"), (_MUTED, "muted"), (_GRID, "grid")):
        svg = svg.replace(color, f"var(--{name})")
    svg = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    for size in ("width", "height"):  # the page decides
        svg = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
    return svg
