"""The rotated kernels, with and without a trellis: Numba equals the reference; errors are those promised."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from gradq import codecs
from gradq.codecs.rotated import cpu as cpu_rotated
from gradq.codecs.rotated import reference as reference_rotated
from gradq.codecs.rotated.format import POLYNOMIALS, RotatedFormat, mix32
from gradq.errors import ConfigError
from gradq.kernels import reference_tools
from gradq.rng import EncodeContext

SIZES = (1, 15, 16, 17, 255, 257, 1000, 4095, 4096, 4097, 9001)


def same(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def awkward(n, kind):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    if kind == "wide":
        return x * torch.logspace(-6, 3, n)
    if kind == "tiny":
        return x * 1e-37
    if kind == "huge":
        return x * 1e37
    if kind == "inf":
        x[n // 2] = math.inf
    if kind == "sparse":
        x[torch.arange(n) % 64 != 0] = 0.0
    return x


def both(n, kind, num_bits, trellis, unbiased, other=cpu_rotated, device="cpu"):
    """(payload, residual, decoded) by backend."""
    form, context = RotatedFormat(num_bits, trellis, unbiased), EncodeContext(key=1, shift=7, loss_scale=3.0)
    x, old = awkward(n, kind), 0.1 * awkward(n, "ordinary").flip(0)
    results = []
    for kernels, place in ((reference_rotated, "cpu"), (other, device)):
        x, old = x.to(place), old.to(place)
        payload = torch.zeros(form.nbytes(n), dtype=torch.uint8, device=place)
        new, out = torch.empty(n, device=place), torch.empty(n, device=place)
        kernels.encode(x, payload, form, context, old, new)
        kernels.decode(payload, out, form)
        results.append((payload.cpu(), new.cpu(), out.cpu()))
    return results


@pytest.mark.parametrize("kind", ["ordinary", "wide", "tiny", "huge", "inf", "sparse"])
@pytest.mark.parametrize(
    ("num_bits", "trellis"), [*((b, False) for b in range(1, 7)), *((b, True) for b in (1, 4))]
)
def test_numba_equals_the_reference(kind, num_bits, trellis):
    sizes = SIZES if kind in ("ordinary", "wide") and num_bits == 4 else (17, 1000, 4097)
    for n in sizes:
        unbiased = (n + num_bits) % 2 == 0
        one, other = both(n, kind, num_bits, trellis, unbiased)
        assert torch.equal(one[0], other[0]), n
        assert same(one[1], other[1]), n
        assert same(one[2], other[2]), n


# least error of Lloyd and Max for a standard normal (Max, 1960)
LLOYD_MAX = {1: 0.36338, 2: 0.11748, 3: 0.03455, 4: 0.009501, 5: 0.002505, 6: 0.000644}


@pytest.mark.parametrize("num_bits", LLOYD_MAX)
def test_error_is_that_of_lloyd_and_max(num_bits):
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
    for scale, least in (("mse", LLOYD_MAX[num_bits]), ("unbiased", 1 / (1 / LLOYD_MAX[num_bits] - 1))):
        out = codecs.from_spec(f"rot{num_bits}(scale={scale},levels=scalar)").roundtrip(x)
        error = float((x - out).square().sum() / x.square().sum())
        assert error < least * (1.06 if num_bits == 6 else 1.012)


@pytest.mark.parametrize("num_bits", [1, 2, 3, 4])
def test_trellis_beats_rotated_at_equal_bits(num_bits):
    x = torch.randn(1 << 17, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 1 << 17)
    error = {}
    for kind in ("scalar", "trellis"):
        codec = codecs.from_spec(f"rot{num_bits}(levels={kind})")
        error[kind] = float((x - codec.roundtrip(x)).square().sum())
        assert codec.nbytes(1 << 17) == codecs.from_spec(f"rot{num_bits}").nbytes(1 << 17)
    assert error["trellis"] < (0.85 if num_bits == 1 else 0.78) * error["scalar"]


def test_targets_of_the_flagship():
    x = torch.distributions.Laplace(0.0, 1.0).sample((1 << 18,))
    for spec, bits, target in (("rot4", 4.07, 0.0098), ("rot2", 2.07, 0.125), ("rot2", 2.07, 0.1)):
        codec = codecs.from_spec(spec)
        assert codec.wire_bits_per_element(1 << 18) <= bits
        assert float((x - codec.roundtrip(x)).square().sum() / x.square().sum()) <= target


def test_polynomials_stay_inside_the_codes():
    for num_bits, p in POLYNOMIALS.items():
        y = torch.linspace(-p.top, p.top, 10001)
        u = y * sum(k * y ** (2 * j) for j, k in enumerate(p.to_index))
        assert bool((u.diff() > 0).all())
        assert float(u[-1]) < 1 << (num_bits - 1)


def test_every_rank_rotates_in_its_own_way():
    x, codec = torch.randn(5000), codecs.from_spec("rot2(scale=mse)")
    outs = [codec.roundtrip(x, rank=rank, world_size=4) for rank in range(4)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(outs, 2))


def test_rotation_spreads_a_spike():
    x = torch.full((4096,), 1e-3)
    x[1234] = 1.0
    out = codecs.from_spec("rot4").roundtrip(x)
    assert float((x - out).square().sum() / x.square().sum()) < 0.02


def test_mix32_is_that_of_the_rng():
    value = torch.tensor(0x12345678)
    assert int(reference_tools.mix32(value)) == mix32(0x12345678)


@pytest.mark.parametrize("spec", ["rot5(levels=trellis)", "rot4(scale=none)", "rot4(levels=none)", "rot7"])
def test_what_cannot_be_is_an_error(spec):
    with pytest.raises(ConfigError):
        codecs.from_spec(spec)
