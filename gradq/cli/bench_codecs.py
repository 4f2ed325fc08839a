"""`gradq bench codecs`: the frontier of the codecs on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import rich.console
import rich.progress
import rich.table
import torch
import typer

from gradq.bench import frontier, gradients
from gradq.bench.records import environment
from gradq.codecs import Codec
from gradq.errors import ConfigError

__all__ = ["codecs"]

_SPEED_NUMEL = 6_250_000  # 25 MB


def codecs(
    chosen: Annotated[
        str, typer.Option("--codecs", help="Specs separated by commas, such as rot4,int4(block_size=64).")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="Write OUT.csv, OUT.json and, with matplotlib, OUT.png.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--input", help="Your gradients: a dict of tensors (.pt), or a list of them by rank; .npz."
        ),
    ] = None,
    function: Annotated[
        str, typer.Option("--gradients", help="path.py:function, which returns gradients by rank.")
    ] = "",
    ranks: Annotated[int, typer.Option(min=1, help="Ranks whose mean is measured: of 2, 8 and 64.")] = 64,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure speed against memcpy.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Few numbers: to see that it works.")] = False,
) -> None:
    """Measure error against bits on the wire, error of the mean over ranks, and speed of codecs.

    Error: NMSE on normal, Laplace and Student-t (3 degrees of freedom) numbers, and on gradients if you give
    some (--input, --gradients); beside it the least that any code of so many bits can have on normal numbers.
    Error of the mean of 2, 8 and 64 ranks: without error feedback, on your gradients by rank, or on normal
    numbers of which the ranks share half. Speed: encode (with error feedback where it is on) and decode 25 MB
    on one thread, as a fraction of memcpy in the same rounds.

    Example: gradq bench codecs --gradients benchmarks/codecs.py:gradients --out frontier
    """
    console, stderr = rich.console.Console(), rich.console.Console(stderr=True)
    if file is not None and function:
        raise ConfigError("--input and --gradients both give gradients: choose one")
    codec_list = frontier.choose(chosen)
    if len({str(codec) for codec in codec_list}) < len(codec_list):
        raise ConfigError(f"--codecs {chosen}: a codec is given twice")
    numel = 1 << (14 if quick else 18)
    inputs: dict[str, Sequence[torch.Tensor]] = {n: [x] for n, x in gradients.synthetic(numel).items()}
    by_rank = gradients.correlated(numel, ranks)
    if file is not None or function:
        given = gradients.from_file(file) if file is not None else gradients.from_function(function, ranks)
        inputs["gradients"] = list(given[0].values())
        by_rank = given[:ranks]
    rows = []
    for codec in rich.progress.track(codec_list, "errors", console=stderr, transient=True):
        rows.append(frontier.measure_errors(codec, inputs, by_rank, num_seeds=1 if quick else 3))
        if not stderr.is_terminal:
            stderr.print(f"errors {len(rows)}/{len(codec_list)} {codec}", soft_wrap=True, highlight=False)
    if speed:
        rows = _with_speeds(rows, codec_list, quick, stderr)
    if not console.is_terminal:
        console.width = 240  # a file has no width
    console.print(_table(rows))
    if len(by_rank) < 2:
        stderr.print("one rank's gradients have no mean: give a list of dicts, one a rank")
    if out is not None:
        _write(rows, out, stderr, quick=quick, source=function or str(file or "drawn numbers"))


def _with_speeds(
    rows: list[frontier.Row], chosen: list[Codec], quick: bool, stderr: rich.console.Console
) -> list[frontier.Row]:
    with stderr.status("speed"):
        speeds = frontier.measure_speeds(
            chosen, numel=1 << 16 if quick else _SPEED_NUMEL, rounds=2 if quick else 15
        )
    return [replace(row, speed=speeds[row.codec]) for row in rows]


def _table(rows: list[frontier.Row]) -> rich.table.Table:
    table = rich.table.Table(box=None, header_style="bold", pad_edge=False)
    for name in rows[0].cells():
        table.add_column(name.replace("_", " "), justify="left" if name == "codec" else "right", no_wrap=True)
    for row in rows:
        cells = row.cells()
        table.add_row(
            str(cells.pop("codec")),
            f"{cells.pop('bits'):.3f}",
            *(f"{value:.3g}" for value in cells.values()),
        )
    return table


def _write(
    rows: list[frontier.Row], out: Path, stderr: rich.console.Console, *, quick: bool, source: str
) -> None:
    files = [out.with_name(out.name + suffix) for suffix in (".csv", ".json", ".png")]
    frontier.write_csv(rows, files[0])
    facts = environment()
    setting = {
        "command": " ".join(["gradq", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "environment": facts,
        "gradients": source,
        "quick": quick,
    }
    record = {"setting": setting, "rows": [row.cells() for row in rows]}
    files[1].write_text(json.dumps(record, indent=1) + "\n")
    if find_spec("matplotlib") is None:
        files.pop()
        stderr.print("no picture: pip install 'gradq[plot]'")
    else:
        from gradq.bench.frontier_plot import plot_frontier

        title = f"gradq's codecs · {source} · {facts['cpu']}, torch {facts['torch']}, {setting['date']}"
        plot_frontier(rows, files[2], title=title + (" · quick" if quick else ""))
    stderr.print(f"wrote {', '.join(str(file) for file in files)}", soft_wrap=True)
