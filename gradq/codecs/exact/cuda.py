"""The exact codecs on CUDA tensors: torch's casts, and the mean in Triton.

A NaN in bf16 or fp16 may have other bits than on the CPU. See `gradq.kernels.triton_tools` for what makes
results equal.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradq.codecs.exact import reference
from gradq.codecs.exact.format import ExactFormat
from gradq.kernels.triton_tools import check, check_rows, jit, launch, quotient

__all__ = ["decode", "decode_mean", "encode"]

_ELEMENTS = 1024  # elements of a program

encode, decode = reference.encode, reference.decode  # torch's casts run at the speed of memory


@jit
def _exact_mean(
    payloads: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    num_rows: tl.tensor,
    stride: tl.tensor,
    ELEMENTS: tl.constexpr,
    DOUBLE: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = at < n
    # -0, of which Triton has no constant: -0 + v is v, for every v
    total = tl.full([ELEMENTS], -1.0, tl.float64 if DOUBLE else tl.float32) * 0.0
    for _ in range(num_rows):
        total = total + tl.load(payloads + at, mask=inside, other=0.0).to(total.dtype)
        payloads = payloads + stride.to(tl.int64)
    divisor = tl.full([ELEMENTS], 1.0, total.dtype) * num_rows.to(total.dtype)
    mean = total / divisor if DOUBLE else quotient(total, divisor)
    tl.store(out + at, mean, mask=inside)


def decode_mean(payloads: Tensor, out: Tensor, form: ExactFormat) -> None:
    """Mean over the W rows of payloads in one pass, added in row order in out's dtype, divided once.

    torch would multiply by 1 / W on a GPU, which is another number than the quotient.
    """
    if (n := out.numel()) == 0:
        return
    check(out, out.dtype, n, out.device)
    nbytes, size = form.nbytes(n), form.wire_dtype.itemsize
    num_rows, stride = check_rows(payloads, nbytes, out.device)
    if stride % size:  # not so in a message
        payloads = payloads[:, :nbytes].contiguous()
        stride = nbytes
    numbers = payloads[0, :nbytes].view(form.wire_dtype)
    how: dict[str, Any] = {"ELEMENTS": _ELEMENTS, "DOUBLE": out.dtype == torch.float64}
    launch(_exact_mean, triton.cdiv(n, _ELEMENTS), out, numbers, out, n, num_rows, stride // size, **how)
