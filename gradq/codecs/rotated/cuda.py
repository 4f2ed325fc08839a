"""The rotated codecs in Triton: byte for byte what `gradq.codecs.rotated.reference` writes.

A program takes one tile of 256 rows of 16 columns; this module has those of 256 rows, `cuda_tail` a
last one of fewer. With row 16 h + l, a tile is sixteen tensors [256] in one of two forms: one for each l, of
the elements [h, column]; or one for each h, of [l, column]. In the first the low stages of the transform
(distances 1, 2, 4, 8) are sums of whole tensors, in the second the high ones (16, 32, 64, 128) and the
packing of codes. `swap` goes from one form to the other, through shared memory; nothing else does.

Trellis codes have no CUDA kernel: their search is one long chain of decisions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradq.codecs.rotated.cuda_decode import FULL, SHORT_LAST, TAIL, decode_program
from gradq.codecs.rotated.cuda_encode import encode_program
from gradq.codecs.rotated.cuda_rotation import constants
from gradq.codecs.rotated.cuda_tail import window
from gradq.codecs.rotated.format import COLUMNS, TILE, RotatedFormat, rotation_base
from gradq.errors import KernelError
from gradq.kernels.triton_tools import aligned, check, check_rows, launch, signed32
from gradq.rng import EncodeContext

__all__ = ["decode", "decode_mean", "encode"]

_NUM_WARPS = 8  # a thread holds one element of [256], and has `swap` move the data once
# registers of a thread: of one that encodes, by whether it writes a residual, and of one that decodes, by
# whether there is only one payload; a last tile would take more, and give full ones fewer threads
_ENCODE_REGISTERS = {False: 48, True: 64}
_DECODE_REGISTERS = {False: 64, True: 32}


def encode(
    x: Tensor,
    payload: Tensor,
    form: RotatedFormat,
    context: EncodeContext,
    residual: Tensor | None = None,
    new_residual: Tensor | None = None,
) -> None:
    """Encode x + loss_scale * residual in one pass; the format is the reference's.

    Raises:
        KernelError: the format has a trellis, or see `triton_tools.check`.
    """
    assert new_residual is None or residual is not None
    _refuse(form)
    if (n := x.numel()) == 0:
        return
    device, scale = x.device, float(context.loss_scale)
    check(x, torch.float32, n, device)
    check(payload, torch.uint8, form.nbytes(n), device)
    old = x if residual is None else check(residual, torch.float32, n, device)
    new = x if new_residual is None else check(new_residual, torch.float32, n, device)
    how: dict[str, Any] = {
        "BITS": form.num_bits,
        "LEVELS": constants(form.num_bits),
        "UNBIASED": form.unbiased,
        "READ": residual is not None,
        "WRITE": new_residual is not None,
        "ALIGNED": aligned(x, old, new) and _codes_aligned(payload, 0, n, form),
        "LAST": _last(n),
    }
    registers = _ENCODE_REGISTERS[new_residual is not None]
    args = (x, old, new, payload, signed32(rotation_base(context)), form.codes_at(n), scale, 1.0 / scale)
    launch(
        encode_program, -(-n // TILE), x, *args, n % TILE, *window(n),
        num_warps=_NUM_WARPS, maxnreg=registers, **how,
    )  # fmt: skip


def decode(payload: Tensor, out: Tensor, form: RotatedFormat) -> None:
    """Decode one segment into out; see `encode`."""
    decode_mean(payload[None], out, form)


def decode_mean(payloads: Tensor, out: Tensor, form: RotatedFormat) -> None:
    """Mean over the W rows of payloads, added in row order in fp32, divided once; see `encode`."""
    _refuse(form)
    if (n := out.numel()) == 0:
        return
    check(out, torch.float32, n, out.device)
    num_rows, stride = check_rows(payloads, form.nbytes(n), out.device)
    how: dict[str, Any] = {
        "BITS": form.num_bits,
        "LEVELS": constants(form.num_bits),
        "EXACT_RECIPROCAL": num_rows & (num_rows - 1) == 0,
        "SINGLE": num_rows == 1,
        "ALIGNED": aligned(out) and _codes_aligned(payloads, stride, n, form),
        "LAST": _last(n),
    }
    registers = _DECODE_REGISTERS[num_rows == 1]
    args = (payloads, out, form.codes_at(n), num_rows, stride, 1.0 / num_rows)
    launch(
        decode_program, -(-n // TILE), out, *args, n % TILE, *window(n),
        num_warps=_NUM_WARPS, maxnreg=registers, **how,
    )  # fmt: skip


def _last(n: int) -> int:
    """What the last tile is."""
    if n % TILE == 0:
        return int(FULL.value)
    return int((SHORT_LAST if n % TILE > TILE - COLUMNS else TAIL).value)


def _codes_aligned(payload: Tensor, stride: int, n: int, form: RotatedFormat) -> bool:
    """Whether the codes of every row start at a multiple of 4."""
    return (payload.data_ptr() + form.codes_at(n)) % 4 == 0 and stride % 4 == 0


def _refuse(form: RotatedFormat) -> None:
    if form.trellis:
        raise KernelError(
            "gradq has no CUDA kernels for a trellis (levels=trellis, the default of rot1 and rot2): use "
            f"'rot{form.num_bits}(levels=scalar)' on CUDA tensors instead"
        )
