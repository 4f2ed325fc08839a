"""The exception tree. Every error gradq raises on purpose is a `GradqError`."""

from __future__ import annotations

__all__ = [
    "BenchError",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "ExportError",
    "GradqError",
    "KernelError",
    "MismatchError",
    "NonFiniteError",
    "PeerError",
    "QuantError",
    "SpecError",
    "TraceError",
    "UnsupportedError",
    "VerifyError",
    "WireError",
]


class GradqError(Exception):
    """Base of every error raised by gradq."""


class ConfigError(GradqError, ValueError):
    """An argument has a value that cannot work; the message names it and the legal range."""


class SpecError(ConfigError):
    """A codec or spec string could not be understood."""


class UnsupportedError(GradqError, TypeError):
    """A model, gradient or process group that gradq does not handle; the message says what does."""


class MismatchError(GradqError, RuntimeError):
    """Ranks disagree about configuration or model; the message names the rank and the field."""


class KernelError(GradqError, RuntimeError):
    """A kernel backend was asked for that is not available here."""


class WireError(GradqError, RuntimeError):
    """A received payload is not the one that was expected (version, step, bucket or size)."""


class PeerError(GradqError, RuntimeError):
    """An exchange with another rank failed: the peer died, stalled past the timeout, or the link broke."""


class CheckpointError(GradqError, RuntimeError):
    """A saved state does not fit this model or was not saved the way it is being loaded."""


class BenchError(GradqError, RuntimeError):
    """A benchmark could not run to its end: a rank, a node, a link or the disk failed; samples are kept."""


class QuantError(GradqError):
    """Base of the errors of `gradq.quant`: a model that cannot be prepared, calibrated or executed."""


class CalibrationError(QuantError, RuntimeError):
    """A quantizer is used before it has a range; the message names it and says how to calibrate."""


class NonFiniteError(QuantError, ValueError):
    """A tensor to be quantized holds NaN or Inf; the message names the tensor."""


class TraceError(QuantError, RuntimeError):
    """`torch.fx` cannot trace the model; the message names the line and the modules to place by hand."""


class ExportError(GradqError, RuntimeError):
    """A model cannot be exported or a file cannot be used; the message names the operator, node or path."""


class VerifyError(ExportError):
    """An exported file is wrong; the message lists what failed and `report` holds every figure.

    Args:
        message: what failed.
        report: the `gradq.export.VerifyReport`.
    """

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report
