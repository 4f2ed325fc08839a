"""From a calibrated model to files that INT8 runtimes load: `onnx`, checked by `verify`, packed by `bundle`.

Example:
    >>> import gradq.export
    >>> gradq.export.onnx(qmodel, "model.onnx")  # doctest: +SKIP
    >>> print(gradq.export.verify("model.onnx", qmodel, loader))  # doctest: +SKIP
"""

from gradq.export.inspect import operators
from gradq.export.runtime import session
from gradq.export.verify import VerifyReport, verify
from gradq.export.write import ExportReport, float_onnx, onnx

__all__ = ["ExportReport", "VerifyReport", "float_onnx", "onnx", "operators", "session", "verify"]
