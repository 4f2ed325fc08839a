"""ONNX Runtime sessions with the options an exported model needs on this processor."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gradq.errors import ConfigError, ExportError
from gradq.export.files import require
from gradq.quant.config import detect_target

__all__ = ["DTYPES", "features", "feed", "metadata_of", "overflows", "session"]

# ONNX Runtime's name of a type → NumPy's
DTYPES = {
    "tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16",
    "tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(uint8)": "uint8", "tensor(bool)": "bool",
}  # fmt: skip
_PRECISE = "session.x64quantprecision"


def features() -> str:
    """The processor's integer instructions: ``x86-vnni``, ``x86-avx2``, ``arm``, or ``other``."""
    try:
        cpuinfo = Path("/proc/cpuinfo")
        return detect_target(cpuinfo.read_text() if cpuinfo.exists() else None)
    except ConfigError:
        return "other"


def metadata_of(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of an ONNX file, without loading its weights into a session.

    Raises:
        ExportError: no such file, or not ONNX.
    """
    require("onnx")
    import onnx

    try:
        proto = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # OSError, or protobuf's DecodeError, which is typed nowhere
        raise ExportError(
            f"cannot read {path}: it is no ONNX file, or cut off ({error}); export it again"
        ) from error
    if not proto.graph.node and not proto.graph.output:
        raise ExportError(f"cannot read {path}: it is empty or no ONNX file; export it again")
    return {p.key: p.value for p in proto.metadata_props}


def session(
    path: str | os.PathLike[str],
    *,
    threads: int = 1,
    precise: bool | None = None,
    optimized: str | os.PathLike[str] | None = None,
    profile: str | os.PathLike[str] | None = None,
) -> Any:
    """An ``onnxruntime.InferenceSession`` for an exported model.

    All optimizations are on (without them INT8 is slower than fp32). On x86 without VNNI, products of u8
    activations and full 8-bit weights overflow 16 bits in ONNX Runtime's fast kernel: wrong results, in
    silence. Such files get its slower, correct kernel here; export with
    ``Config.for_target("x86-avx2")`` (7-bit weights) to keep the fast one. Files with fp8 activations run
    unoptimized: ONNX Runtime 1.32's optimizer computes them wrong, or refuses them.

    Args:
        path: the file.
        threads: threads inside an operator.
        precise: the slower, correct kernel; None chooses by processor and file.
        optimized: path to write the optimized graph to.
        profile: beginning of the name of the file that ``end_profiling()`` of the session writes.

    Raises:
        ExportError: ONNX Runtime cannot load the file; its reason is in the message.
    """
    require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    if not Path(path).is_file():
        raise ExportError(f"{path} {'is no file' if Path(path).exists() else 'does not exist'}")
    if "fp8" in metadata_of(path).get("gradq.activations", ""):  # its rewriting takes e4m3 for uint8
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if precise is None:
        precise = features() == "x86-avx2" and overflows(path)
    if precise:
        options.add_session_config_entry(_PRECISE, "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class but Exception
        raise ExportError(f"ONNX Runtime cannot load {path}: {error}") from error


def feed(running: Any, inputs: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a session by name, checked.

    Args:
        running: a session from `session`.
        inputs: arrays or tensors by name, or in the order of the file's inputs.

    Raises:
        ConfigError: a wrong number, type or shape; the message names the input and what it takes.
    """
    wanted = running.get_inputs()
    if isinstance(inputs, Mapping):
        missing = [i.name for i in wanted if i.name not in inputs]
        if missing:
            raise ConfigError(f"input {missing[0]} is missing; the model takes {[i.name for i in wanted]}")
        inputs = [inputs[i.name] for i in wanted]
    if len(inputs) != len(wanted):
        raise ConfigError(f"the model takes {[i.name for i in wanted]}; got {len(inputs)} inputs")
    out = {}
    for spec, value in zip(wanted, inputs, strict=True):
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        kind = DTYPES.get(spec.type, spec.type)
        fits = len(array.shape) == len(spec.shape) and all(
            not isinstance(want, int) or want == got
            for want, got in zip(spec.shape, array.shape, strict=True)
        )
        if not fits or str(array.dtype) != kind:
            raise ConfigError(
                f"input {spec.name} is {array.dtype} {list(array.shape)}; the model takes {kind} {spec.shape}"
            )
        out[spec.name] = array
    return out


def overflows(path: str | os.PathLike[str]) -> bool:
    """True if products of a file's weights overflow 16 bits on x86 without VNNI: weights of more than 7 bits.

    Raises:
        ExportError: the file's metadata is damaged.
    """
    found = metadata_of(path).get("gradq.largest_weight_code", "0")
    if not found.isdecimal():
        raise ExportError(f"{path}: its metadata gradq.largest_weight_code is {found!r}; export it again")
    return int(found) > 64
