"""The kernels for CUDA tensors, in Triton: byte for byte what `gradq.codecs.uniform.reference` writes.

Everything is enqueued on the current stream of the tensors' device: no synchronization with the host and,
once compiled, no allocation. See `gradq.kernels.triton_tools` for what makes results equal. Exact casts are
torch's: a NaN in bf16 or fp16 may have other bits than on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradq.codecs.uniform import reference
from gradq.codecs.uniform.cuda import uniform_decode, uniform_decode_mean, uniform_encode
from gradq.kernels.triton_tools import check, check_rows, jit, launch, quotient

__all__ = [
    "exact_decode",
    "exact_decode_mean",
    "exact_encode",
    "uniform_decode",
    "uniform_decode_mean",
    "uniform_encode",
    "warm_up",
]

_ELEMENTS = 1024  # of a program

exact_encode = reference.exact_encode  # torch's casts run at the speed of memory
exact_decode = reference.exact_decode


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


def exact_decode_mean(payloads: Tensor, out: Tensor, *, wire_dtype: torch.dtype) -> None:
    """Mean over the W rows of payloads in one pass, added in row order in out's dtype, divided once.

    torch would multiply by 1 / W on a GPU, which is another number than the quotient.
    """
    if (n := out.numel()) == 0:
        return
    check(out, out.dtype, n, out.device)
    nbytes = n * wire_dtype.itemsize
    num_rows, stride = check_rows(payloads, nbytes, out.device)
    if stride % wire_dtype.itemsize:  # not so in a message
        payloads = payloads[:, :nbytes].contiguous()
        stride = nbytes
    numbers = payloads[0, :nbytes].view(wire_dtype)
    how: dict[str, Any] = {"ELEMENTS": _ELEMENTS, "DOUBLE": out.dtype == torch.float64}
    programs = triton.cdiv(n, _ELEMENTS)
    launch(_exact_mean, programs, out, numbers, out, n, num_rows, stride // wire_dtype.itemsize, **how)


def warm_up() -> None:
    """Nothing to compile without tensors: `Codec.warm_up` compiles what a codec needs."""
