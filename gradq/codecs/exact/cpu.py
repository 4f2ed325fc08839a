"""The exact codecs in Numba: casts are torch's, which run at the speed of memory; the mean is one pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradq.codecs.exact import reference
from gradq.codecs.exact.format import ExactFormat
from gradq.kernels.numba_blocks import STREAM_FROM, write_mean
from gradq.kernels.numba_compile import inline, jit
from gradq.kernels.numba_tools import address, as_float, f32_at, fence, row_addresses, scratch, u16_at

__all__ = ["decode", "decode_mean", "encode"]

_TILE = 1024  # number of elements whose sums stay in the L1 cache

encode, decode = reference.encode, reference.decode


@inline
def _add_exact_row(row_at: Any, is_bf16: Any, sum_at: Any, first: Any, L: Any) -> None:
    row, half, total = f32_at(row_at, L), u16_at(row_at, L), f32_at(sum_at, L)
    if is_bf16 and first:
        for j in range(L):
            total[j] = as_float(np.uint32(half[j]) << np.uint32(16))
    elif is_bf16:
        for j in range(L):
            total[j] += as_float(np.uint32(half[j]) << np.uint32(16))
    elif first:
        for j in range(L):
            total[j] = row[j]
    else:
        for j in range(L):
            total[j] += row[j]


@jit
def _exact_mean(rows_at: int, rows: Any, out_at: int, n: int, is_bf16: bool) -> None:
    num_rows, row_stride = rows
    sum_at = scratch(4 * _TILE)
    stream = out_at % 32 == 0 and n >= STREAM_FROM
    for start in range(0, n, _TILE):
        L = min(_TILE, n - start)
        for row in range(num_rows):
            row_at = rows_at + row * row_stride + (2 if is_bf16 else 4) * start
            _add_exact_row(row_at, is_bf16, sum_at, row == 0, L)
        write_mean(sum_at, out_at + 4 * start, num_rows, L, stream)
    if stream:
        fence()


def decode_mean(payloads: Tensor, out: Tensor, form: ExactFormat) -> None:
    """Mean over the W rows of payloads in one pass, added in row order in out's dtype, divided once."""
    dtype = form.wire_dtype
    if out.dtype == torch.float32 and dtype in (torch.float32, torch.bfloat16):
        n = out.numel()
        rows_at, rows = row_addresses(payloads, n * dtype.itemsize)
        _exact_mean(rows_at, rows, address(out, torch.float32, n), n, dtype == torch.bfloat16)
    else:
        reference.decode_mean(payloads, out, form)
