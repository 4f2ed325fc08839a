"""What the uniform kernels promise, over drawn inputs: error, no bias, non-finite blocks, zeros, the mean.

They run on the Numba kernels; `tests/unit/test_kernels.py` holds these to the reference byte for byte.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradq.codecs.uniform import cpu
from gradq.codecs.uniform.format import UniformFormat
from gradq.rng import EncodeContext, dither_key, dither_shift

# |mean of errors| stays below Z standard deviations with probability 1 - 1e-6 (two-sided normal). The drawn
# keys are fixed by the tests, so a pass stays a pass.
Z = 4.892

SCALES = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}  # and how much a scale rounds up

# Each pair has kernels of its own, which take seconds to compile: here are the types that differ in what they
# can hold, and numbers of bits that are packed differently. `tests/unit/test_kernels.py` compares all 21
# with the reference, byte for byte.
FORMATS = [(2, torch.bfloat16), (3, torch.float16), (4, torch.bfloat16), (8, torch.float32)]
shapes = st.builds(
    lambda form, block_size: {"num_bits": form[0], "block_size": block_size, "scale_dtype": form[1]},
    st.sampled_from(FORMATS),
    st.integers(8, 128).map(lambda k: 8 * k),
)
lengths = st.integers(1, 2100)
seeds = st.integers(0, 2**31 - 1)
magnitudes = st.floats(-18, 18).map(lambda e: 10.0**e)
kernels = settings(max_examples=60, deadline=None)


def payload_for(n: int, num_bits: int, block_size: int, scale_dtype: torch.dtype) -> torch.Tensor:
    blocks = [min(block_size, n - start) for start in range(0, n, block_size)]
    return torch.empty(sum(scale_dtype.itemsize + -(-b // 8) * num_bits for b in blocks), dtype=torch.uint8)


def encode(x, shape, *, stochastic, key=0, shift=0, residual=None, new_residual=None, loss_scale=1.0):
    payload = payload_for(x.numel(), **shape)
    context = EncodeContext(key=key, shift=shift, loss_scale=loss_scale)
    cpu.encode(x, payload, UniformFormat(**shape, stochastic=stochastic), context, residual, new_residual)
    return payload


def decode(payload, n, shape):
    out = torch.empty(n)
    cpu.decode(payload, out, UniformFormat(**shape))
    return out


def roundtrip(x, shape, **how):
    return decode(encode(x, shape, **how), x.numel(), shape)


def normal(n, seed, magnitude=1.0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * magnitude


def scale_per_element(payload, n, shape):
    """The scales on the wire, one for every element."""
    dtype = shape["scale_dtype"]
    num_blocks = -(-n // shape["block_size"])
    scales = payload[: num_blocks * dtype.itemsize].view(dtype).to(torch.float32)
    return scales.repeat_interleave(shape["block_size"])[:n]


# --- error ---------------------------------------------------------------------------------------------


@kernels
@given(shapes, lengths, seeds, magnitudes, st.booleans())
def test_error_is_below_one_step_or_half_a_step(shape, n, seed, magnitude, stochastic):
    x = normal(n, seed, magnitude)
    payload = encode(x, shape, stochastic=stochastic, key=seed)
    scale = scale_per_element(payload, n, shape)
    error = (x - decode(payload, n, shape)).abs()
    valid = scale.isfinite()  # fp16 scales overflow on large values: then the block is NaN
    assert (error[valid] <= scale[valid] * (1 if stochastic else 0.5) * (1 + 1e-4)).all()
    if shape["scale_dtype"] != torch.float16:
        assert valid.all()


@kernels
@given(shapes, lengths, seeds, st.floats(-3, 3))
def test_scale_is_the_least_that_covers_the_block(shape, n, seed, exponent):
    x = normal(n, seed, 10.0**exponent)
    scale = scale_per_element(encode(x, shape, stochastic=False), n, shape)
    qmax = 2 ** (shape["num_bits"] - 1) - 1
    for start in range(0, n, shape["block_size"]):
        block = x[start : start + shape["block_size"]]
        exact = block.abs().max().item() / qmax
        room = SCALES[shape["scale_dtype"]] * exact + 2.0**-24 * (shape["scale_dtype"] == torch.float16)
        assert exact * (1 - 1e-6) <= scale[start].item() <= exact + room


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_stochastic_rounding_is_unbiased(num_bits):
    """Each element's mean over keys, tested at the 1 - 1e-6 level over all elements together (Bonferroni)."""
    shape = {"num_bits": num_bits, "block_size": 256, "scale_dtype": torch.bfloat16}
    n, num_keys = 512, 2000
    x = normal(n, 1)
    payload = encode(x, shape, stochastic=True)
    scale = scale_per_element(payload, n, shape).double()
    total = torch.zeros(n, dtype=torch.float64)
    for step in range(num_keys):
        total += roundtrip(x, shape, stochastic=True, key=dither_key(7, step, 11, 1)) - x
    position = (x.double() / scale).remainder(1)
    deviation = scale * (position * (1 - position) / num_keys).sqrt() + scale * 2.0**-16
    per_element = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - 0.5e-6 / n, dtype=torch.float64))
    assert ((total / num_keys).abs() <= per_element * deviation + scale * 5 / num_keys).all()
    overall = (
        (total / num_keys / scale).mean().abs()
    )  # and the elements' mean, where a common bias would add up
    spread = ((position * (1 - position)).mean() / (n * num_keys)).sqrt()
    assert overall <= Z * spread + 2.0**-17


def test_neighbours_are_rounded_independently():
    """Two elements that share a hash, and two next to each other, have uncorrelated errors."""
    shape = {"num_bits": 4, "block_size": 256, "scale_dtype": torch.float32}
    x = torch.full((256,), 0.5)
    x[-1] = 7.0  # scale 1: every other element is rounded up half of the time
    num_keys = 4000
    errors = torch.stack(
        [roundtrip(x, shape, stochastic=True, key=dither_key(3, step, 5, 1)) - x for step in range(num_keys)]
    )
    signs = errors[:, :-1].double() * 2  # -1 or 1
    for first, second in ((0, 128), (0, 1), (5, 133), (126, 127), (1, 2)):
        correlation = (signs[:, first] * signs[:, second]).mean().abs()
        assert correlation <= Z / math.sqrt(num_keys), (first, second)
    mean_product = (signs[:, :127] * signs[:, 128:]).mean().abs()  # over all pairs that share a hash
    assert mean_product <= Z / math.sqrt(num_keys * 127)


# --- ranks ---------------------------------------------------------------------------------------------


def mean_error(x, shape, world_size, shifts, keys):
    """Mean squared error of the mean of world_size encodings of x, and its mean error."""
    squared, bias = 0.0, 0.0
    for key in keys:
        rows = [encode(x, shape, stochastic=True, key=key(r), shift=shifts[r]) for r in range(world_size)]
        out = torch.empty_like(x)
        cpu.decode_mean(torch.stack(rows), out, UniformFormat(**shape))
        squared += (out - x).double().square().mean().item() / len(keys)
        bias += (out - x).double().mean().item() / len(keys)
    return squared, bias


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_stratified_dither_cuts_the_error_of_the_mean(world_size):
    """Against independent dithers, for ranks with equal values: 1/world as large and more; still unbiased."""
    shape = {"num_bits": 4, "block_size": 256, "scale_dtype": torch.bfloat16}
    x = normal(256 * 40, 2)
    shared = [lambda _rank, s=step: dither_key(1, s, 9, 1) for step in range(10)]
    apart = [lambda rank, s=step: dither_key(1 + rank, s, 9, 1) for step in range(10)]
    stratified, bias = mean_error(
        x, shape, world_size, [dither_shift(r, world_size) for r in range(world_size)], shared
    )
    independent, _ = mean_error(x, shape, world_size, [0] * world_size, apart)
    assert stratified <= independent / world_size * 1.25
    assert abs(bias) <= Z * math.sqrt(stratified / (x.numel() * len(shared)))


@kernels
@given(shapes, lengths, seeds, st.integers(1, 9))
def test_mean_is_the_sequential_fp32_sum_divided_once(shape, n, seed, world_size):
    rows = [encode(normal(n, seed + r), shape, stochastic=True, key=seed + r) for r in range(world_size)]
    total = decode(rows[0], n, shape)
    for row in rows[1:]:
        total += decode(row, n, shape)
    out = torch.empty(n)
    cpu.decode_mean(torch.stack(rows), out, UniformFormat(**shape))
    assert torch.equal(out.view(torch.int32), (total / world_size).view(torch.int32))


# --- awkward values ------------------------------------------------------------------------------------


@kernels
@given(shapes, lengths, seeds, st.data())
def test_a_non_finite_value_makes_its_block_nan_and_keeps_its_residual(shape, n, seed, data):
    place = data.draw(st.integers(0, n - 1))
    bad = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    in_place = data.draw(st.booleans())
    x, residual = normal(n, seed), normal(n, seed + 1, 0.01)
    clean_payload = encode(x, shape, stochastic=True, residual=residual)
    x[place] = bad
    old = residual.clone()
    new_residual = residual if in_place else torch.empty(n)
    payload = encode(x, shape, stochastic=True, residual=residual, new_residual=new_residual)
    out = decode(payload, n, shape)
    start = place // shape["block_size"] * shape["block_size"]
    block = torch.zeros(n, dtype=torch.bool)
    block[start : start + shape["block_size"]] = True
    assert out[block].isnan().all()
    assert torch.equal(out[~block], decode(clean_payload, n, shape)[~block])  # the others do not notice
    assert out[~block].isfinite().all()
    assert torch.equal(new_residual[block].view(torch.int32), old[block].view(torch.int32))
    assert new_residual.isfinite().all()


@kernels
@given(shapes, lengths, st.booleans())
def test_zeros_decode_to_zeros(shape, n, stochastic):
    residual, new_residual = torch.zeros(n), torch.ones(n)
    payload = encode(
        torch.zeros(n), shape, stochastic=stochastic, key=3, residual=residual, new_residual=new_residual
    )
    assert not decode(payload, n, shape).any()
    assert not new_residual.any()


@kernels
@given(shapes, lengths, seeds, st.booleans())
def test_a_denormal_scale_is_sent_as_zero_and_the_residual_keeps_everything(shape, n, seed, stochastic):
    x = normal(n, seed).clamp(-3, 3) * 1e-39
    residual, new_residual = torch.zeros(n), torch.ones(n)
    payload = encode(x, shape, stochastic=stochastic, residual=residual, new_residual=new_residual)
    assert not scale_per_element(payload, n, shape).any()
    assert not decode(payload, n, shape).any()
    assert torch.equal(new_residual, x)


@kernels
@given(shapes, lengths, seeds, st.booleans(), st.sampled_from([1.0, 1024.0, 65536.0]))
def test_decoded_plus_residual_is_what_went_in(shape, n, seed, stochastic, loss_scale):
    x, residual, new_residual = normal(n, seed), normal(n, seed + 1, 0.1), torch.empty(n)
    payload = encode(
        x * loss_scale, shape, stochastic=stochastic, key=seed,
        residual=residual, new_residual=new_residual, loss_scale=loss_scale,
    )  # fmt: skip
    sent, out = x + residual, decode(payload, n, shape) / loss_scale
    valid = out.isfinite()
    torch.testing.assert_close((out + new_residual)[valid], sent[valid], rtol=1e-5, atol=2e-6)
    assert torch.equal(new_residual[~valid], residual[~valid])
