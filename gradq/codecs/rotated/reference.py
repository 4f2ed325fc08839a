"""The truth of the rotated codecs, in plain torch.

Shapes: T tiles of R rows and C = 16 columns (R = 256 but for the last tile of a segment, which has as many
rows as it needs, the last row filled up with zeros); G groups of columns that share a scale: 16 in a full
tile, one for each 256 elements or part of them in the last (column c belongs to group c * G // 16).

One segment on the wire::

    base     uint32, little-endian: tile t is rotated by the signs of base + t
    scales   a bf16 for each group
    codes    tile after tile, num_bits x 16 R / 8 bytes each, in planes as in `gradq.codecs.uniform.reference`

Encoding a tile:

1. value = x + loss_scale * residual. With NaN, Inf, or a scale that could decode to Inf, the tile is sent as
   scales of NaN and its residual stays as it was. Below 2**-126 it is sent as scales of 0.
2. Signs; where the largest magnitude is not within 2**-40 ... 2**40, a power of two that brings it into
   [1, 2); the energy of each group (one below 2**-120 is sent as scale 0); then the Hadamard transform of
   each column: sums and differences of rows at distances 1, 2, 4, ... R. If R is no power of two, then with
   R' the largest one below: the first R' rows, times R'**-½, then, with signs of their own, the last R'.
3. σ² = energy / elements of the group. code = trunc(u(clamp(z / σ)) + 2**(num_bits - 1)), see `Polynomials`.
4. With c the levels of the codes: scale = ‖z‖² / ⟨c, z⟩ (unbiased over rotations) or ⟨c, z⟩ / ‖c‖² (least
   squares). An unbiased scale is rounded to bf16 up or down at random, the other to the nearest.
5. The new residual is value - decoded, / loss_scale.

With a trellis steps 3 and 4 differ; see `gradq.codecs.rotated.reference_trellis`.

Decoding: transform the levels back (distances 16, 32, ... R, then 1, 2, 4, 8), times the scale, signs. The
factor R of two transforms that are a power of two long is divided out of the scale.

Sums over rows have four accumulators, the k-th row added to number k % 4, together (0 + 1) + (2 + 3); then
the columns of a group from the left. Those of a full tile are made for sixteen rows at a time, in step 2 for
rows 16 h ... 16 h + 15 and in step 4 for rows l, 16 + l, ... 240 + l; of the sixteen sums the k-th and the
k + 8-th are added, then those 4, 2 and 1 apart. Full tiles add products fused (rounded once), and so do
polynomials in all tiles, from the innermost term; through the trellis there are no fused products but in
energies.

References:
    Vargaftik et al., "EDEN: Communication-efficient and robust distributed mean estimation", ICML 2022 (the
    unbiased scale). Suresh et al., "Distributed mean estimation with limited communication", ICML 2017 (the
    randomized Hadamard transform).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from gradq.codecs.rotated import reference_trellis
from gradq.codecs.rotated.format import (
    COLUMNS,
    GROUP,
    HEADER_BYTES,
    TILE,
    TILE_ROWS,
    Polynomials,
    RotatedFormat,
    rotation_base,
)
from gradq.kernels.reference_tools import (
    fused,
    mean_of_rows,
    mix32,
    new_residual_of,
    pack,
    unpack,
    value_of,
)
from gradq.rng import EncodeContext

__all__ = ["decode", "decode_mean", "encode", "rotate", "signs", "split", "unrotate"]

_MASK32 = 0xFFFFFFFF
_MIN_NORMAL = 2.0**-126
_BF16_NAN = 0x7FC0
_SCALE_WORD = TILE // 32  # the hash word that rounds the first scale, after those of the signs
_SECOND_WORD = 256  # the first hash word of the second signs


def split(numel: int) -> Iterator[tuple[slice, int, int, int]]:
    """The full tiles of a segment together, then its last: (elements, first tile, rows, groups)."""
    full = numel // TILE
    if full:
        yield slice(0, full * TILE), 0, TILE // COLUMNS, TILE // GROUP
    if numel % TILE:
        left = numel % TILE
        yield slice(full * TILE, numel), full, -(-left // COLUMNS), -(-left // GROUP)


def _words(base: int, first_tile: int, num_tiles: int, first: int, count: int) -> Tensor:
    """Hash words [T, count] in int64."""
    keys_T = mix32((torch.arange(num_tiles) + first_tile + base) & _MASK32)
    return mix32((keys_T[:, None] + torch.arange(first, first + count)) & _MASK32)


def signs(base: int, first_tile: int, num_tiles: int, rows: int, first_word: int = 0) -> Tensor:
    """+1 or -1, fp32 [T, R, C]: row r, column c takes bit r % 32 of hash word 16 (r // 32) + c."""
    count = -(-rows // 32) * COLUMNS
    words = _words(base, first_tile, num_tiles, first_word, count).view(num_tiles, -1, 1, COLUMNS)
    bits = (words >> torch.arange(32)[:, None]) & 1
    return (1.0 - 2.0 * bits.to(torch.float32)).reshape(num_tiles, -1, COLUMNS)[:, :rows]


def _both_signs(base: int, first_tile: int, num_tiles: int, rows: int) -> Tensor:
    """The signs before the first and before the second transform, [2, T, R, C]."""
    return torch.stack([signs(base, first_tile, num_tiles, rows, word) for word in (0, _SECOND_WORD)])


def _hadamard(z_TRC: Tensor, distances: Sequence[int]) -> Tensor:
    shape = z_TRC.shape
    for distance in distances:
        pairs = z_TRC.reshape(shape[0], -1, 2, distance, COLUMNS)
        z_TRC = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2)
    return z_TRC.reshape(shape)


def _windows(rows: int) -> tuple[int, Tensor]:
    """The largest power of two R' <= R, and R'**-½ in fp32."""
    size = 1 << (rows.bit_length() - 1)
    return size, torch.tensor(size**-0.5, dtype=torch.float32)


def _gain(rows: int) -> int:
    """What a transform multiplies energies by."""
    return rows if rows & (rows - 1) == 0 else 1


def rotate(z_TRC: Tensor, second_TRC: Tensor) -> Tensor:
    """The transform of each column: orthogonal, but for a factor √R where R is a power of two."""
    rows = z_TRC.shape[1]
    size, factor = _windows(rows)
    distances = [1 << k for k in range(size.bit_length() - 1)]
    if size == rows:
        return _hadamard(z_TRC, distances)
    z_TRC = torch.cat((_hadamard(z_TRC[:, :size], distances) * factor, z_TRC[:, size:]), 1)
    last_TRC = _hadamard(z_TRC[:, -size:] * second_TRC[:, -size:], distances) * factor
    return torch.cat((z_TRC[:, :-size], last_TRC), 1)


def unrotate(z_TRC: Tensor, second_TRC: Tensor) -> Tensor:
    """The inverse of `rotate`, but for a factor R where R is a power of two."""
    rows = z_TRC.shape[1]
    size, factor = _windows(rows)
    distances = [1 << k for k in range(size.bit_length() - 1)]
    distances = distances[4:] + distances[:4]
    if size == rows:
        return _hadamard(z_TRC, distances)
    last_TRC = _hadamard(z_TRC[:, -size:], distances) * factor * second_TRC[:, -size:]
    z_TRC = torch.cat((z_TRC[:, :-size], last_TRC), 1)
    return torch.cat((_hadamard(z_TRC[:, :size], distances) * factor, z_TRC[:, size:]), 1)


def _sum_rows(terms_TRC: Tensor) -> Tensor:
    """Sums over rows in order, [T, C], with the accumulators that the module docstring describes."""
    num_tiles, rows, _ = terms_TRC.shape
    padded = torch.zeros(num_tiles, -(-rows // 4) * 4, COLUMNS)
    padded[:, :rows] = terms_TRC
    sums_T4C = torch.zeros(num_tiles, 4, COLUMNS)
    for quad in padded.view(num_tiles, -1, 4, COLUMNS).unbind(1):
        sums_T4C = sums_T4C + quad
    return _add_four(sums_T4C)


def _add_four(sums_T4C: Tensor) -> Tensor:
    return (sums_T4C[:, 0] + sums_T4C[:, 1]) + (sums_T4C[:, 2] + sums_T4C[:, 3])


def _sum_full(a_TRC: Tensor, b_TRC: Tensor, *, apart: bool) -> Tensor:
    """Sums of products over the rows of full tiles, [T, C]; apart: sixteen rows 16 apart at a time."""

    def blocks(z_TRC: Tensor) -> Tensor:
        z = z_TRC.view(-1, 16, 16, COLUMNS)
        return (z.transpose(1, 2) if apart else z).reshape(-1, 4, 4, COLUMNS)

    sums_T4C = torch.zeros(len(a_TRC) * 16, 4, COLUMNS)
    for a, b in zip(blocks(a_TRC).unbind(1), blocks(b_TRC).unbind(1), strict=True):
        sums_T4C = fused(a, b, sums_T4C)
    sums_TBC = _add_four(sums_T4C).view(-1, 16, COLUMNS)
    for count in (8, 4, 2, 1):
        sums_TBC = sums_TBC[:, :count] + sums_TBC[:, count : 2 * count]
    return sums_TBC[:, 0]


def _sum_groups(a_TRC: Tensor, b_TRC: Tensor, groups: int, *, apart: bool = False) -> Tensor:
    """Sums of products over rows and the columns of a group, [T, G]; the module docstring has the order."""
    if a_TRC.shape[1] == TILE_ROWS:
        return _sum_full(a_TRC, b_TRC, apart=apart)
    sums_TC = _sum_rows(a_TRC * b_TRC)
    sums_TG = torch.zeros(len(sums_TC), groups)
    for column in range(COLUMNS):
        sums_TG[:, column * groups // COLUMNS] += sums_TC[:, column]
    return sums_TG


def _sum_through_trellis(a_TRC: Tensor, b_TRC: Tensor, groups: int) -> Tensor:
    """As `_sum_groups`, from the last row to the first; all tiles alike."""
    if a_TRC.shape[1] == TILE_ROWS:
        return _sum_rows((a_TRC * b_TRC).flip(1))
    return _sum_groups(a_TRC.flip(1), b_TRC.flip(1), groups)


def _by_column(values_TG: Tensor) -> Tensor:
    """[T, G] to [T, 1, C]."""
    groups = values_TG.shape[1]
    return values_TG[:, torch.arange(COLUMNS) * groups // COLUMNS][:, None]


def _level(codes: Tensor, num_bits: int, polynomials: Polynomials) -> Tensor:
    a0, a1, a2, a3 = polynomials.to_level
    m = codes.to(torch.float32) - ((1 << num_bits) - 1) / 2
    m2 = m * m
    return m * fused(m2, fused(m2, fused(m2, a3, a2), a1), a0)


def _quantize(y: Tensor, num_bits: int, polynomials: Polynomials) -> Tensor:
    k0, k1, k2, k3 = polynomials.to_index
    y = y.clamp(-polynomials.top, polynomials.top)
    y2 = y * y
    slope = fused(y2, fused(y2, fused(y2, k3, k2), k1), k0)
    return fused(y, slope, 1 << (num_bits - 1)).to(torch.int32)


def _round_scales(scales_TG: Tensor, words_TG: Tensor) -> Tensor:
    """Bits of bf16 scales, [T, G] int64, rounded by the low halves of the words; 0 below 2**-126."""
    bits = scales_TG.view(torch.int32).to(torch.int64)
    rounded = (bits + (words_TG & 0xFFFF)) >> 16
    return torch.where(scales_TG < _MIN_NORMAL, 0, rounded)


def _scale_values(bits_TG: Tensor) -> Tensor:
    return (bits_TG << 16).to(torch.int32).view(torch.float32)


def encode(
    x: Tensor,
    payload: Tensor,
    form: RotatedFormat,
    context: EncodeContext,
    residual: Tensor | None = None,
    new_residual: Tensor | None = None,
) -> None:
    """Encode x + loss_scale * residual; see the module docstring for the format."""
    n = x.numel()
    if n == 0:
        return
    base, value = rotation_base(context), value_of(x, residual, context.loss_scale)
    decoded, kept = torch.empty_like(value), torch.zeros(n, dtype=torch.bool)
    payload[:HEADER_BYTES] = torch.tensor(list(base.to_bytes(4, "little")), dtype=torch.uint8)
    for span, first_tile, rows, groups in split(n):
        length = span.stop - span.start
        num_tiles = -(-length // TILE)
        value_TRC = torch.zeros(num_tiles * rows * COLUMNS)
        value_TRC[:length] = value[span]
        value_TRC = value_TRC.view(num_tiles, rows, COLUMNS)
        words_TG = _words(base, first_tile, num_tiles, _SCALE_WORD, groups)
        signs_2TRC = _both_signs(base, first_tile, num_tiles, rows)
        if not form.unbiased:
            words_TG = torch.full_like(words_TG, 0x8000)
        bits_TG, codes_TRC = _encode_tiles(value_TRC, signs_2TRC, words_TG, form)
        scales, codes = _places(n, first_tile, num_tiles, rows, groups, form)
        payload[scales] = bits_TG.reshape(-1).to(torch.int16).view(torch.uint8)
        payload[codes] = pack(codes_TRC.reshape(num_tiles, -1), form.num_bits).reshape(-1)
        decoded[span] = _decode_tiles(bits_TG, codes_TRC, signs_2TRC, form).reshape(-1)[:length]
        kept[span] = _lost(bits_TG, rows)[:length]
    if new_residual is not None:
        new_residual.copy_(new_residual_of(value, decoded, residual, kept, context.loss_scale))


def _places(
    numel: int, first_tile: int, num_tiles: int, rows: int, groups: int, form: RotatedFormat
) -> tuple[slice, slice]:
    """Where in the payload the scales and the codes of some tiles stand."""
    scales = HEADER_BYTES + first_tile * (TILE // GROUP) * 2
    codes = form.codes_at(numel) + first_tile * (TILE * form.num_bits // 8)
    size = num_tiles * rows * COLUMNS * form.num_bits // 8
    return slice(scales, scales + 2 * num_tiles * groups), slice(codes, codes + size)


def _lost(bits_TG: Tensor, rows: int) -> Tensor:
    """Whether the tile of an element was sent as NaN, bool [T * R * C]."""
    return _scale_values(bits_TG).isnan()[:, :1, None].expand(-1, rows, COLUMNS).reshape(-1)


def _encode_tiles(
    value_TRC: Tensor, signs_2TRC: Tensor, words_TG: Tensor, form: RotatedFormat
) -> tuple[Tensor, Tensor]:
    """Bits of the scales [T, G] and codes [T, R, C]."""
    num_tiles, rows, _ = value_TRC.shape
    groups = words_TG.shape[1]
    absmax_T = value_TRC.view(torch.int32).bitwise_and(0x7FFFFFFF).reshape(num_tiles, -1).amax(1)
    exponent_T = absmax_T >> 23
    finite_T, normal_T = (exponent_T < 255)[:, None], (exponent_T > 0)[:, None]
    to_unit_T = ((254 - exponent_T).clamp(1, 253) << 23).view(torch.float32)
    to_unit_T = torch.where((exponent_T >= 87) & (exponent_T < 167), 1.0, to_unit_T)[:, None, None]
    usable = (finite_T & normal_T)[:, :, None]
    unit_TRC = torch.where(usable, (value_TRC * signs_2TRC[0]) * to_unit_T, 0.0)
    energy_TG = _sum_groups(unit_TRC, unit_TRC, groups)
    z_TRC = rotate(unit_TRC, signs_2TRC[1])
    count_G = torch.bincount(torch.arange(COLUMNS) * groups // COLUMNS).to(torch.float32) * rows
    sigma_TG = torch.sqrt(energy_TG * _gain(rows) / count_G)
    coded_TG = energy_TG >= 2.0**-120
    inverse_TG = torch.where(coded_TG, 1.0 / sigma_TG, 0.0)
    y_TRC = z_TRC * _by_column(inverse_TG)
    if form.trellis:
        codes_TRC = reference_trellis.encode(y_TRC, form.num_bits)
    else:
        codes_TRC = _quantize(y_TRC, form.num_bits, form.polynomials)
    level_TRC = _levels(codes_TRC, form)
    total = _sum_through_trellis if form.trellis else partial(_sum_groups, apart=True)
    inner_TG = total(level_TRC, z_TRC, groups)
    if form.unbiased:
        scale_TG = energy_TG / inner_TG
    else:
        scale_TG = (inner_TG / total(level_TRC, level_TRC, groups)) / _gain(rows)
    scale_TG = torch.where(coded_TG, scale_TG / to_unit_T[:, :, 0], 0.0)
    bits_TG = _round_scales(scale_TG, words_TG)
    overflow_T = ~torch.isfinite(_scale_values(bits_TG) * TILE).all(1, keepdim=True)
    bits_TG = torch.where(~finite_T | overflow_T, _BF16_NAN, bits_TG)
    return bits_TG, codes_TRC


def _levels(codes_TRC: Tensor, form: RotatedFormat) -> Tensor:
    if form.trellis:
        return reference_trellis.levels(codes_TRC, form.num_bits)
    return _level(codes_TRC, form.num_bits, form.polynomials)


def _decode_tiles(bits_TG: Tensor, codes_TRC: Tensor, signs_2TRC: Tensor, form: RotatedFormat) -> Tensor:
    rotated_TRC = unrotate(_levels(codes_TRC, form), signs_2TRC[1])
    return (rotated_TRC * _by_column(_scale_values(bits_TG))) * signs_2TRC[0]


def decode(payload: Tensor, out: Tensor, form: RotatedFormat) -> None:
    """Decode one segment into out."""
    n = out.numel()
    if n == 0:
        return
    base = int.from_bytes(bytes(payload[:HEADER_BYTES].tolist()), "little")
    for span, first_tile, rows, groups in split(n):
        length = span.stop - span.start
        num_tiles = -(-length // TILE)
        scales, codes = _places(n, first_tile, num_tiles, rows, groups, form)
        bits = payload[scales].to(torch.int64).view(num_tiles, groups, 2)
        bits_TG = bits[..., 0] | (bits[..., 1] << 8)
        codes_TRC = unpack(payload[codes].view(num_tiles, -1), form.num_bits).view(num_tiles, rows, COLUMNS)
        signs_2TRC = _both_signs(base, first_tile, num_tiles, rows)
        out[span] = _decode_tiles(bits_TG, codes_TRC, signs_2TRC, form).reshape(-1)[:length]
        out[span][_lost(bits_TG, rows)[:length]] = torch.nan


def decode_mean(payloads: Tensor, out: Tensor, form: RotatedFormat) -> None:
    """Mean over the W rows of payloads, added in row order in fp32, divided once."""
    mean_of_rows(lambda payload, to: decode(payload, to, form), payloads, out)
