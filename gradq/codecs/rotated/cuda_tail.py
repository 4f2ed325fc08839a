"""The last tile of a segment in Triton: R < 256 rows, any number of them, by one program a segment.

A tile has the forms that `cuda` describes. `size` is the largest power of two up to R and `factor`
its root's inverse; if R is no power of two the transform takes the first `size` rows and then the last, as in
`gradq.codecs.rotated.reference`. The last are moved `ahead` = R - size rows, to the front and back again: by
whole tensors in each form, so that `swap` is all that goes through shared memory.

Its program is the first of the launch that has the full tiles, and runs beside theirs. In this form it was
not run on a GPU, only in Triton's interpreter.
"""

# Triton unrolls loops over tuples, and a tuple grows by a sum.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

import triton.language as tl

from gradq.codecs.rotated.cuda_rotation import (
    TWICE,
    bf16_scales,
    index,
    inverse_unit,
    joined,
    level,
    load,
    negated,
    parted,
    places,
    scaled_to_unit,
    sign_words,
    split,
    stage,
    swap,
    to_columns,
)
from gradq.kernels.triton_tools import as_bits, as_float, jit, mix32, quotient, root, store_number

__all__ = ["encode_tail", "unrotated_tail", "window"]


def window(numel: int) -> tuple[int, int, float]:
    """R, size and factor of the last tile of numel elements; of no element, those of one row."""
    rows = max(-(-(numel % 4096) // 16), 1)
    size = 1 << (rows.bit_length() - 1)
    return rows, size, float(size**-0.5)


# --- the transform -------------------------------------------------------------------------------------


@jit
def _stages(z: tl.tensor, size: tl.tensor, UNIT: tl.constexpr) -> tl.tensor:
    """Four stages over the sixteen, which stand UNIT rows apart: those at distances smaller than size."""
    for step in tl.static_range(4):
        if size > (UNIT << step):
            z = stage(z, 1 << step)
    return z


@jit
def _rolled(z: tl.tensor, by: tl.tensor) -> tl.tensor:
    """The sixteen, each in the place of the one that is `by` before it; the first follow the last."""
    for bit in tl.static_range(4):
        if (by >> bit) & 1:
            moved = ()
            for k in tl.static_range(16):
                moved = moved + (z[(k + (1 << bit)) % 16],)
            z = moved
    return z


@jit
def _rolled_where(z: tl.tensor, there: tl.tensor, BY: tl.constexpr) -> tl.tensor:
    """`_rolled` by BY where the mask says so."""
    moved = ()
    for k in tl.static_range(16):
        moved = moved + (tl.where(there, z[(k + BY) % 16], z[k]),)
    return moved


@jit
def _to_front(z: tl.tensor, ahead: tl.tensor) -> tl.tensor:
    """[l, column] to [h, column] of the rows that stand `ahead` further back."""
    carried = (tl.arange(0, 256) >> 4) < (ahead & 15)
    return _rolled(swap(_rolled_where(_rolled(z, ahead >> 4), carried, 1)), ahead & 15)


@jit
def _back(z: tl.tensor, ahead: tl.tensor) -> tl.tensor:
    """[h, column] to [l, column], undoing `_to_front`."""
    carried = (tl.arange(0, 256) >> 4) < (ahead & 15)
    return _rolled_where(_rolled(swap(_rolled(z, 16 - (ahead & 15))), 16 - (ahead >> 4)), carried, 15)


@jit
def _row(H: tl.constexpr) -> tl.tensor:
    """The rows of number H of the form [l, column], [256]."""
    return 16 * H + (tl.arange(0, 256) >> 4)


@jit
def _second_signs(words_at: tl.tensor) -> tl.tensor:
    """The signs, in the last bits, of the hash words from words_at on: sixteen [l, column]."""
    column, low = tl.arange(0, 256) & 15, tl.arange(0, 256) >> 4
    signs = ()
    for pair in tl.static_range(8):
        word = mix32(words_at + (16 * pair + column).to(tl.uint32)) << (15 - low).to(tl.uint32)
        signs = signs + ((word << 16) & 0x80000000, word & 0x80000000)
    return signs


@jit
def _signed(z: tl.tensor, signs: tl.tensor) -> tl.tensor:
    """Sixteen with these signs."""
    signed = ()
    for k in tl.static_range(16):
        signed = signed + (as_float(as_bits(z[k]) ^ signs[k]),)
    return signed


@jit
def _merged(
    z: tl.tensor, last: tl.tensor, factor: tl.tensor, ahead: tl.tensor, rows: tl.tensor, size: tl.tensor
) -> tl.tensor:
    """The last `size` rows, times factor, in their places if there are others before them."""
    merged = ()
    for h in tl.static_range(16):
        row = _row(h)
        keep = (size == rows) | (row < ahead) | (row >= rows)
        merged = merged + (tl.where(keep, z[h], last[h] * factor),)
    return merged


@jit
def _rotate(
    z: tl.tensor, second: tl.tensor, rows: tl.tensor, size: tl.tensor, factor: tl.tensor
) -> tl.tensor:
    """[h, column] to the transform, [l, column]."""
    ahead = rows - size
    before = swap(z)
    after = _stages(swap(_stages(z, size, 1)), size, 16)
    z = ()
    for h in tl.static_range(16):
        first = after[h] * tl.where(size == rows, 1.0, factor)
        z = z + (tl.where(_row(h) < size, first, before[h]),)
    last = _to_front(_signed(z, second), ahead)
    last = swap(_stages(swap(_stages(last, size, 1)), size, 16))
    return _merged(z, _back(last, ahead), factor, ahead, rows, size)


@jit
def _unrotate(
    z: tl.tensor, last: tl.tensor, second: tl.tensor, rows: tl.tensor, size: tl.tensor, factor: tl.tensor
) -> tl.tensor:
    """Levels, and those of the last rows at the front, both [l, column], to the inverse, [h, column]."""
    ahead = rows - size
    last = _stages(swap(_stages(last, size, 16)), size, 1)
    scaled = ()
    for k in tl.static_range(16):
        scaled = scaled + (last[k] * factor,)
    z = _merged(z, _signed(_back(scaled, ahead), second), 1.0, ahead, rows, size)
    before = swap(z)
    after = _stages(swap(_stages(z, size, 16)), size, 1)
    row = (tl.arange(0, 256) >> 4) * 16
    z = ()
    for k in tl.static_range(16):
        first = after[k] * tl.where(size == rows, 1.0, factor)
        z = z + (tl.where(row + k < size, first, before[k]),)
    return z


# --- sums ----------------------------------------------------------------------------------------------


@jit
def _group_sums(by_step: tl.tensor, groups: tl.tensor) -> tl.tensor:
    """Sums over the rows and the columns of a group, [16], a group's at each of its columns.

    by_step: [4 accumulators, 16 columns, 64 steps].
    """
    parts = split(tl.reshape(by_step, [64, 2, 2, 2, 2, 2, 2]), 6)
    total = tl.zeros([64], tl.float32)
    for step in tl.static_range(64):
        total = total + parts[step]
    even, odd = tl.split(tl.reshape(tl.permute(tl.reshape(total, [4, 16]), [1, 0]), [16, 2, 2]))
    low, high = tl.split(even + odd)
    columns = parted(tl.reshape(low + high, [1, 16]))
    group = tl.arange(0, 16) * groups // 16
    sums = tl.zeros([16], tl.float32)
    for c in tl.static_range(16):
        sums = tl.where(group == c * groups // 16, sums + columns[c], sums)
    return sums


@jit
def _sums_before(z: tl.tensor, groups: tl.tensor) -> tl.tensor:
    """Sums of squares of [h, column]."""
    squares = ()
    for k in tl.static_range(16):
        squares = squares + (z[k] * z[k],)
    by_step = tl.permute(tl.reshape(joined(squares), [16, 16, 4, 4]), [3, 1, 0, 2])
    return _group_sums(tl.reshape(by_step, [4, 16, 64]), groups)


@jit
def _sums_after(a: tl.tensor, b: tl.tensor, rows: tl.tensor, groups: tl.tensor) -> tl.tensor:
    """Sums of products of [l, column] over R rows."""
    products = ()
    for h in tl.static_range(16):
        products = products + (tl.where(_row(h) < rows, a[h] * b[h], 0.0),)
    by_step = tl.permute(tl.reshape(joined(products), [4, 4, 16, 16]), [1, 2, 3, 0])
    return _group_sums(tl.reshape(by_step, [4, 16, 64]), groups)


# --- codes ---------------------------------------------------------------------------------------------


@jit
def _store_plane(
    packed: tl.tensor, codes: tl.tensor, rows: tl.tensor, W: tl.constexpr, DONE: tl.constexpr
) -> None:
    """A plane of W bits, those above the DONE lowest, of codes [4096]."""
    e = tl.arange(0, 4096)
    run = 2 * W * rows
    byte = (codes >> DONE) & ((1 << W) - 1)
    for i in tl.static_range(1, 8 // W):
        later = tl.gather(codes, (e + i * run) & 4095, 0)
        byte = byte | (((later >> DONE) & ((1 << W) - 1)) << (W * i))
    tl.store(packed + 2 * DONE * rows + e, byte.to(tl.uint8), mask=e < run)


@jit
def _digit(
    packed: tl.tensor, e: tl.tensor, rows: tl.tensor, W: tl.constexpr, DONE: tl.constexpr
) -> tl.tensor:
    """What a plane of W bits adds to the codes of elements e, above the DONE lowest."""
    run = 2 * W * rows
    place = tl.minimum(e // run, 8 // W - 1)  # beyond the last row nothing is loaded, nor shifted too far
    at = packed + 2 * DONE * rows + (e - place * run)
    byte = tl.load(at, mask=e < 16 * rows, other=0).to(tl.int32)
    return ((byte >> (W * place)) & ((1 << W) - 1)) << DONE


@jit
def _levels(
    packed: tl.tensor, rows: tl.tensor, ahead: tl.tensor, BITS: tl.constexpr, LEVELS: tl.constexpr
) -> tl.tensor:
    """Levels of the rows from `ahead` on, [l, column]."""
    levels = ()
    for h in tl.static_range(16):
        e = (_row(h) + ahead) * 16 + (tl.arange(0, 256) & 15)
        code = tl.zeros([256], tl.int32)
        if BITS & 4:
            code = code | _digit(packed, e, rows, 4, 0)
        if BITS & 2:
            code = code | _digit(packed, e, rows, 2, BITS & 4)
        if BITS & 1:
            code = code | _digit(packed, e, rows, 1, BITS & 6)
        levels = levels + (level(code + code + TWICE, BITS, LEVELS),)
    return levels


# --- tiles ---------------------------------------------------------------------------------------------


@jit
def encode_tail(
    x: tl.tensor,
    residual: tl.tensor,
    payload: tl.tensor,
    codes_at: tl.tensor,
    tile: tl.tensor,
    tile_key: tl.tensor,
    loss_scale: tl.tensor,
    last: tl.tensor,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    UNBIASED: tl.constexpr,
    READ: tl.constexpr,
) -> None:
    """As `cuda._encode_tile`; last: its number of elements, and what `window` gives."""
    left, rows, size, factor = last
    groups = (left + 255) // 256
    gain = tl.where(size == rows, rows, 1).to(tl.float32)
    second = _second_signs(tile_key + 256)

    at = places()
    word = sign_words(tile_key)
    z = ()
    for k in tl.static_range(16):
        value = load(x, at + 16 * k, left, True)
        if READ:
            value = value + load(residual, at + 16 * k, left, True) * loss_scale
        z = z + (negated(value, word, k),)
    z, exponent, to_unit = scaled_to_unit(z)
    energy = _sums_before(z, groups)
    z = _rotate(z, second, rows, size, factor)

    group = tl.arange(0, 16) * groups // 16
    same = (group[:, None] == group[None, :]).to(tl.int32)
    count = (tl.sum(same, axis=1) * rows).to(tl.float32)
    sigma = root(quotient(energy * gain, count))
    coded = energy >= 2.0**-120
    inverse = to_columns(tl.where(coded, quotient(tl.full([16], 1.0, tl.float32), sigma), 0.0))
    codes = ()
    levels = ()
    for h in tl.static_range(16):
        code = index(z[h] * inverse, BITS, LEVELS)
        codes = codes + (code,)
        levels = levels + (level(code + code + TWICE, BITS, LEVELS),)
    inner = _sums_after(levels, z, rows, groups)
    packed = payload + codes_at + tile * (512 * BITS)
    in_order = tl.reshape(tl.permute(tl.reshape(joined(codes), [16, 16, 16]), [2, 0, 1]), [4096])
    if BITS & 4:
        _store_plane(packed, in_order, rows, 4, 0)
    if BITS & 2:
        _store_plane(packed, in_order, rows, 2, BITS & 4)
    if BITS & 1:
        _store_plane(packed, in_order, rows, 1, BITS & 6)

    if UNBIASED:
        scale = quotient(energy, inner)
        word16 = mix32(tile_key + (128 + group).to(tl.uint32)) & 0xFFFF
    else:
        norm = _sums_after(levels, levels, rows, groups)
        scale = quotient(quotient(inner, norm), tl.zeros([16], tl.float32) + gain)
        word16 = tl.full([16], 0x8000, tl.uint32)
    scale = tl.where(coded, scale * inverse_unit(to_unit), 0.0)
    bits = bf16_scales(scale, word16, exponent)
    store_number(payload + 4 + tile * 32 + 2 * group, bits, None, 2)


@jit
def unrotated_tail(
    packed: tl.tensor,
    tile_key: tl.tensor,
    last: tl.tensor,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
) -> tl.tensor:
    """The levels at packed, transformed back, [h, column]; last: as for `encode_tail`."""
    _, rows, size, factor = last
    first, front = _levels(packed, rows, 0, BITS, LEVELS), _levels(packed, rows, rows - size, BITS, LEVELS)
    return _unrotate(first, front, _second_signs(tile_key + 256), rows, size, factor)
