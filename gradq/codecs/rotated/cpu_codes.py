"""From a rotated tile to its codes and from codes to levels, in Numba: by the trellis or each by itself.

Full tiles, all but the last of a segment, take the fused passes of `cpu_tile`, others the rows of `cpu_rows`.
"""

from __future__ import annotations

import functools
from typing import Any

from gradq.codecs.rotated.cpu_hadamard import high_stages
from gradq.codecs.rotated.cpu_rows import (
    CHOICES,
    CODES,
    INVERSE,
    NORMS,
    POSITIONS,
    SUMS,
    TABLES,
    levels_of_rows_of,
    quantize_rows_of,
    quantizer_of,
)
from gradq.codecs.rotated.cpu_tile import levels_of_tile_of, quantize_tile_of
from gradq.codecs.rotated.cpu_trellis import store_trellis, trellis_encode, trellis_levels
from gradq.kernels.numba_compile import called, inline_optimized
from gradq.kernels.numba_packing import packing
from gradq.kernels.vector.operations import LANES, load_row, store_row

__all__ = ["coding_of", "decoding_of", "store_tables", "tile_packing", "variant_name"]


def variant_name(num_bits: int, trellis: bool) -> str:
    """What tells the kernels of two formats apart on disk."""
    return f"{num_bits}-{'trellis' if trellis else 'scalar'}"


@functools.cache
def tile_packing(num_bits: int, trellis: bool) -> tuple[Any, Any]:
    """Functions (at, packed_at, rows) between the codes of a tile and their bytes: to these, and from them.

    Of a full tile of 4 bits without the trellis the kernels read and write codes as the wire has them.
    """
    as_on_wire = num_bits == 4 and not trellis
    pack, unpack = packing(num_bits, 0)

    @called
    def pack_tile(at: int, packed_at: int, rows: int) -> None:
        if not (as_on_wire and rows == 256):
            pack(at + CODES, packed_at, 16 * rows)

    @called
    def unpack_tile(at: int, packed_at: int, rows: int) -> None:
        if not (as_on_wire and rows == 256):
            unpack(packed_at, at + CODES, 16 * rows)

    return pack_tile, unpack_tile


@called
def store_tables(at: int, num_bits: int) -> None:
    """What the trellis looks up, to scratch; after `store_quantizer`."""
    store_trellis(at + TABLES, quantizer_of(at)[7], num_bits)


@functools.cache
def coding_of(num_bits: int, trellis: bool) -> Any:
    """A function that makes codes of a transformed tile: see `quantize_rows` and `quantize_tile`."""
    if trellis:

        @called
        def trellis_codes(
            at: int, _codes_at: int, rows: int, _with_residual: bool, _next_at: int, _next_residual_at: int
        ) -> None:
            """Through the trellis; of a full tile with the high stages before and after."""
            if rows == 256:
                high_stages(at, 256)
            quantizer = quantizer_of(at)
            for part in range(0, 16, LANES):
                z_at, sums_at, inverse = (
                    at + 4 * part,
                    at + SUMS + 4 * part,
                    load_row(at + INVERSE + 4 * part),
                )
                codes_at, kept_at = (
                    at + CODES + part,
                    (at + CHOICES + part, at + POSITIONS + 4 * part, at + TABLES),
                )
                i, n = trellis_encode(z_at, codes_at, rows, num_bits, quantizer, inverse, kept_at)
                for k, inner, norm in (
                    (0, i[0], n[0]),
                    (64, i[1], n[1]),
                    (128, i[2], n[2]),
                    (192, i[3], n[3]),
                ):
                    store_row(sums_at + k, inner)
                    store_row(sums_at + NORMS - SUMS + k, norm)
            if rows == 256:
                high_stages(at, 256)

        return trellis_codes

    quantize_rows, quantize_tile = quantize_rows_of(num_bits), quantize_tile_of(num_bits)

    @inline_optimized
    def codes(
        at: Any, codes_at: Any, rows: Any, with_residual: Any, next_at: Any, next_residual_at: Any
    ) -> None:
        if rows == 256:
            quantize_tile(at, codes_at, with_residual, next_at, next_residual_at)
        else:
            quantize_rows(at, rows)

    return codes


@functools.cache
def decoding_of(num_bits: int, trellis: bool) -> Any:
    """A function from a tile's codes to its levels; of a full one transformed at distances 16 to 128."""
    unpack_tile = tile_packing(num_bits, trellis)[1]
    if trellis:

        @called
        def trellis_levels_of(at: int, packed_at: int, rows: int) -> None:
            unpack_tile(at, packed_at, rows)
            to_level = quantizer_of(at)[7]
            for part in range(0, 16, LANES):
                trellis_levels(at + CODES + part, at + 4 * part, rows, to_level, at + TABLES)
            if rows == 256:
                high_stages(at, 256)

        return trellis_levels_of

    levels_of_rows, levels_of_tile = levels_of_rows_of(num_bits), levels_of_tile_of(num_bits)

    @inline_optimized
    def levels(at: Any, packed_at: Any, rows: Any) -> None:
        unpack_tile(at, packed_at, rows)
        if rows == 256:
            levels_of_tile(at, packed_at)
        else:
            levels_of_rows(at, rows)

    return levels
