"""What stands behind the opaque nodes between `gradq.export.capture` and `gradq.export.lower`.

Shapes: O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gradq.export.subpixel import Subpixel
from gradq.quant.fake import ActQuant, WeightQuant

__all__ = ["DOMAIN", "MICROSOFT", "Layer", "Quantizer"]

DOMAIN = "gradq"  # of the opaque nodes
MICROSOFT = "com.microsoft"  # of ONNX Runtime's own operators


@dataclass(frozen=True)
class Quantizer:
    """An activation quantizer in the graph.

    Attributes:
        name: the tensor's name.
        quantizer: the module, with its range.
    """

    name: str
    quantizer: ActQuant


@dataclass(frozen=True)
class Layer:
    """A layer with a quantized weight in the graph.

    Attributes:
        name: qualified name of the weight.
        kind: ``linear``, ``conv`` or ``embedding``.
        weight: (O, …) fp32.
        quantizer: the weight's quantizer.
        bias: (O,) fp32, or None.
        rows: the rows of the weight that this node computes; None for all.
        geometry: strides, pads, dilations and group of a convolution.
        subpixel: the phases of a transposed convolution; `geometry` is then that of the convolution of its
            phases.
    """

    name: str
    kind: str
    weight: Tensor
    quantizer: WeightQuant
    bias: Tensor | None
    rows: slice | None = None
    geometry: dict[str, Any] = field(default_factory=dict)
    subpixel: Subpixel | None = None
