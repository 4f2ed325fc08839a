"""The peers of benchmarks/int8.py: onnxruntime.quantization, and torchao PT2E in its own environment."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt

HERE = Path(__file__).parent


def onnxruntime_files(
    kind: str,
    fp32: Path,
    calibration: list[dict[str, npt.NDArray[Any]]],
    folder: Path,
    target: str,
    *,
    linear: bool,
    static: bool = True,
) -> dict[str, Path]:
    """What onnxruntime.quantization makes of the fp32 file: name → file.

    Static: QDQ, u8 activations, s8 weights per channel, after its own preprocessing. Dynamic where it
    applies. Without VNNI weights have 7 bits (``reduce_range``), as its documentation advises.

    Args:
        kind: begins the files' names.
        fp32: the float file.
        calibration: inputs by name.
        folder: for the files.
        target: of `gradq.quant.detect_target`.
        linear: quantize matrix products and lookups only, and make a dynamic file, too: for transformers.
        static: make a static file.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    logging.getLogger().setLevel(logging.ERROR)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[dict[str, Any]] = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    ready = folder / f"{kind}-ready.onnx"
    quant_pre_process(str(fp32), str(ready), skip_symbolic_shape=True)
    reduce = target == "x86-avx2"
    files = {}
    if static:
        files["onnxruntime static"] = folder / f"{kind}-ort-static.onnx"
        operators = ["MatMul", "Gemm", "Gather"] if linear and kind != "mlp" else None
        quantize_static(
            str(ready), str(files["onnxruntime static"]), Reader(), quant_format=QuantFormat.QDQ,
            per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            reduce_range=reduce, op_types_to_quantize=operators,
        )  # fmt: skip
    if linear:
        files["onnxruntime dynamic"] = folder / f"{kind}-ort-dynamic.onnx"
        quantize_dynamic(
            str(ready), str(files["onnxruntime dynamic"]), per_channel=True, weight_type=QuantType.QInt8,
            reduce_range=reduce,
        )  # fmt: skip
    return files


def torchao_files(kind: str, python: str, folder: Path, smoke: bool, target: str) -> dict[str, Path]:
    """What torchao PT2E makes of the same model, in another interpreter; nothing where it fails."""
    path = folder / f"{kind}-torchao.onnx"
    command = [python, str(HERE / "int8_torchao.py"), kind, str(path), *(["--smoke"] if smoke else [])]
    command += ["--reduce-range"] if target == "x86-avx2" else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not path.exists():
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"torchao PT2E on {kind} failed: {last}", file=sys.stderr)
        return {}
    return {"torchao PT2E": path}
