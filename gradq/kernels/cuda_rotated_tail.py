"""The last tile of a segment in Triton: R < 256 rows, any number of them, by one program a segment.

A tile is one tensor [4096], its last rows zeros. `size` is the largest power of two up to R and `factor` its
root's inverse; if R is no power of two the transform takes the first `size` rows and then the last, as in
`gradq.kernels.reference_rotated`.

On an H100 it met the contract, but took as long as the full tiles of 100 MB: its sums and shifts want another
form. With more warps than 4, as now, it was not run on a GPU.
"""

from __future__ import annotations

import triton.language as tl

from gradq.kernels.cuda_rotated_tools import TWICE, bf16_scales, index, level, split, unit
from gradq.kernels.cuda_tools import as_bits, as_float, jit, load_number, mix32, store_number

__all__ = ["decode_tail", "encode_tail", "window"]


def window(numel: int) -> tuple[int, int, float]:
    """R, size and factor of the last tile of numel elements."""
    rows = -(-(numel % 4096) // 16)
    size = 1 << max(rows.bit_length() - 1, 0)
    return rows, size, float(size**-0.5)


@jit
def _stage(z: tl.tensor, size: tl.tensor, DISTANCE: tl.constexpr) -> tl.tensor:
    """Sums and differences of rows at a distance, if it is smaller than size."""
    pairs = tl.permute(tl.reshape(z, [128 // DISTANCE, 2, 16 * DISTANCE]), [0, 2, 1])
    a, b = tl.split(pairs)
    after = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [4096])
    return tl.where(size > DISTANCE, after, z)


@jit
def _stages(z: tl.tensor, size: tl.tensor) -> tl.tensor:
    """Distances 1, 2, 4, 8."""
    return _stage(_stage(_stage(_stage(z, size, 1), size, 2), size, 4), size, 8)


@jit
def _high_stages(z: tl.tensor, size: tl.tensor) -> tl.tensor:
    """Distances 16, 32, 64, 128."""
    return _stage(_stage(_stage(_stage(z, size, 16), size, 32), size, 64), size, 128)


@jit
def _shifted(z: tl.tensor, by: tl.tensor) -> tl.tensor:
    """Element e + by of z at e; whatever stands there beyond its ends."""
    return tl.gather(z, (tl.arange(0, 4096) + by) & 4095, 0)


@jit
def _negated(z: tl.tensor, words_at: tl.tensor) -> tl.tensor:
    """Z with the signs of the hash words from words_at on."""
    e = tl.arange(0, 4096)
    word = mix32(words_at + (((e >> 9) << 4) + (e & 15)).to(tl.uint32))
    return as_float(as_bits(z) ^ ((word << (31 - ((e >> 4) & 31)).to(tl.uint32)) & 0x80000000))


@jit
def _rotate(
    z: tl.tensor, second: tl.tensor, rows: tl.tensor, size: tl.tensor, factor: tl.tensor
) -> tl.tensor:
    e = tl.arange(0, 4096)
    whole = size == rows
    ahead = (rows - size) * 16
    after = _high_stages(_stages(z, size), size)
    z = tl.where(e < size * 16, tl.where(whole, after, after * factor), z)
    last = _shifted(_negated(z, second), ahead)
    last = _shifted(_high_stages(_stages(last, size), size) * factor, -ahead)
    return tl.where(whole | (e < ahead) | (e >= rows * 16), z, last)


@jit
def _unrotate(
    z: tl.tensor, second: tl.tensor, rows: tl.tensor, size: tl.tensor, factor: tl.tensor
) -> tl.tensor:
    e = tl.arange(0, 4096)
    whole = size == rows
    ahead = (rows - size) * 16
    last = _stages(_high_stages(_shifted(z, ahead), size), size) * factor
    last = _negated(_shifted(last, -ahead), second)
    z = tl.where(whole | (e < ahead) | (e >= rows * 16), z, last)
    after = _stages(_high_stages(z, size), size)
    return tl.where(e < size * 16, tl.where(whole, after, after * factor), z)


@jit
def _add_up(terms: tl.tensor) -> tl.tensor:
    """[4 accumulators, 16 columns, ... 64 steps] to [16]: step after step, then (0 + 1) + (2 + 3)."""
    parts = split(tl.reshape(terms, [64, 2, 2, 2, 2, 2, 2]), 6)
    total = tl.zeros([64], tl.float32)
    for step in tl.static_range(64):
        total = total + parts[step]
    by_column = tl.permute(tl.reshape(total, [4, 16]), [1, 0])
    even, odd = tl.split(tl.reshape(by_column, [16, 2, 2]))
    low, high = tl.split(even + odd)
    return low + high


@jit
def _group_sums(terms: tl.tensor, groups: tl.tensor) -> tl.tensor:
    """Sums over the rows and the columns of a group, [16], a group's at each of its columns."""
    by_step = tl.permute(tl.reshape(terms, [64, 4, 16]), [1, 2, 0])
    sums = _add_up(by_step)
    column = tl.arange(0, 16)
    group = column * groups // 16
    total = tl.zeros([16], tl.float32)
    for c in tl.static_range(16):
        one = tl.sum(tl.where(column == c, sums, 0.0), axis=0)
        total = tl.where(group == c * groups // 16, total + one, total)
    return total


@jit
def _to_tile(columns: tl.tensor) -> tl.tensor:
    """[16] to [4096], a column's value in each row."""
    return tl.reshape(tl.broadcast_to(columns[None, :], [256, 16]), [4096])


@jit
def encode_tail(
    x: tl.tensor,
    residual: tl.tensor,
    new_residual: tl.tensor,
    payload: tl.tensor,
    base: tl.tensor,
    codes_at: tl.tensor,
    loss_scale: tl.tensor,
    inverse_loss_scale: tl.tensor,
    n: tl.tensor,
    rows: tl.tensor,
    size: tl.tensor,
    factor: tl.tensor,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    UNBIASED: tl.constexpr,
    READ: tl.constexpr,
    WRITE: tl.constexpr,
) -> None:
    """As `cuda_rotated._encode`."""
    tile = n.to(tl.int64) // 4096
    left = (n - tile * 4096).to(tl.int32)
    groups = (left + 255) // 256
    gain = tl.where(size == rows, rows, 1).to(tl.float32)
    if tile == 0:
        store_number(payload, base.to(tl.uint32), None, 4)
    e = tl.arange(0, 4096)
    at = tile * 4096 + e
    tile_key = mix32(base.to(tl.uint32) + tile.to(tl.uint32))
    second = tile_key + 256

    value = tl.load(x + at, mask=e < left, other=0.0)
    if READ:
        value = value + tl.load(residual + at, mask=e < left, other=0.0) * loss_scale
    exponent = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0) >> 23

    to_unit = unit(exponent)
    usable = (exponent > 0) & (exponent < 255)
    z = tl.where(usable, _negated(value, tile_key) * to_unit, 0.0)
    energy = _group_sums(z * z, groups)
    z = _rotate(z, second, rows, size, factor)

    column = tl.arange(0, 16)
    group = column * groups // 16
    same = (group[:, None] == group[None, :]).to(tl.int32)
    count = (tl.sum(same, axis=1) * rows).to(tl.float32)
    sigma = tl.sqrt_rn(tl.div_rn(energy * gain, count))
    coded = energy >= 2.0**-120
    inverse = tl.where(coded, tl.div_rn(tl.full([16], 1.0, tl.float32), sigma), 0.0)
    codes = index(z * _to_tile(inverse), BITS, LEVELS)
    packed = payload + codes_at + tile * (512 * BITS) + e
    if BITS & 4:
        _store_plane(packed, codes, rows, 4, 0)
    if BITS & 2:
        _store_plane(packed, codes, rows, 2, BITS & 4)
    if BITS & 1:
        _store_plane(packed, codes, rows, 1, BITS & 6)

    levels = level(codes + codes + TWICE, BITS, LEVELS)
    inner = _group_sums(tl.where(e < rows * 16, levels * z, 0.0), groups)
    if UNBIASED:
        scale = tl.div_rn(energy, inner)
        word = mix32(tile_key + (128 + group).to(tl.uint32)) & 0xFFFF
    else:
        norm = _group_sums(tl.where(e < rows * 16, levels * levels, 0.0), groups)
        scale = tl.div_rn(tl.div_rn(inner, norm), tl.zeros([16], tl.float32) + gain)
        word = tl.zeros([16], tl.uint32) + 0x8000
    scale = tl.where(coded, tl.div_rn(scale, tl.zeros([16], tl.float32) + to_unit), 0.0)
    bits, scale, lost = bf16_scales(scale, word, exponent)
    store_number(payload + 4 + tile * 32 + 2 * group, bits, None, 2)

    if WRITE:
        decoded = _negated(_unrotate(levels, second, rows, size, factor) * _to_tile(scale), tile_key)
        old = tl.load(residual + at, mask=e < left, other=0.0)
        error = tl.where(lost, old, (value - decoded) * inverse_loss_scale)
        tl.store(new_residual + at, error, mask=e < left)


@jit
def _store_plane(
    packed: tl.tensor, codes: tl.tensor, rows: tl.tensor, W: tl.constexpr, DONE: tl.constexpr
) -> None:
    """A plane of W bits, those above the DONE lowest."""
    run = 2 * W * rows
    byte = (codes >> DONE) & ((1 << W) - 1)
    for i in tl.static_range(1, 8 // W):
        byte = byte | (((_shifted(codes, i * run) >> DONE) & ((1 << W) - 1)) << (W * i))
    tl.store(packed + 2 * DONE * rows, byte.to(tl.uint8), mask=tl.arange(0, 4096) < run)


@jit
def _load_plane(packed: tl.tensor, rows: tl.tensor, W: tl.constexpr, DONE: tl.constexpr) -> tl.tensor:
    """What a plane of W bits adds to the codes, above the DONE lowest."""
    e = tl.arange(0, 4096)
    run = 2 * W * rows
    byte = tl.load(packed + (2 * DONE * rows + e % run), mask=e < 16 * rows, other=0).to(tl.int32)
    return ((byte >> (W * (e // run))) & ((1 << W) - 1)) << DONE


@jit
def decode_tail(
    payloads: tl.tensor,
    out: tl.tensor,
    codes_at: tl.tensor,
    num_rows: tl.tensor,
    stride: tl.tensor,
    reciprocal: tl.tensor,
    n: tl.tensor,
    rows: tl.tensor,
    size: tl.tensor,
    factor: tl.tensor,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    EXACT_RECIPROCAL: tl.constexpr,
) -> None:
    """As `cuda_rotated._decode_mean`."""
    tile = n.to(tl.int64) // 4096
    left = (n - tile * 4096).to(tl.int32)
    group = tl.arange(0, 16) * ((left + 255) // 256) // 16
    e = tl.arange(0, 4096)
    total = tl.full([4096], -1.0, tl.float32) * 0.0  # -0: -0 + v is v, for every v
    for _ in range(num_rows):
        tile_key = mix32(load_number(payloads, None, 4) + tile.to(tl.uint32))
        scale = as_float(load_number(payloads + 4 + tile * 32 + 2 * group, None, 2) << 16)
        packed = payloads + codes_at + tile * (512 * BITS)
        codes = tl.zeros([4096], tl.int32)
        if BITS & 4:
            codes = codes | _load_plane(packed, rows, 4, 0)
        if BITS & 2:
            codes = codes | _load_plane(packed, rows, 2, BITS & 4)
        if BITS & 1:
            codes = codes | _load_plane(packed, rows, 1, BITS & 6)
        z = _unrotate(level(codes + codes + TWICE, BITS, LEVELS), tile_key + 256, rows, size, factor)
        z = z * _to_tile(scale)
        total = total + tl.where(z != z, z, _negated(z, tile_key))
        payloads = payloads + stride.to(tl.int64)
    if EXACT_RECIPROCAL:  # of a power of two: a product with it equals the quotient
        mean = total * reciprocal
    else:
        mean = tl.div_rn(total, tl.zeros([4096], tl.float32) + num_rows.to(tl.float32))
    tl.store(out + tile * 4096 + e, mean, mask=e < left)
