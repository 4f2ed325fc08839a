"""INT8 on the architectures that people bring: distance to fp32, size, and speed in ONNX Runtime.

    python benchmarks/int8_architectures.py --torchao .runtimes/torchao/bin/python    # about 30 minutes
    python benchmarks/int8_architectures.py --models resnet lstm --seconds 5
    python benchmarks/int8_architectures.py --table                                   # of what is recorded

Contenders, all in one process and in turns: fp32; gradq with the configuration of the processor, static and
(for models of linear layers) with dynamic activations; onnxruntime.quantization, static and (likewise)
dynamic; torchao PT2E if --torchao names a Python that has it. All calibrate on as many batches. Distances are
signal to noise of the file's outputs against fp32's, in dB, on a batch that nobody calibrated on. Latencies
are medians over rounds, ratios medians of the rounds' own ratios; one thread.

Each finished architecture is kept in benchmarks/results/int8_architectures.json: a run that was broken off
goes on where it was. --again measures what is there once more. Writes the table beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

import int8_peers as peers  # noqa: E402
import int8_zoo as zoo  # noqa: E402

from gradq import export, quant  # noqa: E402
from gradq.bench.records import environment, git_commit  # noqa: E402
from gradq.export.timing import interleave, summarize  # noqa: E402

_PEERS = ("onnxruntime", "torchao")
_INT8_FROM = 1.2  # a file that is not even so much smaller than fp32's holds its weights in float
LINEAR = ("vit", "bert", "gpt2", "llama", "lstm", "dlrm")  # models of linear layers: dynamic formats, too


def files_of(name: str, folder: Path, torchao: str | None) -> tuple[dict[str, Path], dict[str, Any], Any]:
    """Every contender's file; what gradq says of its own; and the function batch size → inputs by name."""
    model, inputs = zoo.build(name)
    calibration = [inputs(4) for _ in range(4)]
    target = quant.detect_target()
    files: dict[str, Path] = {}
    notes: dict[str, Any] = {}
    configs = {"gradq": quant.Config.for_target(target)}
    if name in LINEAR:
        weights = "int8" if target != "x86-avx2" else "int7"
        configs["gradq dynamic"] = quant.Config(weights=weights, activations="int8-batch")
    for title, config in configs.items():
        started = time.perf_counter()
        qmodel = quant.prepare(model, inputs(2), config)
        quant.calibrate(qmodel, calibration, show_progress=False)
        if not files:
            files["fp32"] = folder / f"{name}-fp32.onnx"
            export.float_onnx(qmodel, files["fp32"])
        files[title] = folder / f"{name}-{len(files)}.onnx"
        report = export.onnx(qmodel, files[title])
        spent = time.perf_counter() - started
        seen = export.verify(
            files[title], qmodel, [inputs(2)], baseline=files["fp32"], batch_sizes=(), strict=False,
            show_progress=False,
        )  # fmt: skip
        notes[title] = {
            "islands": report.float_islands, "seconds": round(spent, 1), "failures": seen.failures,
            "operators": dict(sorted(seen.operators.counts.items())),
            "equal_to_reference": seen.agreement.equal, "exact": seen.agreement.exact,
        }  # fmt: skip
        print(f"{report} ({spent:.0f} s) failures: {seen.failures}", flush=True)
    names = [i.name for i in export.session(files["fp32"]).get_inputs()]

    def named(size: int) -> dict[str, Any]:
        return {n: x.numpy() for n, x in zip(names, inputs(size), strict=True)}

    feeds = [{n: x.numpy() for n, x in zip(names, batch, strict=True)} for batch in calibration]
    for kind in ("static", "dynamic"):
        if kind == "dynamic" and name not in LINEAR:
            continue
        try:
            files |= peers.onnxruntime_files(
                name, files["fp32"], feeds, folder, target, linear=kind == "dynamic" or name in LINEAR,
                static=kind == "static",
            )  # fmt: skip
        except Exception as error:  # a peer that fails is a finding
            notes[f"onnxruntime {kind}"] = said(error)
    if torchao is not None:
        found = peers.torchao_files(name, torchao, folder, False, target)
        files |= found
        if not found:
            notes["torchao PT2E"] = "does not export this model"
    return files, notes, named


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One architecture: a row for every contender and batch size."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        files, notes, named = files_of(name, Path(folder), args.torchao)
        sessions: dict[str, Any] = {}
        fresh = named(16)
        sqnr: dict[str, float] = {}
        for title, path in list(files.items()):
            try:  # peers run as their users run them: with the default kernel
                sessions[title] = export.session(path, precise=None if title.startswith("gradq") else False)
                outputs = sessions[title].run(None, inputs_for(sessions[title], fresh))
            except Exception as error:
                notes[title] = said(error)
                sessions.pop(title, None)
                continue
            truth = truth_of(sessions["fp32"], fresh) if title != "fp32" else outputs
            sqnr[title] = min(decibel(a, b) for a, b in zip(truth, outputs, strict=True))
        sizes = {title: files[title].stat().st_size for title in sessions}
        for batch in args.batches:
            feed = named(batch)
            usable = {}
            for title, session in sessions.items():
                try:
                    session.run(None, inputs_for(session, feed))
                    usable[title] = session
                except Exception as error:
                    notes[f"{title} at batch {batch}"] = said(error)
            feeds = {n: inputs_for(s, feed) for n, s in usable.items()}
            calls = {n: lambda s=s, f=feeds[n]: s.run(None, f) for n, s in usable.items()}
            raw = interleave(calls, seconds=args.seconds, min_rounds=9, clock=time.thread_time)
            for title, latency in summarize(raw, "fp32").items():
                rows.append(
                    {
                        "contender": title, "batch": batch, "ms": latency.median_ms, "faster": latency.ratio,
                        "faster_low": latency.ratio_low, "faster_high": latency.ratio_high,
                        "rounds": latency.rounds, "mb": sizes[title] / 1e6,
                        "smaller": sizes["fp32"] / sizes[title], "sqnr_db": sqnr[title],
                    }
                )  # fmt: skip
                print(
                    f"{name:16} batch {batch:3} {title:20} {sizes[title] / 1e6:6.2f} MB "
                    f"{sqnr[title]:6.1f} dB "
                    f"{latency.median_ms:9.3f} ms {latency.ratio:5.2f}x "
                    f"({latency.ratio_low:.2f} … {latency.ratio_high:.2f})",
                    flush=True,
                )
    return {
        "rows": rows, "notes": notes, "commit": git_commit(HERE), "date": time.strftime("%Y-%m-%d"),
        "seconds": args.seconds, "load_average": os.getloadavg()[0],
    }  # fmt: skip


def said(error: Exception) -> str:
    """An error's kind and words, without the folder of this run."""
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+/", "", str(error))
    return f"{type(error).__name__}: {text[:300]}"


def inputs_for(session: Any, feed: dict[str, Any]) -> dict[str, Any]:
    """The inputs under a session's names, which come in the same order."""
    return {spec.name: x for spec, x in zip(session.get_inputs(), feed.values(), strict=True)}


def truth_of(session: Any, feed: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    """What fp32 gives."""
    outputs: list[np.ndarray[Any, Any]] = session.run(None, inputs_for(session, feed))
    return outputs


def decibel(truth: np.ndarray[Any, Any], given: np.ndarray[Any, Any]) -> float:
    """Signal to noise; 200 if nothing differs."""
    truth, given = truth.astype(np.float64), given.astype(np.float64)
    noise = float(((truth - given) ** 2).sum())
    return 200.0 if noise == 0 else float(10 * np.log10(float((truth**2).sum()) / noise))


def ours(rows: list[dict[str, Any]]) -> str:
    """The file of ours that is meant: the faster one at batch 1 (static, if within 3 %)."""
    found = {
        r["contender"]: r["faster"] for r in rows if r["contender"].startswith("gradq") and r["batch"] == 1
    }
    return "gradq" if found["gradq"] >= max(found.values()) / 1.03 else max(found, key=found.__getitem__)


def table(record: dict[str, Any]) -> str:
    """The record in Markdown: a line for every architecture, contender and batch size, and what is lost."""
    facts = record["environment"]
    lines = [
        "# INT8 on the architectures that people bring",
        "",
        f"`python benchmarks/int8_architectures.py`, {facts['cpu']} ({record['target']}), torch "
        f"{facts['torch']}, ONNX Runtime, 1 thread, in turns, the thread's own time. Random weights; dB "
        "against fp32 on a batch that nobody calibrated on.",
        "",
        "| model | contender | MB | smaller | dB | batch 1: ms | faster (10 … 90 %) | batch 32: ms "
        "| faster (10 … 90 %) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    losses: list[str] = []
    left: list[str] = []
    for name, found in record["architectures"].items():
        rows = found["rows"]
        by = {(r["contender"], r["batch"]): r for r in rows}
        for title in dict.fromkeys(r["contender"] for r in rows):
            first = next(r for r in rows if r["contender"] == title)
            cells = []
            for batch in (1, 32):
                r = by.get((title, batch))
                cells += ["-", "-"] if r is None else [
                    f"{r['ms']:.3g}", f"{r['faster']:.2f} ({r['faster_low']:.2f} … {r['faster_high']:.2f})"
                ]  # fmt: skip
            shown = "" if title == "fp32" else f"{first['sqnr_db']:.1f}"
            lines.append(
                f"| {name} | {title} | {first['mb']:.2f} | {first['smaller']:.2f} | {shown} | "
                f"{' | '.join(cells)} |"
            )
        chosen = ours(rows)
        for batch in (1, 32):
            mine = by.get((chosen, batch))
            others = [
                r for r in rows if r["batch"] == batch and r["contender"].startswith(("onnx", "torchao"))
            ]
            if mine is None:
                continue
            if mine["faster"] < 0.97:
                losses.append(f"{name}, batch {batch}: {mine['faster']:.2f}x of fp32's speed")
            best = max(others, key=lambda r: r["faster"], default=None)
            if best is not None and best["faster"] > 1.03 * mine["faster"]:
                losses.append(
                    f"{name}, batch {batch}: {best['contender']} is "
                    f"{best['faster'] / mine['faster']:.2f}x as fast as {chosen}"
                )
        exact = by[(chosen, 1)]["sqnr_db"]
        for r in rows:
            if r["batch"] != 1 or not r["contender"].startswith(("onnx", "torchao")):
                continue
            if r["smaller"] < _INT8_FROM:
                left.append(
                    f"{name}: {r['contender']}'s file is {r['mb']:.2f} MB, {r['smaller']:.2f}x smaller than "
                    f"fp32's: its layers stay in float ({r['sqnr_db']:.1f} dB, {r['faster']:.2f}x)"
                )
            elif r["sqnr_db"] > exact + 1:
                losses.append(
                    f"{name}: {r['contender']} is {r['sqnr_db'] - exact:.1f} dB closer to fp32 than {chosen}"
                )
    lines += ["", "## Where we lose", "", *([f"- {text}" for text in losses] or ["Nowhere."])]
    if left:
        lines += ["", "## Peers' files that are no INT8 files", ""]
        lines += [*(f"- {text}" for text in left), "", "Their speed counts above, their distance does not."]
    failed = [
        f"- {name}: {title}: {note}"
        for name, found in record["architectures"].items()
        for title, note in found["notes"].items()
        if isinstance(note, str)
    ]
    if failed:
        lines += ["", "## What did not run", "", *failed]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is not recorded yet, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=list(zoo.ARCHITECTURES), choices=list(zoo.ARCHITECTURES)
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--seconds", type=float, default=8.0, help="per model and batch size")
    parser.add_argument("--torchao", help="a Python with torch, torchao and onnxscript")
    parser.add_argument("--again", action="store_true", help="measure what is recorded once more")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "int8_architectures.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    record = json.loads(args.out.read_text()) if args.out.exists() else {"architectures": {}}
    for name in [] if args.table else args.models:
        if name in record["architectures"] and not args.again:
            continue
        try:
            found = measure(name, args)
        except Exception:
            traceback.print_exc()
            continue
        record |= {"environment": environment(), "target": quant.detect_target()}
        kept = record["architectures"] | {name: found}
        record["architectures"] = {n: kept[n] for n in zoo.ARCHITECTURES if n in kept}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(record))
    if record["architectures"]:
        args.out.with_suffix(".md").write_text(table(record))


if __name__ == "__main__":
    main()
