"""Properties of quantizers that hold for every tensor, format and scale."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradq.quant import Format, WeightQuant, parse_format
from gradq.quant.ops import dequantize, fake_quantize, quantize

FLOATS = st.floats(-(2.0**60), 2.0**60, width=32)
SPECS = st.sampled_from(
    [
        "int2",
        "int3-asym",
        "int4",
        "int4-g3",
        "int5-asym-tensor",
        "int8",
        "int8-asym-g4",
        "nf4",
        "pot3",
        "codebook4-tensor",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=40), SPECS, st.integers(1, 4))
def test_fitted_quantizers_are_idempotent_bounded_and_never_make_nan(values, spec, rows):
    x = torch.tensor((values * rows)[: len(values) * rows]).reshape(rows, -1)
    quantizer = WeightQuant(spec, x.shape, observer="minmax")
    quantizer.fit(x)
    y = quantizer(x).detach()
    assert y.isfinite().all()
    assert torch.equal(quantizer(y), y)
    limit = quantizer.rows(x).abs().amax() * 1.6 + 1e-30
    assert (y.abs() <= limit).all()
    if quantizer.format.is_uniform and not quantizer.format.symmetric:
        # min-max and asymmetric: nothing saturates, so no error exceeds half a step (plus the ends)
        step = quantizer.scale.detach()[:, None]
        assert (quantizer.rows(y - x).abs() <= step * 1.0001).all()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(FLOATS, min_size=1, max_size=30),
    st.floats(1e-6, 1e6),
    st.integers(2, 8),
    st.booleans(),
    st.data(),
)
def test_codes_are_in_range_monotonic_and_dequantize_to_the_fake_value(values, scale, bits, symmetric, data):
    fmt = Format(bits=bits, symmetric=symmetric)
    zero_point = torch.tensor(
        [0 if symmetric else data.draw(st.integers(fmt.qmin, fmt.qmax))], dtype=torch.int32
    )
    x, s = torch.tensor(values).sort().values, torch.tensor([scale])
    codes = quantize(x, s, zero_point, fmt.qmin, fmt.qmax)
    assert codes.min() >= fmt.qmin
    assert codes.max() <= fmt.qmax
    assert (codes.diff() >= 0).all()
    assert torch.equal(
        dequantize(codes, s, zero_point), fake_quantize(x, s, zero_point, fmt.qmin, fmt.qmax, 1.0)
    )


@given(
    st.sampled_from(["int", "nf", "pot", "codebook"]),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from(["tensor", "channel", 16, 128]),
)
def test_every_legal_format_reads_back(kind, bits, symmetric, granularity):
    if kind == "nf":
        bits = 4
    elif kind != "int":
        bits = min(bits, 4)
    group = granularity if isinstance(granularity, int) else 0
    fmt = Format(
        kind=kind,
        bits=bits,
        symmetric=symmetric or kind != "int",
        granularity="group" if group else granularity,
        group_size=group,
    )
    assert parse_format(str(fmt), "weights") == fmt
