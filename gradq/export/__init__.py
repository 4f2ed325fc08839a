"""From a calibrated model to files that INT8 runtimes load: `onnx`, checked by `verify`, packed by `bundle`.

Example:
    >>> import gradq.export
    >>> gradq.export.onnx(qmodel, "model.onnx")  # doctest: +SKIP
    >>> print(gradq.export.verify("model.onnx", qmodel, loader))  # doctest: +SKIP
"""

from gradq.export.bundles import Bundle, bundle, load, verify_bundle
from gradq.export.inspect import Operators, operators
from gradq.export.pt2 import Pt2Report, exported_program, pt2
from gradq.export.report import VerifyReport
from gradq.export.runtime import features, session
from gradq.export.variants import variant
from gradq.export.verification import verify
from gradq.export.write import ExportReport, float_onnx, onnx

__all__ = [
    "Bundle",
    "ExportReport",
    "Operators",
    "Pt2Report",
    "VerifyReport",
    "bundle",
    "exported_program",
    "features",
    "float_onnx",
    "load",
    "onnx",
    "operators",
    "pt2",
    "session",
    "variant",
    "verify",
    "verify_bundle",
]
