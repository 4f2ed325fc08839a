"""The table codecs: what they promise at ties, for odd bytes and for tensors that they do not take.

Their bytes are held by the frozen ones of test_wire_fixtures.py, their errors by the contract.
"""

from __future__ import annotations

import math

import pytest
import torch

from gradq import codecs
from gradq.contrib import TABLE_NAMES, TableCodec
from gradq.errors import ConfigError, KernelError
from gradq.rng import EncodeContext

EVEN = ("nf4", "lloyd2", "lloyd3", "lloyd4", "sign")  # every code is a level
NEAREST = [name for name in TABLE_NAMES if not name.startswith("qsgd")]


def levels_of(codec: TableCodec) -> torch.Tensor:
    return torch.tensor(codec._table(torch.device("cpu")).levels)


@pytest.mark.parametrize("name", [name for name in NEAREST if name.startswith(("fp8", "mxfp4", "nvfp4"))])
def test_levels_come_back_as_they_were_and_ties_go_up(name: str) -> None:
    """Where the largest level is in the block its scale is 1, and what is a level is not changed."""
    codec = TableCodec(format=name, rounding="nearest")
    levels = levels_of(codec)
    middles = (levels[1:] + levels[:-1]) / 2
    top = levels[-1]
    scale = 1.0 if float(top).hex().startswith("0x1.0") else codec.roundtrip(top.reshape(1))[0] / top
    for x, expected in ((levels, levels), (middles, levels[1:])):
        for start in range(0, len(x), codec.block_size - 1):
            part = x[start : start + codec.block_size - 1]
            out = codec.roundtrip(torch.cat((top.reshape(1), part * scale)))[1:]
            assert torch.equal(out, expected[start : start + codec.block_size - 1] * scale)


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_blocks_do_not_notice_each_other(name: str) -> None:
    """Zeros, tiny, NaN and Inf blocks beside usual ones, and a short last one."""
    codec = TableCodec(format=name)
    x = torch.randn(7, codec.block_size, generator=torch.Generator().manual_seed(1))
    x *= torch.tensor([0.0, 1e-38, 1e-41, 1.0, 1e3, 1e-3, 1.0])[:, None]
    clean = codec.roundtrip(x)
    assert clean.isfinite().all()
    x[2, 3], x[4, 5] = math.nan, math.inf
    x[6, 13:] = 0
    out = codec.roundtrip(x.flatten()[: 6 * codec.block_size + 13])[: 6 * codec.block_size].view(6, -1)
    assert out[[2, 4]].isnan().all()
    assert torch.equal(out[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


@pytest.mark.parametrize("name", [name for name in TABLE_NAMES if name not in EVEN])
@pytest.mark.parametrize("numel", [5, 300])
def test_a_code_that_stands_for_no_level_decodes_to_nothing_finite(name: str, numel: int) -> None:
    codec = TableCodec(format=name)
    payload = torch.zeros(codec.nbytes(numel), dtype=torch.uint8)
    codec.encode(torch.ones(numel), payload, context=EncodeContext(key=0))
    payload[codec._table(torch.device("cpu")).scale_bytes(numel) :] = 0xFF
    out = torch.empty(numel)
    codec.decode(payload, out)
    assert not out.isfinite().any()


def test_memory_that_does_not_fit_is_refused() -> None:
    codec, x = codecs.from_spec("nf4"), torch.randn(1000)
    payload = torch.zeros(codec.nbytes(1000), dtype=torch.uint8)
    codec.encode(x, payload, context=EncodeContext(key=1))
    with pytest.raises(RuntimeError):
        codec.encode(x, payload[:-1], context=EncodeContext(key=1))
    with pytest.raises(RuntimeError):
        codec.decode(payload[: len(payload) // 2], torch.empty(1000))


def test_only_cpu_tensors_are_taken() -> None:
    codec, x = codecs.from_spec("nf4"), torch.empty(64, device="meta")
    with pytest.raises(KernelError, match="no kernels for meta tensors"):
        codec.encode(x, torch.empty(99, device="meta"), context=EncodeContext(key=1))


def test_a_rounding_that_a_format_does_not_have_is_an_error() -> None:
    with pytest.raises(ConfigError, match="sign does not round so"):
        codecs.from_spec("sign(rounding=stochastic)")
