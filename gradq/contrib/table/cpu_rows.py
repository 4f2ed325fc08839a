"""Rows of the table codecs, for tables of at most 16 levels and processors that look up in a register.

Levels and what else belongs to them stand at addresses, 16 numbers each, filled up with Inf where they are
searched. On other processors `IN_A_REGISTER` is 0 and the functions do nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gradq.codecs.rotated.cpu_hadamard import mix_words
from gradq.kernels.numba_compile import inline
from gradq.kernels.numba_tools import (
    f32_at,
)
from gradq.kernels.vector.ir import HAS_LOOKUP
from gradq.kernels.vector.operations import (
    LANES,
    as_row,
    as_words,
    constant_row,
    constant_words,
    lane_numbers,
    load_bytes,
    load_row,
    lookup,
    select_less,
    store_bytes,
    store_row,
    to_float,
)

__all__ = ["IN_A_REGISTER", "decode_rows", "multiplier_sums", "nearest_rows", "stochastic_rows"]

IN_A_REGISTER = 16 if HAS_LOOKUP else 0  # levels that can be looked up at once

if HAS_LOOKUP:

    @inline
    def _register(at: Any) -> Any:
        """What `lookup` takes of 16 numbers at an address."""
        return load_row(at), load_row(at + 64 - 4 * LANES)

    @inline
    def _counts(q: Any, table_at: Any) -> Any:
        """`_count` for each of a row, of the 16 sorted values at table_at."""
        low, high = _register(table_at)
        count = constant_words(np.uint32(0))
        for step in (8, 4, 2, 1):
            probe = lookup(low, high, count + constant_words(np.uint32(step - 1)))
            more = count + constant_words(np.uint32(step))
            count = as_words(select_less(q, probe, as_row(count), as_row(more)))
        return count

    @inline
    def nearest_rows(value_at: Any, factors: Any, codes_at: Any, middles_at: Any, L: Any) -> Any:
        """Codes of whole rows of values, times both factors; how many there were."""
        done = L // LANES * LANES
        first, second = constant_row(factors[0]), constant_row(factors[1])
        for j in range(0, done, LANES):
            q = load_row(value_at + 4 * j) * first * second
            store_bytes(codes_at + j, _counts(q, middles_at))
        return done

    @inline
    def _neighbours(q: Any, dither: Any, tables_at: Any) -> Any:
        """Codes of one of the two neighbours of each of a row."""
        levels_at, inner_at, gaps_at = tables_at
        low_levels, high_levels = _register(levels_at)
        low_gaps, high_gaps = _register(gaps_at)
        d = dither & constant_words(np.uint32(0xFFFF))
        u = to_float(d) * constant_row(np.float32(2.0**-16)) + constant_row(np.float32(2.0**-17))
        code = _counts(q, inner_at)
        level, gap = lookup(low_levels, high_levels, code), lookup(low_gaps, high_gaps, code)
        above = as_row(code + constant_words(np.uint32(1)))
        return as_words(select_less(u, (q - level) * gap, above, as_row(code)))

    @inline
    def stochastic_rows(
        value_at: Any, inverse: Any, codes_at: Any, tables_at: Any, dither: Any, P: Any
    ) -> Any:
        """Codes of a block, if it has whole rows; whether it had. See `_neighbours` for the tables."""
        key, shift = constant_words(dither[0]), constant_words(dither[1])
        by, half, low = constant_row(inverse), P // 2, constant_words(np.uint32(0xFFFF))
        if half % LANES == 0:
            for j in range(0, half, LANES):
                word = mix_words(lane_numbers(np.uint32(j)) + key)
                q, high_q = load_row(value_at + 4 * j) * by, load_row(value_at + 4 * (j + half)) * by
                d, high_d = (word & low) + shift, (word >> constant_words(np.uint32(16))) + shift
                store_bytes(codes_at + j, _neighbours(q, d, tables_at))
                store_bytes(codes_at + j + half, _neighbours(high_q, high_d, tables_at))
            return True
        if P % LANES == 0:  # halves meet in a row
            none, all_bits = constant_words(np.uint32(0)), constant_words(np.uint32(0xFFFFFFFF))
            first = constant_row(np.float32(half))
            for j in range(0, P, LANES):
                number = lane_numbers(np.uint32(j))
                is_high = as_words(select_less(to_float(number), first, as_row(none), as_row(all_bits)))
                word = mix_words(number + key + (is_high & constant_words(np.uint32(-half))))
                d = ((word >> (is_high & constant_words(np.uint32(16)))) & low) + shift
                store_bytes(codes_at + j, _neighbours(load_row(value_at + 4 * j) * by, d, tables_at))
            return True
        return False

    @inline
    def multiplier_sums(
        value_at: Any, inverses: Any, levels_at: Any, middles_at: Any, sums_at: Any, L: Any
    ) -> None:
        """<c, y> and the squared norm of c for each of the stretches at sums_at, which they replace.

        Values of one block, or those of two, of which the second has the upper half of the lanes.
        """
        stretch, middle = load_row(sums_at), constant_row(np.float32(7.5))
        low, high = _register(levels_at)
        inner = norm = constant_row(np.float32(0))
        number = to_float(lane_numbers(np.uint32(0)))
        by = select_less(number, middle, constant_row(inverses[0]), constant_row(inverses[1]))
        first, second = f32_at(value_at[0], L), f32_at(value_at[1], L)
        for j in range(L):
            y = select_less(number, middle, constant_row(first[j]), constant_row(second[j])) * by
            c = lookup(low, high, _counts(y * stretch, middles_at))
            inner, norm = inner + c * y, norm + c * c
        store_row(sums_at, inner)
        store_row(sums_at + 4 * LANES, norm)

    @inline
    def decode_rows(codes_at: Any, scale: Any, levels_at: Any, sum_at: Any, first: Any, L: Any) -> Any:
        """Whole rows of codes to values, or added to them; how many there were."""
        done, by = L // LANES * LANES, constant_row(scale)
        low, high = _register(levels_at)
        for j in range(0, done, LANES):
            value = lookup(low, high, load_bytes(codes_at + j)) * by
            store_row(sum_at + 4 * j, value if first else load_row(sum_at + 4 * j) + value)
        return done

else:

    @inline
    def nearest_rows(value_at: Any, factors: Any, codes_at: Any, middles_at: Any, L: Any) -> Any:
        """No rows."""
        return 0

    @inline
    def stochastic_rows(
        value_at: Any, inverse: Any, codes_at: Any, tables_at: Any, dither: Any, P: Any
    ) -> Any:
        """No rows."""
        return False

    @inline
    def multiplier_sums(
        value_at: Any, inverses: Any, levels_at: Any, middles_at: Any, sums_at: Any, L: Any
    ) -> None:
        """Never called."""
        return

    @inline
    def decode_rows(codes_at: Any, scale: Any, levels_at: Any, sum_at: Any, first: Any, L: Any) -> Any:
        """No rows."""
        return 0
