"""The truth of the exact codecs: torch's casts, which round to nearest even where the wire is narrower."""

from __future__ import annotations

from torch import Tensor

from gradq.codecs.exact.format import ExactFormat
from gradq.kernels.reference_tools import mean_of_rows
from gradq.rng import EncodeContext

__all__ = ["decode", "decode_mean", "encode"]


def encode(
    x: Tensor,
    payload: Tensor,
    form: ExactFormat,
    _context: EncodeContext,
    _residual: Tensor | None = None,
    _new_residual: Tensor | None = None,
) -> None:
    """Write x to the payload; nothing is random, and nothing is fed back."""
    payload.view(form.wire_dtype).copy_(x)


def decode(payload: Tensor, out: Tensor, form: ExactFormat) -> None:
    """Read a payload into out."""
    out.copy_(payload.view(form.wire_dtype))


def decode_mean(payloads: Tensor, out: Tensor, form: ExactFormat) -> None:
    """Mean over the W rows of payloads, added in row order in out's dtype, divided once."""
    mean_of_rows(lambda payload, to: decode(payload, to, form), payloads, out)
