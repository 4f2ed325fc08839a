"""One model in one runtime; called by benchmarks/int8_runtimes.py in that runtime's own environment.

python benchmarks/int8_runtime_worker.py executorch cnn result.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples"), str(HERE.parent)]

import int8_models as zoo  # noqa: E402

from gradq import export, quant  # noqa: E402
from gradq.export.timing import interleave, summarize  # noqa: E402

Runner = Callable[[Tensor], Tensor]


def executorch(program: torch.export.ExportedProgram, path: Path) -> Runner:
    """Lower to XNNPACK, write the .pte and load it."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)
    method = Runtime.get().load_program(path).load_method("forward")
    return lambda x: method.execute([x])[0]


def litert(program: torch.export.ExportedProgram, path: Path) -> Runner:
    """Convert to .tflite and load it; one thread."""
    import litert_torch
    from ai_edge_litert.interpreter import Interpreter
    from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
    from litert_torch.quantize.quant_config import QuantConfig

    quantized = any("quantize_per" in str(node.target) for node in program.graph.nodes)
    config = None
    if quantized:  # tells the converter to look for the operators; the quantizer itself does nothing here
        static = get_symmetric_quantization_config(is_per_channel=True)
        config = QuantConfig(pt2e_quantizer=PT2EQuantizer().set_global(static))
    example = tuple(node.meta["val"] for node in program.graph.nodes if node.op == "placeholder")[-1]
    sample = torch.zeros(example.shape, dtype=example.dtype)
    litert_torch.convert(program.module(), (sample,), quant_config=config).export(str(path))
    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    given, got = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def call(x: Tensor) -> Tensor:
        """Inputs and outputs of a quantized file are codes."""
        (step, zero), value = given["quantization"], x.numpy()
        if given["dtype"] == np.int8:
            value = np.clip(np.rint(value / np.float32(step)) + zero, -128, 127).astype(np.int8)
        interpreter.set_tensor(given["index"], value)
        interpreter.invoke()
        out, (step, zero) = interpreter.get_tensor(got["index"]), got["quantization"]
        if got["dtype"] == np.int8:
            out = (out.astype(np.float32) - zero) * np.float32(step)
        return torch.from_numpy(out)

    return call


def openvino(_: None, path: Path) -> Runner:
    """Load an ONNX file; one thread, fp32 where it is not INT8."""
    from openvino import Core

    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    model = Core().compile_model(str(path), "CPU", options | {"INFERENCE_PRECISION_HINT": "f32"})
    request = model.create_infer_request()

    def call(x: Tensor) -> Tensor:
        request.infer([x.numpy()])
        return torch.from_numpy(request.get_output_tensor(0).data)

    return call


RUNTIMES = {
    "executorch": (executorch, ".pte", "executorch", "pt2e"),
    "litert": (litert, ".tflite", "litert-torch", "pt2e-float"),
    "openvino": (openvino, ".onnx", "openvino", "onnx"),
}


def both(model: nn.Module, qmodel: nn.Module, example: Tensor, runtime: str, folder: Path) -> dict[str, Any]:
    """(runner, bytes) of fp32 and int8, for inputs of the example's batch size."""
    convert, suffix, _, operators = RUNTIMES[runtime]
    paths = {name: folder / f"{name}-{len(example)}{suffix}" for name in ("fp32", "int8")}
    programs: dict[str, Any] = dict.fromkeys(paths)
    fixed: dict[str, Any] = {"example_inputs": example, "dynamic_batch": False}
    if operators == "onnx":
        export.float_onnx(qmodel, paths["fp32"], **fixed)
        export.onnx(qmodel, paths["int8"], runtime="tensorrt", **fixed)  # OpenVINO takes the same form
    else:
        programs["fp32"] = torch.export.export(model, (example,), strict=False)
        programs["int8"] = export.exported_program(qmodel, operators=operators, **fixed)
    return {name: (convert(programs[name], path), path.stat().st_size) for name, path in paths.items()}


def quantized(
    model: nn.Module, kind: str, runtime: str, batches: list[Tensor], **how: str
) -> tuple[nn.Module, nn.Module]:
    """The calibrated model, and the same with a quantizer behind its output, which XNNPACK wants.

    XNNPACK's transformers take dynamic ranges: only inputs of matrix products are quantized, their outputs
    are float. OpenVINO takes static symmetric ranges of everything.
    """
    dynamic, symmetric = kind == "transformer", RUNTIMES[runtime][3] == "onnx"
    activations = "int8-sym" if symmetric else "int8-batch" if dynamic else "int8"
    config = quant.Config(weights="int8", activations=activations, embeddings=None, **how)
    qmodel = quant.prepare(model, batches[0][:1], config)
    quant.calibrate(qmodel, batches, show_progress=False)
    if dynamic or symmetric:
        return qmodel, qmodel
    whole = nn.Sequential(qmodel, quant.ActQuant("int8", observer="minmax", name="output"))
    return qmodel, quant.calibrate(whole, batches, show_progress=False)


def reference(qmodel: nn.Module, whole: nn.Module, x: Tensor) -> Tensor:
    """The integer reference, its output quantized where the runtime's is."""
    out = quant.integer_reference(qmodel)(x)
    return out if whole is qmodel else whole[1](out)


def nmse(got: Tensor, truth: Tensor) -> float:
    """Squared error over squared norm."""
    return float((got.double() - truth.double()).square().sum() / truth.double().square().sum())


@torch.no_grad()
def large(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Size, agreement and, by batch size, latency of the large model of a kind."""
    kind, runtime = args.kind, args.runtime
    model, inputs = zoo.large(kind, args.smoke)
    batches = [inputs(4) for _ in range(2)]
    qmodel, whole = quantized(model, kind, runtime, batches, observer="minmax", weight_observer="minmax")
    out: dict[str, Any] = {"latency": {}}
    for batch in args.batches:
        found, tests = both(model, whole, inputs(batch), runtime, folder), [inputs(batch) for _ in range(4)]
        if not out["latency"]:
            outputs = {n: torch.cat([call(x).clone() for x in tests]) for n, (call, _) in found.items()}
            truth = torch.cat([model(x) for x in tests])
            integers = torch.cat([reference(qmodel, whole, x) for x in tests])
            out |= {
                "fp32_mb": found["fp32"][1] / 1e6, "int8_mb": found["int8"][1] / 1e6,
                "nmse_runtime_fp32": nmse(outputs["fp32"], truth), "nmse_fp32": nmse(outputs["int8"], truth),
                "nmse_reference": nmse(outputs["int8"], integers),
            }  # fmt: skip
        calls = {n: lambda c=call, x=tests[0]: c(x) for n, (call, _) in found.items()}
        turns = interleave(calls, seconds=args.seconds, min_rounds=5)
        times, cold = summarize(turns, "fp32"), summarize(turns, "fp32", first=True)
        out["latency"][batch] = {
            "fp32_ms": times["fp32"].median_ms, "int8_ms": times["int8"].median_ms,
            "int8_low_ms": times["int8"].low_ms, "int8_high_ms": times["int8"].high_ms,
            "faster": times["int8"].ratio, "faster_low": times["int8"].ratio_low,
            "faster_high": times["int8"].ratio_high, "cold": cold["int8"].ratio,
            "rounds": times["int8"].rounds,
        }  # fmt: skip
    return out


def digits(kind: str, runtime: str, smoke: bool, folder: Path) -> dict[str, float]:
    """Accuracy of a small model of the kind, in per cent, and how often the reference chooses the same."""
    model, calibration, images, labels = zoo.trained(kind, 0, smoke)
    qmodel, whole = quantized(model, kind, runtime, calibration)
    with torch.no_grad():
        call = both(model, whole, images[:1], runtime, folder)["int8"][0]
        theirs = torch.cat([call(x[None]).clone() for x in images]).argmax(-1)
        ours, plain = reference(qmodel, whole, images).argmax(-1), model(images).argmax(-1)
    share = {"fp32": plain == labels, "int8": theirs == labels, "reference": ours == labels}
    share["same_choice"] = theirs == ours
    return {name: 100 * float(right.double().mean()) for name, right in share.items()}


def main() -> None:
    """Convert, run and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("kind", choices=zoo.KINDS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--no-digits", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of packages that are not ours; what goes wrong raises
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # ExecuTorch's pool of threads asks nobody
    result: dict[str, Any] = {"runtime": args.runtime, "kind": args.kind}
    result["version"] = version(RUNTIMES[args.runtime][2])
    with tempfile.TemporaryDirectory() as folder:
        result |= large(args, Path(folder))
        if not args.no_digits:
            try:
                result["digits"] = digits(args.kind, args.runtime, args.smoke, Path(folder))
            except Exception as error:  # converters raise anything; the large model's figures stand
                result["digits"] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    args.out.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
