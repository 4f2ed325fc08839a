"""The truth of the table codecs, in plain torch.

Shapes: n elements in blocks of B; the last block holds L <= B and is padded with zeros to P, a multiple of 8.

One segment on the wire: a scale for each block (bf16, or one byte), then the codes of block after block in
planes as in `gradq.codecs.uniform.reference`. A code is the index of a level, and stands for level * scale.

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

import torch
from torch import Tensor

from gradq.codecs.uniform import reference
from gradq.contrib.table.format import MULTIPLIERS, SCALE_BYTES, Table

__all__ = ["constants", "table_decode", "table_decode_mean", "table_encode"]

_MIN_NORMAL = 2.0**-126


def constants(table: Table) -> tuple[Tensor, Tensor, Tensor, int]:
    """Levels, midpoints, 1 / gaps, all fp32, and the index of the smallest level."""
    levels = torch.tensor(table.levels, dtype=torch.float64)
    middles = ((levels[1:] + levels[:-1]) / 2).float()
    gaps = (1 / (levels[1:] - levels[:-1])).float()
    return levels.float(), middles, gaps, int(levels.abs().argmin())


def _scale_bits(scale: Tensor, scale_format: str, up: bool) -> int:
    """A non-negative fp32 scale in its format on the wire."""
    bits = int(scale.view(torch.int32))
    if scale_format == "bf16":
        if not bool(torch.isfinite(scale)):
            return 0x7FC0
        wire = (bits + (0xFFFF if up else 0x8000)) >> 16
        return 0 if scale < _MIN_NORMAL else 0x7FC0 if wire >= 0x7F80 else wire
    mantissa, bias = (0, 0) if scale_format == "e8m0" else (2, 79)
    if not bool(torch.isfinite(scale)):
        return 255
    drop = 23 - mantissa
    wire = ((bits + (1 << drop) - 1) >> drop) - (bias << mantissa)
    if scale < _MIN_NORMAL or wire < 1 << mantissa:
        return 0
    return min(wire, 255)


def _scale_value(bits: int, scale_format: str) -> Tensor:
    """The fp32 number that `_scale_bits` wrote."""
    if scale_format == "bf16":
        raw = bits << 16
    elif bits == 255:
        raw = 0x7FC00000
    elif scale_format == "e8m0":
        raw = bits << 23
    else:
        raw = (bits + (79 << 2)) << 21 if bits else 0
    return torch.tensor(raw, dtype=torch.int32).view(torch.float32)


def _total(terms: Tensor) -> Tensor:
    """The sum from the first to the last, in fp32."""
    total = torch.tensor(0.0)
    for term in terms.unbind():
        total = total + term
    return total


def _rule(
    value_L: Tensor, absmax: Tensor, table: Table, levels: Tensor, middles: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The scale before rounding; and the codes, if the rule has chosen them."""
    if table.rule == "absmax":
        return absmax / levels[-1], None
    y_L = value_L * (1 / absmax)
    if table.rule == "l1":
        return absmax * (_total(y_L.abs()) / len(y_L)), None
    if table.rule == "l2":
        return absmax * torch.sqrt(_total(y_L * y_L)), None
    best, factor, chosen = torch.tensor(-1.0), torch.tensor(0.0), None
    for multiplier in MULTIPLIERS:
        codes_L = torch.searchsorted(middles, y_L * (levels[-1] / multiplier), right=True)
        c_L = levels[codes_L]
        inner, norm = _total(c_L * y_L), _total(c_L * c_L)
        score = inner * (inner / norm) if norm > 0 else torch.tensor(0.0)
        if score > best:
            best, factor, chosen = score, inner / norm if norm > 0 else torch.tensor(0.0), codes_L
    return absmax * factor, chosen


def table_encode(
    x: Tensor,
    payload: Tensor,
    *,
    table: Table,
    key: int,
    shift: int,
    first_block: int,
    residual: Tensor | None,
    new_residual: Tensor | None,
    loss_scale: float,
) -> None:
    """Encode x + loss_scale * residual; see the module docstring for the format."""
    n, block_size = x.numel(), table.block_size
    levels, middles, gaps, smallest = constants(table)
    value = x.clone() if residual is None else x + residual * torch.tensor(loss_scale, dtype=torch.float32)
    decoded, kept = torch.empty_like(value), torch.zeros(n, dtype=torch.bool)
    size, up = SCALE_BYTES[table.scale_format], table.rule in ("absmax", "l2")
    position = -(-n // block_size) * size
    for block in range(-(-n // block_size)):
        span = slice(block * block_size, min((block + 1) * block_size, n))
        value_L, length = value[span], min(block_size, n - block * block_size)
        padded = -(-length // 8) * 8
        absmax = value_L.view(torch.int32).bitwise_and(0x7FFFFFFF).amax().view(torch.float32)
        scale, codes_L = torch.tensor(torch.nan), None
        if bool(torch.isfinite(absmax)):
            scale = torch.tensor(0.0)
            if absmax >= _MIN_NORMAL:
                scale, codes_L = _rule(value_L, absmax, table, levels, middles)
        bits = _scale_bits(scale, table.scale_format, up)
        scale = _scale_value(bits, table.scale_format)
        if not bool(torch.isfinite(scale * levels[-1])):
            bits = _scale_bits(torch.tensor(torch.nan), table.scale_format, up)
            scale = torch.tensor(torch.nan)
        codes_P = torch.full((padded,), smallest, dtype=torch.int64)
        if bool(scale > 0):
            if codes_L is None:
                q_L = value_L * (1 / scale)
                if table.stochastic:
                    low = (torch.searchsorted(levels, q_L, right=True) - 1).clamp(0, len(levels) - 2)
                    u_L = reference._dither(key, first_block + block, shift, padded)[:length]
                    u_L = u_L * 2.0**-16 + 2.0**-17
                    codes_L = low + ((q_L - levels[low]) * gaps[low] > u_L)
                else:
                    codes_L = torch.searchsorted(middles, q_L, right=True)
            codes_P[:length] = codes_L
        else:
            kept[span] = bool(torch.isnan(scale))
        raw = list(bits.to_bytes(size, "little"))
        payload[block * size : (block + 1) * size] = torch.tensor(raw, dtype=torch.uint8)
        nbytes = padded * table.num_bits // 8
        payload[position : position + nbytes] = reference._pack(codes_P.to(torch.int32), table.num_bits)
        position += nbytes
        decoded[span] = levels[codes_P[:length]] * scale
    if new_residual is not None:
        assert residual is not None
        error = (value - decoded) * torch.tensor(1.0 / loss_scale, dtype=torch.float32)
        new_residual.copy_(torch.where(kept, residual, error))


def table_decode(payload: Tensor, out: Tensor, *, table: Table) -> None:
    """Decode one segment into out."""
    n, block_size = out.numel(), table.block_size
    levels = constants(table)[0]
    size = SCALE_BYTES[table.scale_format]
    position = -(-n // block_size) * size
    for block in range(-(-n // block_size)):
        span = slice(block * block_size, min((block + 1) * block_size, n))
        length = span.stop - span.start
        padded = -(-length // 8) * 8
        raw = bytes(payload[block * size : (block + 1) * size].tolist())
        scale = _scale_value(int.from_bytes(raw, "little"), table.scale_format)
        nbytes = padded * table.num_bits // 8
        codes_P = reference._unpack(payload[position : position + nbytes], table.num_bits, padded)
        position += nbytes
        decoded = levels[codes_P[:length].to(torch.int64)] * scale
        out[span] = torch.where(decoded.isnan(), torch.nan, decoded)


def table_decode_mean(payloads: Tensor, out: Tensor, *, table: Table) -> None:
    """Mean over the W rows of payloads, added in row order in fp32, divided once."""
    row = torch.empty_like(out)
    for rank, payload in enumerate(payloads):
        target = out if rank == 0 else row
        table_decode(payload, target, table=table)
        if rank > 0:
            out.add_(row)
    out.div_(payloads.shape[0])
