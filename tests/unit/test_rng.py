"""Random bits are a pure function; the values here are frozen: changing them changes every run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradq import rng
from gradq.kernels.reference_tools import dither, mix32

words = st.integers(0, (1 << 64) - 1)


def test_name_id_is_frozen():
    assert rng.name_id("") == int.from_bytes(bytes.fromhex("e4a6a0577479b2b4"), "little")
    assert rng.name_id("blocks.0.attn.qkv.weight") == 0xB165D8DE48D01DDB


def test_splitmix64_is_the_published_one():
    # the first outputs of SplitMix64 seeded with 0 (Steele et al.; java.util.SplittableRandom)
    golden = 0x9E3779B97F4A7C15
    outputs = [rng._splitmix64((i * golden) & rng._MASK64) for i in range(3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize(
    ("seed", "step", "parameter", "phase", "key"),
    [
        (0, 0, 0, 1, 0x2A4F111B3BE57715),
        (0, 0, 0, 2, 0x4F833D459789AC77),
        (1, 0, 0, 1, 0x3FA25E1657E024C1),
        (-1, 0, 0, 1, 0xA2C6454204224428),
        (1234, 99, 0x0123456789ABCDEF, 2, 0x45C628D055BCE77),
    ],
)
def test_dither_key_is_frozen(seed, step, parameter, phase, key):
    assert rng.dither_key(seed, step, parameter, phase) == key


@given(words, words, words, st.sampled_from([1, 2]))
def test_keys_fit_in_64_bits_and_differ_with_every_argument(seed, step, parameter, phase):
    key = rng.dither_key(seed, step, parameter, phase)
    assert 0 <= key < 1 << 64
    others = {
        rng.dither_key(seed ^ 1, step, parameter, phase),
        rng.dither_key(seed, step ^ 1, parameter, phase),
        rng.dither_key(seed, step, parameter ^ 1, phase),
        rng.dither_key(seed, step, parameter, 3 - phase),
    }
    assert key not in others
    assert len(others) == 4


def test_exchanged_arguments_give_another_key():
    assert len({rng.dither_key(*order) for order in [(1, 2, 3, 1), (2, 1, 3, 1), (3, 2, 1, 1)]}) == 3


@pytest.mark.parametrize(
    ("world_size", "shifts"),
    [(1, [0]), (2, [0, 32768]), (3, [0, 21845, 43690]), (4, [0, 16384, 32768, 49152])],
)
def test_shifts_divide_the_range_evenly(world_size, shifts):
    assert [rng.dither_shift(rank, world_size) for rank in range(world_size)] == shifts


@given(st.integers(1, 70_000), st.data())
def test_shifts_stay_in_16_bits(world_size, data):
    rank = data.draw(st.integers(0, world_size - 1))
    assert 0 <= rng.dither_shift(rank, world_size) < 1 << 16


def test_lowbias32_is_the_published_one():
    got = [int(mix32(torch.tensor(value))) for value in (0, 1, 2, 0xFFFFFFFF)]
    assert got == [0, 0x688990C0, 0xD1132181, 0x6768824A]


def test_dithers_are_frozen():
    key = rng.dither_key(1, 2, 3, 1)
    assert dither(key, torch.tensor(5), 100, 16).int().tolist() == [
        *(30323, 26719, 44289, 39903, 21570, 13862, 24451, 9803),
        *(58677, 8409, 58382, 17453, 470, 30886, 59354, 25763),
    ]


def test_dithers_are_even_over_their_range():
    dithers = torch.cat(
        [dither(rng.dither_key(7, 0, 0, 1), torch.tensor(block), 0, 1024) for block in range(64)]
    )
    counts = torch.histc(dithers, 64, 0, 65536)
    # chi-squared with 63 degrees of freedom: above 150 once in 10**8
    assert ((counts - 1024) ** 2 / 1024).sum() < 150


def test_context_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        rng.EncodeContext(key=1).key = 2
