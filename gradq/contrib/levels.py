"""The arithmetic of the table codecs, in plain torch.

Shapes: n elements in blocks of B; the last block holds L <= B and is padded to P, a multiple of 8. N blocks
of one length are worked on together.

One segment on the wire: a scale for each block (bf16, or one byte), then the codes of block after block in
planes (`reference_tools.pack`). A code is the index of a level, and stands for level * scale.

With y = x / absmax, top the largest level, and sums over the L elements from the first to the last::

    absmax   scale = absmax / top
    l1       scale = absmax * Σ|y| / L
    l2       scale = absmax * √Σy²
    mse      for every m in MULTIPLIERS: codes c of y * (top / m), to the nearest; the m with the greatest
             ⟨c, y⟩² / ‖c‖² wins, and scale = absmax * ⟨c, y⟩ / ‖c‖²

absmax and l2 scales are rounded up (nothing is clipped), l1 and mse to the nearest. A scale below 2**-126
(e6m2: below 2**-47) is sent as 0 and decodes to zeros. A block with NaN or Inf, or whose scale or top * scale
is out of range, is sent as NaN and its residual stays as it was. Both send the code of the smallest level.

Otherwise q = x * (1 / scale). Nearest: the number of midpoints between levels that are <= q. Stochastic: the
level k below q, or the next if (q - level k) * (1 / gap) > u, u the 16-bit dither of `uniform` plus half a
step. One byte holds e8m0 (exponent + 127) or e6m2 (exponent + 48, two bits of mantissa); 255 is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gradq.kernels.reference_tools import dither, new_residual_of, pack, unpack, value_of
from gradq.rng import EncodeContext

__all__ = ["MULTIPLIERS", "Table", "decode", "encode"]

MULTIPLIERS = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25)  # of absmax, tried by the rule "mse"
_MIN_NORMAL = 2.0**-126
_SCALE_DTYPES = {"bf16": torch.int16, "e8m0": torch.uint8, "e6m2": torch.uint8}  # the integers on the wire
_NAN = {"bf16": 0x7FC0, "e8m0": 255, "e6m2": 255}


@dataclass(frozen=True)
class Table:
    """Levels and how a block is scaled to them.

    Attributes:
        levels: ascending, exact in fp32; the largest is the positive one a block's absmax is scaled to.
        num_bits: bits of a code, the index of a level.
        block_size: number of elements that share a scale, a multiple of 8.
        scale_format: "bf16", "e8m0" (a power of two) or "e6m2".
        rule: "absmax", "l1", "l2" or "mse".
        stochastic: round to one of the two neighbours at random, or to the nearest.
    """

    levels: tuple[float, ...]
    num_bits: int
    block_size: int
    scale_format: str
    rule: str
    stochastic: bool

    def scale_bytes(self, numel: int) -> int:
        """Bytes of the scales, after which the codes start."""
        return -(-numel // self.block_size) * _SCALE_DTYPES[self.scale_format].itemsize

    def nbytes(self, numel: int) -> int:
        """Scales, then codes; the last block is padded to a multiple of 8 elements."""
        return self.scale_bytes(numel) + -(-numel // 8) * self.num_bits

    def places(self, numel: int) -> Iterator[tuple[slice, int, int, slice, slice]]:
        """The whole blocks together, then the last: (elements, first block, N, bytes of scales, of codes)."""
        size = _SCALE_DTYPES[self.scale_format].itemsize
        start = self.scale_bytes(numel)
        full = numel // self.block_size
        for first, count, length in ((0, full, self.block_size), (full, 1, numel % self.block_size)):
            if count and length:
                elements = slice(first * self.block_size, first * self.block_size + count * length)
                end = start + count * -(-length // 8) * self.num_bits
                yield elements, first, count, slice(first * size, (first + count) * size), slice(start, end)
                start = end


def encode(
    x: Tensor,
    payload: Tensor,
    table: Table,
    context: EncodeContext,
    residual: Tensor | None = None,
    new_residual: Tensor | None = None,
) -> None:
    """Encode x + loss_scale * residual, see `Codec.encode`; the module docstring has the format."""
    value = value_of(x, residual, context.loss_scale)
    decoded, kept = torch.empty_like(value), torch.zeros(x.numel(), dtype=torch.bool)
    levels = torch.tensor(table.levels)
    for elements, first, count, scales, codes in table.places(x.numel()):
        value_NL = value[elements].view(count, -1)
        bits_N, codes_NL = _encode_blocks(value_NL, table, context, first)
        scale_N1 = _scale_values(bits_N, table.scale_format)[:, None]
        length = value_NL.shape[1]
        codes_NP = torch.nn.functional.pad(codes_NL, (0, -length % 8), value=_smallest(levels))
        payload[scales] = bits_N.to(_SCALE_DTYPES[table.scale_format]).view(torch.uint8)
        payload[codes] = pack(codes_NP.to(torch.int32), table.num_bits).flatten()
        decoded[elements] = (levels[codes_NL] * scale_N1).flatten()
        kept[elements] = scale_N1.isnan().expand(-1, length).flatten()
    if new_residual is not None:
        new_residual.copy_(new_residual_of(value, decoded, residual, kept, context.loss_scale))


def decode(payload: Tensor, out: Tensor, table: Table) -> None:
    """Decode one segment into out; a code that stands for no level decodes to NaN."""
    levels = torch.full((1 << table.num_bits,), torch.nan)
    levels[: len(table.levels)] = torch.tensor(table.levels)
    dtype = _SCALE_DTYPES[table.scale_format]
    for elements, _, count, scales, codes in table.places(out.numel()):
        scale_N1 = _scale_values(payload[scales].clone().view(dtype), table.scale_format)[:, None]
        codes_NP = unpack(payload[codes].view(count, -1), table.num_bits)
        decoded_NP = levels[codes_NP.long()] * scale_N1
        decoded_NP = torch.where(decoded_NP.isnan(), torch.nan, decoded_NP)
        out[elements] = decoded_NP[:, : (elements.stop - elements.start) // count].flatten()


def _smallest(levels: Tensor) -> int:
    """The index of the smallest level."""
    return int(levels.abs().argmin())


def _encode_blocks(
    value_NL: Tensor, table: Table, context: EncodeContext, first: int
) -> tuple[Tensor, Tensor]:
    """Bits of the scales [N] and codes [N, L], int64."""
    levels64 = torch.tensor(table.levels, dtype=torch.float64)
    levels, gaps = levels64.float(), (1 / levels64.diff()).float()
    middles = ((levels64[1:] + levels64[:-1]) / 2).float()
    absmax_N = value_NL.view(torch.int32).bitwise_and(0x7FFFFFFF).amax(1).view(torch.float32)
    scale_N, chosen_NL = _rule(value_NL, absmax_N, table, levels, middles)
    scale_N = torch.where(absmax_N < _MIN_NORMAL, 0.0, scale_N)
    scale_N = torch.where(absmax_N.isfinite(), scale_N, torch.nan)
    bits_N = _scale_bits(scale_N, table.scale_format, table.rule in ("absmax", "l2"))
    scale_N = _scale_values(bits_N, table.scale_format)
    bits_N = torch.where((scale_N * levels[-1]).isfinite(), bits_N, _NAN[table.scale_format])
    coded_N1 = (_scale_values(bits_N, table.scale_format) > 0)[:, None]
    if chosen_NL is None:
        q_NL = value_NL * (1 / scale_N)[:, None]
        if table.stochastic:
            length = value_NL.shape[1]
            low_NL = (torch.searchsorted(levels, q_NL, right=True) - 1).clamp(0, len(levels) - 2)
            blocks = torch.arange(len(value_NL)) + context.first_block + first
            u_NP = dither(context.key, blocks, context.shift, -(-length // 8) * 8) * 2.0**-16 + 2.0**-17
            above_NL = (q_NL - levels[low_NL]) * gaps[low_NL]
            chosen_NL = low_NL + (above_NL > u_NP[:, :length])
        else:
            chosen_NL = torch.searchsorted(middles, q_NL, right=True)
    return bits_N, torch.where(coded_N1, chosen_NL, _smallest(levels))


def _rule(
    value_NL: Tensor, absmax_N: Tensor, table: Table, levels: Tensor, middles: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The scales before rounding, of no meaning for tiny or non-finite blocks; and codes the rule chose."""
    if table.rule == "absmax":
        return absmax_N / levels[-1], None
    y_NL = value_NL * (1 / absmax_N)[:, None]
    if table.rule == "l1":
        return absmax_N * (_total(y_NL.abs()) / y_NL.shape[1]), None
    if table.rule == "l2":
        return absmax_N * _total(
            y_NL * y_NL
        ).double().sqrt().float(), None  # torch's fp32 root may be off an ulp
    best_N, factor_N = torch.full_like(absmax_N, -1.0), torch.zeros_like(absmax_N)
    chosen_NL = torch.zeros_like(y_NL, dtype=torch.int64)
    for multiplier in MULTIPLIERS:
        codes_NL = torch.searchsorted(middles, y_NL * (levels[-1] / multiplier), right=True)
        c_NL = levels[codes_NL]
        inner_N, norm_N = _total(torch.stack((c_NL * y_NL, c_NL * c_NL)))
        ratio_N = torch.where(norm_N > 0, inner_N / norm_N, 0.0)
        better_N = inner_N * ratio_N > best_N
        best_N = torch.where(better_N, inner_N * ratio_N, best_N)
        factor_N = torch.where(better_N, ratio_N, factor_N)
        chosen_NL = torch.where(better_N[:, None], codes_NL, chosen_NL)
    return absmax_N * factor_N, chosen_NL


def _total(terms: Tensor) -> Tensor:
    """Sums over the last dimension, from the first to the last, in fp32."""
    total = torch.zeros(terms.shape[:-1])
    for term in terms.movedim(-1, 0).contiguous():
        total = total + term
    return total


def _scale_bits(scale_N: Tensor, scale_format: str, up: bool) -> Tensor:
    """Non-negative fp32 scales in their format on the wire, int64."""
    bits_N = scale_N.view(torch.int32).long()
    if scale_format == "bf16":
        wire_N = (bits_N + (0xFFFF if up else 0x8000)) >> 16
        wire_N = torch.where(wire_N >= 0x7F80, _NAN[scale_format], wire_N)
        least = 0
    else:
        mantissa, bias = (0, 0) if scale_format == "e8m0" else (2, 79)
        drop, least = 23 - mantissa, 1 << mantissa
        wire_N = (((bits_N + (1 << drop) - 1) >> drop) - (bias << mantissa)).clamp(max=255)
    wire_N = torch.where((scale_N < _MIN_NORMAL) | (wire_N < least), 0, wire_N)
    return torch.where(scale_N.isfinite(), wire_N, _NAN[scale_format])


def _scale_values(bits_N: Tensor, scale_format: str) -> Tensor:
    """The fp32 numbers that `_scale_bits` wrote."""
    bits_N = bits_N.to(torch.int32)
    if scale_format == "bf16":
        return (bits_N << 16).view(torch.float32)
    raw_N = bits_N << 23 if scale_format == "e8m0" else (bits_N + (79 << 2)) << 21
    raw_N = torch.where(bits_N == 0, 0, raw_N)
    return torch.where(bits_N == 255, torch.nan, raw_N.view(torch.float32))
