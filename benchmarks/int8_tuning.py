"""What else makes the INT8 CNN faster in ONNX Runtime, and what does not: one change at a time.

    python benchmarks/int8_tuning.py            # about 15 minutes; writes benchmarks/results/int8_tuning.md
    python benchmarks/int8_tuning.py --smoke

Every row is the ResNet-50-like CNN of benchmarks/int8.py with one thing changed, timed in turns in one
process on one thread; "against the default" is the median over rounds of default time over its time.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

import int8_models as zoo  # noqa: E402

from gradq import export, quant  # noqa: E402
from gradq.bench.records import environment, write_record  # noqa: E402
from gradq.export.timing import interleave, summarize  # noqa: E402


def session(path: Path, change: Callable[[Any], None] | None = None) -> Any:
    """A session with one option changed."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if change is not None:
        change(options)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def entry(key: str, value: str) -> Callable[[Any], None]:
    """Change a configuration entry."""
    return lambda options: options.add_session_config_entry(key, value)


def level(name: str) -> Callable[[Any], None]:
    """Change the optimization level."""
    chosen = getattr(onnxruntime.GraphOptimizationLevel, name)
    return lambda options: setattr(options, "graph_optimization_level", chosen)


def uint8_input(path: Path, out: Path) -> Path:
    """The same file without its first QuantizeLinear: the caller gives codes."""
    proto = onnx.load(str(path))
    first = next(n for n in proto.graph.node if n.op_type == "QuantizeLinear")
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            if name == first.output[0]:
                node.input[i] = first.input[0]
    proto.graph.node.remove(first)
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    onnx.save(proto, str(out))
    return out


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180.0, help="per batch size")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "int8_tuning.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    target = quant.detect_target()
    bits = "int7" if target == "x86-avx2" else "int8"
    model, inputs = zoo.large("cnn", args.smoke)

    def prepared(weights: str = bits, **more: str) -> torch.nn.Module:
        config = quant.Config(weights=weights, observer="minmax", weight_observer="minmax", **more)
        qmodel = quant.prepare(model, inputs(2), config)
        return quant.calibrate(qmodel, [inputs(4)], show_progress=False)

    lines: list[str] = []
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, fp32 = folder / "int8.onnx", folder / "fp32.onnx"
        qmodel = prepared()
        export.onnx(qmodel, base)
        export.float_onnx(qmodel, fp32)
        contenders: dict[str, Any] = {"default": session(base), "fp32": session(fp32)}
        for what, change in {
            "ORT_ENABLE_EXTENDED: no NHWC": level("ORT_ENABLE_EXTENDED"),
            "ORT_ENABLE_BASIC: nothing fused": level("ORT_ENABLE_BASIC"),
            "precise kernel (session.x64quantprecision)": entry("session.x64quantprecision", "1"),
            "no prepacked weights": entry("session.disable_prepacking", "1"),
            "denormals as zeros": entry("session.set_denormal_as_zero", "1"),
            "no memory pattern": lambda options: setattr(options, "enable_mem_pattern", False),
            "no arena": lambda options: setattr(options, "enable_cpu_mem_arena", False),
        }.items():
            contenders[what] = session(base, change)
        contenders["u8 input: no QuantizeLinear"] = session(uint8_input(base, folder / "u8.onnx"))
        for what, made in {
            "weights per tensor": {"weights": f"{bits}-tensor"},
            "s8 activations": {"activations": "int8-sym"},
            "matmul placement: a quantizer less before additions": {"placement": "matmul"},
            "4-bit storage": {"weights": "int4"},
        }.items():
            path = folder / f"{len(contenders)}.onnx"
            export.onnx(prepared(**made), path)
            contenders[what] = session(path)
            if what == "s8 activations":
                allowed = entry("session.qdqisint8allowed", "1")
                contenders["s8 activations, session.qdqisint8allowed"] = session(path, allowed)
        clock = time.thread_time if args.clock == "cpu" else time.perf_counter
        for batch in args.batches:
            x = inputs(batch).numpy()
            feeds = {n: x.clip(0, 255).astype("uint8") if n.startswith("u8") else x for n in contenders}
            if batch == args.batches[0]:
                path = folder / "fixed.onnx"
                export.onnx(qmodel, path, example_inputs=inputs(batch), dynamic_batch=False)
                fixed = f"batch fixed at {batch}"
                contenders[fixed], feeds[fixed] = session(path), x
            else:
                contenders = {n: s for n, s in contenders.items() if not n.startswith("batch fixed")}
            calls = {n: lambda s=s, f=feeds[n]: s.run(None, {"x": f}) for n, s in contenders.items()}
            times = interleave(calls, seconds=args.seconds, min_rounds=5, clock=clock)
            against_fp32, against = summarize(times, "fp32"), summarize(times, "default")
            lines += [
                "", f"## Batch {batch}", "",
                "| change | ms (10 … 90 %) | against fp32 | against the default |", "|---|---|---|---|",
            ]  # fmt: skip
            for n, found in against.items():
                rows.append({"batch": batch, "change": n, "ms": found.median_ms, "against": found.ratio})
                lines.append(
                    f"| {n} | {found.median_ms:.3g} ({found.low_ms:.3g} … {found.high_ms:.3g}) | "
                    f"{against_fp32[n].ratio:.2f} | {found.ratio:.2f} ({found.ratio_low:.2f} … "
                    f"{found.ratio_high:.2f}) |"
                )
                print(lines[-1], flush=True)
    facts = environment()
    head = [
        "# The INT8 CNN, one change at a time",
        "",
        f"`python benchmarks/int8_tuning.py`, {time.strftime('%Y-%m-%d')}, {facts['cpu']} ({target}), torch "
        f"{facts['torch']}, onnxruntime {onnxruntime.__version__}, 1 thread, in turns, {args.clock} time. "
        f"Weights {bits}.",
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(head + lines) + "\n")
    write_record(args.out.parent, args.out.stem, environment=facts, target=target, rows=rows)


if __name__ == "__main__":
    main()
