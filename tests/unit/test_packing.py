"""Residuals packed into flats: nothing is lost, nothing twice, and damage shows."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from gradq.checkpoint.packing import digest, flats, pack


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 60))
def test_pieces_hold_every_element_once(numels: list[int], most: int) -> None:
    values, start = {}, 0
    for number, numel in enumerate(numels):
        values[str(number)] = torch.arange(start, start + numel, dtype=torch.float32)
        start += numel
    packed = pack({name: value.numel() for name, value in values.items()}, most)
    assert len(packed) == -(-start // most), "more flats than needed"
    whole = torch.cat([torch.empty(0), *flats(packed, values)])
    assert torch.equal(whole, torch.arange(start, dtype=torch.float32))
    pieces = [piece for flat in packed for piece in flat]
    assert [piece.number for piece in pieces] == list(range(len(pieces)))
    for flat, rows in zip(packed, flats(packed, values), strict=True):
        for piece in flat:
            want = values[piece.name][piece.begin : piece.begin + piece.length]
            assert torch.equal(rows[piece.start : piece.start + piece.length], want)


def test_what_is_missing_or_short_is_zeros() -> None:
    packed = pack({"a": 3, "b": 4}, 100)
    (flat,) = flats(packed, {"b": torch.ones(2)})
    assert flat.tolist() == [0, 0, 0, 1, 1, 0, 0]


@given(st.integers(0, 999), st.integers(0, 31))
def test_one_flipped_bit_changes_the_digest(element: int, bit: int) -> None:
    value = torch.linspace(-1, 1, 1000)
    before = digest(value)
    value.view(torch.int32)[element] ^= (1 << bit) if bit < 31 else -(1 << 31)
    assert digest(value) != before
