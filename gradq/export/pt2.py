"""`gradq.export.pt2`: a calibrated model as a ``.pt2`` file that plain torch loads.

The file needs torch and nothing else: ``torch.export.load("model.pt2").module()(x)``.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from gradq.errors import ConfigError, ExportError
from gradq.export.capture import exportable, innermost, quietly
from gradq.export.files import atomic
from gradq.export.stored import store
from gradq.export.write import describe, facts_of
from gradq.quant.batches import unwrap
from gradq.quant.mixed import average_bits

__all__ = ["Pt2Report", "exported_program", "pt2"]

FACTS = "gradq.json"


@dataclass(frozen=True)
class Pt2Report:
    """What `pt2` wrote.

    Attributes:
        path: the file.
        size_bytes: size of the file in bytes.
        operators: kind of operators that the file is written in: ``aten``, ``int_mm`` or ``pt2e``.
        forms: layers by the form of their weights: ``int8``, ``int4``, ``table``, ``int_mm``.
        float_islands: (name, reason) of layers that multiply in float though ``int_mm`` was asked for.
        average_bits: number of bits that an element of a quantized weight takes on average.
        metadata: entries of ``gradq.json`` in the file.
    """

    path: Path
    size_bytes: int
    operators: str
    forms: dict[str, int]
    float_islands: list[tuple[str, str]]
    average_bits: float
    metadata: dict[str, str] = field(repr=False)

    def __str__(self) -> str:
        """The report as a few lines of text."""
        return describe(self.path, self.size_bytes, self.operators, self.forms, self.float_islands)


def exported_program(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    operators: str = "aten",
    dynamic_batch: bool = True,
    dynamic_axes: dict[str, dict[int, str]] | None = None,
) -> ExportedProgram:
    """A calibrated model as a `torch.export.ExportedProgram`, its weights integers.

    Args:
        model: from `gradq.quant.prepare` and `calibrate`, trained or not, possibly inside DDP; untouched.
        example_inputs: inputs to trace with, as for `gradq.export.onnx`.
        operators: ``aten`` computes in float exactly what the simulation computes; ``int_mm`` puts linear
            layers on ``torch._int_mm`` (checked on the CPU and on an H100); ``pt2e`` writes the
            ``quantized_decomposed`` operators that converters to ExecuTorch and LiteRT take.
        dynamic_batch: whether the first axis of every input stays free.
        dynamic_axes: further free axes: input name → axis → name of the axis.

    Raises:
        CalibrationError: a quantizer has no range; named.
        NonFiniteError: NaN or Inf in a weight; named.
        ExportError: torch.export cannot trace the model, or a format the operators do not have; named.
        ConfigError: arguments that do not fit the model.
    """
    return _program(model, example_inputs, operators, dynamic_batch, dynamic_axes)[0]


def pt2(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    operators: str = "aten",
    dynamic_batch: bool = True,
    dynamic_axes: dict[str, dict[int, str]] | None = None,
    accuracy: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Pt2Report:
    """Write a calibrated model as a ``.pt2`` file: portable, small, and exactly the simulation.

    The file is small (an 8-bit weight takes a byte, a 4-bit weight or an index into a table half a byte), but
    not fast by itself: with ``aten`` torch multiplies in float. Export ONNX for speed on a CPU. The file is
    written whole or not at all.

    Args:
        model: calibrated model, as for `exported_program`.
        path: the file to write; its name ends with ``.pt2``.
        example_inputs: inputs to trace with, as for `gradq.export.onnx`.
        operators: kind of operators, as for `exported_program`.
        dynamic_batch: whether the first axis of every input stays free.
        dynamic_axes: further free axes: input name → axis → name of the axis.
        accuracy: accuracy of the model, which the file keeps among its facts.
        metadata: further entries for ``gradq.json`` in the file.

    Returns:
        What was written.

    Raises:
        GradqError: the errors of `exported_program`; also ExportError for a path that cannot be written.
    """
    if Path(path).suffix != ".pt2":
        raise ConfigError(f"path is {str(path)!r}; torch.export's files end with .pt2")
    with atomic(path) as temporary:
        program, forms, islands = _program(model, example_inputs, operators, dynamic_batch, dynamic_axes)
        facts = facts_of(unwrap(model), islands, accuracy) | {"gradq.operators": operators}
        facts |= dict(metadata or {})
        try:
            with quietly():
                torch.export.save(program, temporary, extra_files={FACTS: json.dumps(facts)})
        except (OSError, RuntimeError) as error:
            raise ExportError(f"cannot write {path}: {innermost(error)}") from error
        size = temporary.stat().st_size
    return Pt2Report(
        path=Path(path),
        size_bytes=size,
        operators=operators,
        forms=dict(Counter(forms.values())),
        float_islands=islands,
        average_bits=average_bits(unwrap(model)),
        metadata=facts,
    )


def _program(
    model: nn.Module,
    example_inputs: Any,
    operators: str,
    dynamic_batch: bool,
    dynamic_axes: dict[str, dict[int, str]] | None,
) -> tuple[ExportedProgram, dict[str, str], list[tuple[str, str]]]:
    """The program, the forms of its weights, and the layers that compute in float, with reasons."""
    ready = exportable(model, example_inputs, dynamic_batch=dynamic_batch, dynamic_axes=dynamic_axes)
    forms, islands = store(ready.model, operators)
    try:
        with torch.no_grad(), quietly():
            program = torch.export.export(ready.model, ready.args, dynamic_shapes=ready.shapes, strict=False)
    except Exception as error:
        raise ExportError(
            f"torch.export cannot trace {type(model).__name__}: {innermost(error)}; if it fixes an axis that "
            "is to be free, pass dynamic_batch=False or rewrite that line"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it holds paths of this machine
    program.example_inputs = None  # they are the caller's data
    return program, forms, islands
