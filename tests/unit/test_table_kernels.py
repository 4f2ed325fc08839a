"""The table codecs' Numba kernels against the reference where methods differ: at ties, in mixed groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gradq.contrib import TableCodec
from gradq.contrib.table import cpu as cpu_table
from gradq.contrib.table import reference as reference_table
from gradq.contrib.table.codec import TABLE_NAMES, _table
from gradq.contrib.table.cpu_float_levels import mantissa_bits
from gradq.contrib.table.format import Table, payload_bytes

ROUNDINGS = {"sign": ("nearest",), "qsgd4": ("stochastic",), "qsgd8": ("stochastic",)}
CASES = [(name, how) for name in TABLE_NAMES for how in ROUNDINGS.get(name, ("stochastic", "nearest"))]


def assert_equal(x: Tensor, table: Table, residual: Tensor | None = None) -> None:
    """Payload, decoded values, their mean with others and the new residual, of both kernels."""
    outcomes = []
    for kernels in (cpu_table, reference_table):
        payload = torch.full((payload_bytes(x.numel(), table),), 0xA5, dtype=torch.uint8)
        out, mean, new = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        kernels.table_encode(
            x,
            payload,
            table=table,
            key=0x1234_5678_9ABC_DEF1,
            shift=0xF00F,
            first_block=7,
            residual=residual,
            new_residual=None if residual is None else new,
            loss_scale=1.0,
        )
        kernels.table_decode(payload, out, table=table)
        kernels.table_decode_mean(payload.expand(3, -1), mean, table=table)
        outcomes.append((payload, out, mean, out if residual is None else new))
    for ours, truth in zip(*outcomes, strict=True):
        assert torch.equal(ours.float().nan_to_num(7e7), truth.float().nan_to_num(7e7))


def at_ties(table: Table) -> Tensor:
    """Levels, midpoints and their neighbours, in blocks of which most have the scale 1."""
    levels, middles, _, _ = reference_table.constants(table)
    exact = torch.cat([levels, middles, torch.tensor([0.0, -0.0, 1e-40, -1e-40, 2.0**-30, 0.49999997])])
    far = torch.tensor(9e9)
    values = torch.cat([exact, torch.nextafter(exact, far), torch.nextafter(exact, -far)])
    others = table.block_size - 1
    values = values.clamp(-levels[-1], levels[-1]).repeat(others)  # a whole number of blocks
    blocks = values[: max(3 * exact.numel() // others + 1, 2) * others].view(-1, others)
    whole = torch.cat([levels[-1].expand(len(blocks), 1), blocks], dim=1).flatten()
    return torch.cat([whole, levels[-1:], exact[len(levels) :][-13:]])  # and a block of no whole row


@pytest.mark.parametrize(("name", "rounding"), CASES)
def test_ties_go_where_a_search_puts_them(name: str, rounding: str) -> None:
    table = _table(name, rounding == "stochastic")
    x = at_ties(table)
    assert_equal(x, table)
    assert_equal(x.flip(0), table, residual=torch.zeros_like(x))


@pytest.mark.parametrize(("name", "rounding"), CASES)
@pytest.mark.parametrize("more", [0, 1, 23])
def test_blocks_of_every_kind_in_one_group(name: str, rounding: str, more: int) -> None:
    """Zeros, tiny, NaN, Inf and huge blocks beside usual ones, whose steps go side by side."""
    table = _table(name, rounding == "stochastic")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6 * table.block_size + more, generator=generator)
    kinds = [0.0, math.nan, 1e-38, 1e-41, math.inf, 1.0, 3e38, 1.0, 1e20]
    for block in range(6):
        here = x[block * table.block_size + block % 3 :][: table.block_size - 3]
        here *= kinds[(block + more) % len(kinds)]
    x = x.clamp(-3.4e38, 3.4e38) if more else x
    assert_equal(x, table)
    assert_equal(x, table, residual=0.1 * torch.randn(x.shape, generator=generator))


@pytest.mark.parametrize("name", [name for name in TABLE_NAMES if len(_table(name, True).levels) & 1])
@pytest.mark.parametrize("numel", [5, 300])
def test_a_code_that_stands_for_no_level_decodes_to_nothing_finite(name: str, numel: int) -> None:
    table = _table(name, True)
    payload = torch.zeros(payload_bytes(numel, table), dtype=torch.uint8)
    reference_table.table_encode(
        torch.ones(numel),
        payload,
        table=table,
        key=0,
        shift=0,
        first_block=0,
        residual=None,
        new_residual=None,
        loss_scale=1.0,
    )
    payload[-(-(-numel // 8) * table.num_bits) :] = 0xFF  # all codes, not the scales
    out = torch.empty(numel)
    cpu_table.table_decode(payload, out, table=table)
    assert not out.isfinite().any()


def test_which_levels_are_floats() -> None:
    found = {
        name: mantissa_bits(_table(name, "nearest" not in ROUNDINGS.get(name, ())).levels)
        for name in TABLE_NAMES
    }
    assert {name: bits for name, bits in found.items() if bits} == {
        "fp8_e4m3": 3,
        "fp8_e5m2": 2,
        "mxfp4": 1,
        "nvfp4": 1,
    }
    assert TableCodec(format="fp8_e4m3").block_size == 256
