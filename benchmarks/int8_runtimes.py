"""ExecuTorch (.pte), LiteRT (.tflite) and OpenVINO (ONNX): gradq's ranges in other runtimes.

    benchmarks/int8_environments.sh D                     # makes the environments and runs this script
    python benchmarks/int8_runtimes.py --executorch D/executorch/bin/python --litert D/litert/bin/python

A model prepared and calibrated by gradq becomes a graph of PT2E's quantize and dequantize operators with
gradq's ranges (`gradq.export.exported_program`, operators="pt2e"), which the runtime's converter lowers;
OpenVINO reads the ONNX file that is written for TensorRT.
All that happens in the runtime's own environment, by benchmarks/int8_runtime_worker.py. fp32 and int8 of a
runtime run in turns on one thread, at each batch size from a file made for it. Compared with fp32 and with
gradq's integer reference: large models on random inputs, small ones on the 450 held-out digits. What fails is
named with its error.

Writes benchmarks/results/int8_runtimes.md and a JSON record.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

from gradq.bench.records import environment, write_record  # noqa: E402

KINDS = ("cnn", "mobile", "mlp", "transformer")


def run(runtime: str, python: str, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one model in one runtime, or the error."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [python, str(HERE / "int8_runtime_worker.py"), runtime, kind, str(out)]
        command += ["--seconds", str(args.seconds), *(["--smoke"] if args.smoke else [])]
        command += ["--batches", *map(str, args.batches)]
        command += ["--no-digits"] if args.no_digits else []
        variables = {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, env=os.environ | variables, capture_output=True, text=True, check=False
        )
        if done.returncode == 0 and out.exists():
            return json.loads(out.read_text())
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no output"]
    print("\n".join(lines[-15:]), file=sys.stderr)
    error = lines[-1].strip() if done.returncode > 0 else f"ended by signal {-done.returncode}"
    return {"runtime": runtime, "kind": kind, "error": error}


def table(results: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    lines = [
        "| runtime | model | fp32, MB | int8, MB | smaller | batch | fp32, ms | int8, ms (10 … 90 %) | "
        "faster (10 … 90 %) | cold | error against fp32 / reference (NMSE) | "
        "digits: fp32, int8, reference, % |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        if "error" in r:
            lines.append(f"| {r['runtime']} | {r['kind']} | failed: {r['error']} | | | | | | | | | |")
            continue
        d = r.get("digits") or {}
        digits = d.get("error") or ", ".join(f"{d[k]:.2f}" for k in ("fp32", "int8", "reference") if k in d)
        for batch, found in r["latency"].items():
            lines.append(
                f"| {r['runtime']} {r['version']} | {r['kind']} | {r['fp32_mb']:.2f} | {r['int8_mb']:.2f} | "
                f"{r['fp32_mb'] / r['int8_mb']:.2f} | {batch} | {found['fp32_ms']:.3g} | "
                f"{found['int8_ms']:.3g} ({found['int8_low_ms']:.3g} … {found['int8_high_ms']:.3g}) | "
                f"{found['faster']:.2f} ({found['faster_low']:.2f} … {found['faster_high']:.2f}) | "
                f"{found['cold']:.2f} | {r['nmse_fp32']:.1e} / {r['nmse_reference']:.1e} | "
                f"{digits or '-'} |"
            )
    return lines


def main() -> None:
    """Convert, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--executorch", help="a Python with executorch")
    parser.add_argument("--litert", help="a Python with litert-torch and ai-edge-litert")
    parser.add_argument("--openvino", help="a Python with openvino, onnx and onnxscript")
    parser.add_argument("--models", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, per model, runtime and batch")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--no-digits", action="store_true", help="leave out training on digits")
    parser.add_argument("--smoke", action="store_true", help="tiny models")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "int8_runtimes.md")
    args = parser.parse_args()
    pythons = {"executorch": args.executorch, "litert": args.litert, "openvino": args.openvino}
    if not any(pythons.values()):
        parser.error("name at least one Python; benchmarks/int8_environments.sh makes them")
    facts, load, results = environment(), os.getloadavg()[0], []
    lines: list[str] = []
    for kind in args.models:
        for runtime, python in pythons.items():
            if python is None:
                continue
            results.append(run(runtime, python, kind, args))
            print(results[-1], flush=True)
            lines = [
                "# INT8 in ExecuTorch, LiteRT and OpenVINO",
                "",
                f"`benchmarks/int8_environments.sh`, {time.strftime('%Y-%m-%d')}, {facts['cpu']}, 1 thread, "
                f"in turns, {args.seconds:g} s each; load average at the start {load:.1f}. Weights "
                "s8 per channel, static asymmetric activations with ranges of gradq: symmetric for OpenVINO,"
                " dynamic for the transformer in the others.",
                "",
                *table(results),
            ]
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text("\n".join(lines) + "\n")
            write_record(
                args.out.parent, args.out.stem, command="benchmarks/int8_environments.sh", environment=facts,
                load_average=load, rows=results,
            )  # fmt: skip
    print("\n".join(lines))


if __name__ == "__main__":
    main()
