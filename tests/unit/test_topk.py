"""The top-k kernels: Numba equals the reference byte for byte; what is kept; what odd bytes may not do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradq.codecs import TopKCodec, from_spec
from gradq.codecs.topk import cpu as cpu_topk
from gradq.codecs.topk import reference as reference_topk
from gradq.codecs.topk.format import TopKFormat
from gradq.errors import ConfigError
from gradq.rng import EncodeContext


def both(x, topk, residual=None, loss_scale=1.0):
    """Payload, decoded and new residual, by both kernels, and equal."""
    outcomes = []
    for kernels in (cpu_topk, reference_topk):
        payload = torch.full((topk.nbytes(x.numel()),), 0xA5, dtype=torch.uint8)
        out = torch.empty_like(x)
        new = None if residual is None else torch.empty_like(x)
        kernels.encode(x, payload, topk, EncodeContext(key=0, loss_scale=loss_scale), residual, new)
        kernels.decode(payload, out, topk)
        outcomes.append((payload, out.nan_to_num(7e7), torch.empty(0) if new is None else new))
    for ours, truth in zip(*outcomes, strict=True):
        assert torch.equal(ours, truth)
    return outcomes[0]


def values(kind: str, numel: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator)
    if kind == "ties":
        return x.sign() * torch.randint(0, 3, (numel,), generator=generator)
    if kind == "all equal":
        return torch.full((numel,), -2.5)
    if kind == "few":
        return torch.where(torch.rand(numel, generator=generator) < 0.01, x, 0.0)
    if kind == "heavy tails":
        return x * (8 * torch.randn(numel, generator=generator)).exp()
    if kind == "denormals":
        return x * 1e-40
    if kind == "a NaN":
        x[numel // 2] = math.nan
    return x


KINDS = ["normal", "ties", "all equal", "few", "heavy tails", "denormals", "a NaN"]


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    numel=st.integers(1, 1200),
    percent=st.sampled_from([0.01, 0.4, 1.0, 7.0, 100 / 3, 50.0]),
    num_bits=st.integers(2, 8),
    power=st.integers(8, 10),
    seed=st.integers(0, 99),
)
def test_numba_equals_the_reference(kind, numel, percent, num_bits, power, seed):
    both(
        values(kind, numel, seed),
        TopKFormat(percent, num_bits, 1 << power),
        residual=1e-2 * values("normal", numel, seed + 1),
        loss_scale=4.0,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_numba_equals_the_reference_at_the_usual_block_size(kind):
    both(values(kind, 2 * 4096 + 777, 3), TopKFormat(1.0, 4, 4096), residual=torch.zeros(2 * 4096 + 777))


def test_the_largest_are_kept_and_the_rest_waits():
    x = values("heavy tails", 4096, 0)
    residual = torch.zeros(4096)
    _, out, new = both(x, TopKFormat(1.0, 8, 4096), residual)
    chosen = x.abs().topk(41).indices
    assert set(out.nonzero()[:, 0].tolist()) <= set(chosen.tolist())
    rest = torch.ones(4096, dtype=torch.bool)
    rest[chosen] = False
    assert torch.equal(new[rest], x[rest])
    assert (x - out)[chosen].abs().max() <= x.abs().max() / 127 / 2 * 1.01


def test_of_equal_magnitudes_the_first_are_kept():
    x = torch.ones(256)
    x[1::2] *= -1
    x[200] = 3.0
    _, out, _ = both(x, TopKFormat(2.0, 4, 256))  # 6 of them
    assert out.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 200]


def test_indices_at_both_ends():
    x = torch.zeros(4096)
    x[[0, 1, 4094, 4095]] = torch.tensor([7.0, -7.0, 7.0, -7.0])  # the scale is 1
    for percent in (0.08, 1.0, 50.0):
        assert torch.equal(both(x, TopKFormat(percent, 4, 4096))[1], x)


@settings(deadline=None)  # the first call compiles
@given(data=st.binary(min_size=600, max_size=600), num_bits=st.integers(2, 8))
def test_whatever_bytes_arrive_nothing_else_is_written(data, num_bits):
    """A message of the right size but with wrong contents decodes to something, inside `out`."""
    topk = TopKFormat(10.0, num_bits, 512)
    numel = 1000
    payload = torch.frombuffer(bytearray(data), dtype=torch.uint8)[: topk.nbytes(numel)]
    payload[1::2][:2] &= 0x7F  # positive scales
    held = torch.full((numel + 128,), 5.0)
    cpu_topk.decode(payload.clone(), held[64 : 64 + numel], topk)
    assert (held[:64] == 5.0).all()
    assert (held[64 + numel :] == 5.0).all()


@given(st.integers(1, 70000), st.sampled_from([0.01, 0.1, 1.0, 3.0, 10.0, 50.0]))
def test_an_index_takes_at_most_three_bits_more_than_its_low_part(length, percent):
    block = TopKFormat(percent, 4, 1 << 17).block(length)
    assert 1 <= block.kept <= length
    assert block.kept >= length * percent / 100 - 1e-3
    assert 1 << block.low_bits <= length / block.kept < 2 << block.low_bits
    unary = block.kept + ((length - 1) >> block.low_bits)
    assert unary <= 3 * block.kept
    assert block.high_bytes == math.ceil(unary / 8)


@settings(deadline=None)
@given(
    kind=st.sampled_from(["normal", "ties", "all equal", "few", "heavy tails"]),
    numel=st.integers(1, 3000),
    num_bits=st.integers(2, 8),
    seed=st.integers(0, 99),
)
def test_contractive(kind, numel, num_bits, seed):
    """The error is less than the whole by most of the largest element of every block."""
    codec = TopKCodec(percent=1.0, num_bits=num_bits, block_size=256)
    x = values(kind, numel, seed).double().float()
    out = codec.roundtrip(x)
    for start in range(0, numel, 256):
        own, got = x[start : start + 256].double(), out[start : start + 256].double()
        largest = float(own.abs().max())
        gain = float(own.square().sum() - (own - got).square().sum())
        assert gain >= 0.7 * largest * largest


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("topk(percent=0)", r"percent=0.0\).*0.01 and 50"),
        ("topk(percent=51)", "0.01 and 50"),
        ("topk(percent=nan)", "0.01 and 50"),
        ("topk(num_bits=1)", "2 to 8"),
        ("topk(num_bits=9)", "2 to 8"),
        ("topk(block_size=1000)", "256, 512"),
        ("topk(block_size=131072)", "65536"),
    ],
)
def test_options_out_of_range(spec, message):
    with pytest.raises(ConfigError, match=message):
        from_spec(spec)


def test_sizes_on_the_wire():
    codec = from_spec("topk")
    assert codec.nbytes(4096) == 2 + 48 * 4 // 8 + 13 + 31  # scale, 41 codes and 7, 104 bits, 41 * 6 bits
    assert codec.nbytes(1) == 2 + 4 + 1  # one code and 7, one bit
    assert codec.nbytes(4097) == codec.nbytes(4096) + codec.nbytes(1)
    assert 0.13 < codec.wire_bits_per_element(1 << 22) < 0.14
