"""Conformance: every fake quantizer runs through the same table."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from gradq.errors import CalibrationError, ConfigError, NonFiniteError, SpecError
from gradq.quant import ActQuant, Format, WeightQuant, parse_format
from gradq.quant.codebooks import fit_codebook, fixed_table
from gradq.quant.ops import dequantize, fake_codebook, fake_quantize, nearest_code, quantize

WEIGHTS = [
    *(f"int{b}" for b in range(2, 9)),
    "int4-tensor", "int8-asym", "int3-asym-tensor", "int4-g8", "int4-asym-g5", "int8-asym-channel",
    "nf4", "nf4-g16", "pot2", "pot3", "pot4", "codebook4", "codebook3-tensor", "codebook2", "codebook4-g16",
]  # fmt: skip
ACTS = [f"activation {s}" for s in ("int8", "int8-sym", "int2", "int8-batch", "int8-token", "int4-sym-token")]
ONE_OF_A_KIND = ["int4", "int4-asym-g5", "codebook4-g16", "activation int8", "activation int8-token"]


def make(spec, x):
    """A ready quantizer of a weight (if the spec is one) or an activation."""
    if spec.startswith("activation "):
        quantizer = ActQuant(spec.removeprefix("activation "))
        quantizer.start_observing()
        quantizer(x)
        quantizer.stop_observing()
        return quantizer
    quantizer = WeightQuant(spec, x.shape)
    quantizer.fit(x)
    return quantizer


ALL = [*WEIGHTS, *ACTS]


@pytest.fixture
def x():
    return torch.randn(6, 20, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spec", ALL)
class TestConformance:
    def test_idempotent(self, spec, x):
        quantizer = make(spec, x)
        once = quantizer(x).detach()
        if isinstance(quantizer, ActQuant) and quantizer.format.is_dynamic:
            # the second range may be narrower by rounding; values must stay on a grid as fine
            step = float(quantizer.dynamic_range(x)[0].max())
            assert float((quantizer(once) - once).abs().max()) <= step / 2 + 1e-6
        else:
            assert torch.equal(quantizer(once), once)

    @torch.no_grad()
    def test_error_is_small(self, spec, x):
        quantizer = make(spec, x)
        y = quantizer(x)
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        nmse = float(((y - x) ** 2).sum() / (x**2).sum())
        bits = quantizer.format.bits
        assert nmse < {2: 0.5, 3: 0.12, 4: 0.05, 5: 0.01, 6: 3e-3, 7: 7e-4, 8: 2e-4}[bits]
        assert nmse > 0

    def test_saturates(self, spec, x):
        quantizer = make(spec, x)
        if quantizer.format.is_dynamic:
            pytest.skip("a dynamic range covers what comes")
        scale = quantizer.scale.detach()
        fmt = quantizer.format
        big = quantizer(torch.full_like(x, 1e6)).detach()
        small = quantizer(torch.full_like(x, -1e6)).detach()
        top = fmt.qmax if quantizer.codebook is None else int(quantizer.codebook.max())
        bottom = fmt.qmin if quantizer.codebook is None else int(quantizer.codebook.min())
        zero_point = quantizer.zero_point
        assert float(big.max()) == pytest.approx(float(((top - zero_point) * scale).max()))
        assert float(small.min()) == pytest.approx(float(((bottom - zero_point) * scale).min()))

    def test_zeros_stay_zeros(self, spec, x):
        quantizer = make(spec, x)
        assert torch.count_nonzero(quantizer(torch.zeros_like(x))) == 0
        fresh = make(spec, torch.zeros_like(x))
        assert torch.count_nonzero(fresh(torch.zeros_like(x))) == 0

    def test_constants(self, spec, x):
        for value in (3.0, -0.25):
            constant = torch.full_like(x, value)
            quantizer = make(spec, constant)
            assert torch.allclose(quantizer(constant), constant, rtol=0.02)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_non_finite_is_an_error_that_names_the_tensor(self, spec, x, bad):
        quantizer = make(spec, x)
        quantizer.name = "layer3.weight"
        x = x.clone()
        x[2, 3] = bad
        with pytest.raises(NonFiniteError, match=r"layer3\.weight"):
            quantizer(x)

    def test_empty(self, spec, x):
        quantizer = make(spec, x)
        empty = x[:, :0] if isinstance(quantizer, WeightQuant) else x[:0]
        assert quantizer(empty).shape == empty.shape

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_dtypes(self, spec, x, dtype):
        quantizer = make(spec, x)
        y = quantizer(x.to(dtype))
        assert y.dtype == dtype
        assert torch.allclose(y.float(), quantizer(x.to(dtype).float()), rtol=5e-3, atol=1e-6)
        y.sum().backward() if y.requires_grad else None

    def test_bf16_is_idempotent(self, spec, x):
        quantizer = make(spec, x)
        if quantizer.format.is_dynamic:
            pytest.skip("a new range every time")
        once = quantizer(x.bfloat16())
        assert torch.equal(quantizer(once), once)

    def test_straight_through_gradient(self, spec, x):
        quantizer = make(spec, x)
        wide = (x * 3).requires_grad_()
        y = quantizer(wide)
        y.sum().backward()
        if quantizer.format.is_dynamic:
            assert torch.equal(wide.grad, torch.ones_like(wide))
            return
        assert set(wide.grad.unique().tolist()) == {0.0, 1.0}
        # 0 exactly where the value was clipped: there a larger value changes nothing
        moved = quantizer(wide.detach() * 1.5)
        clipped = wide.grad == 0
        assert torch.equal(moved[clipped], y.detach()[clipped])
        inside = quantizer(x.detach() * 0.1)
        assert inside.shape == x.shape

    def test_scale_gradient_follows_lsq(self, spec, x):
        """d y / d log2 s = ln 2 · s · (round(v) − v), or the saturated code; times 1/√(n·qmax)."""
        quantizer = make(spec, x)
        if quantizer.format.is_dynamic:
            pytest.skip("nothing to learn")
        wide = x * 2
        weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        (quantizer(wide) * weight).sum().backward()
        got = quantizer.log2_scale.grad
        as_rows = quantizer.rows if isinstance(quantizer, WeightQuant) else lambda t: t.reshape(1, -1)
        v = as_rows(wide).double() / quantizer.scale.detach().double()[:, None]
        code = as_rows(quantizer(wide).detach()).double() / quantizer.scale.detach().double()[:, None]
        if quantizer.codebook is None:
            low = (quantizer.format.qmin - quantizer.zero_point)[:, None] - 0.5
            high = (quantizer.format.qmax - quantizer.zero_point)[:, None] + 0.5
        else:
            low, high = float(quantizer.codebook.min()) - 0.5, float(quantizer.codebook.max()) + 0.5
        rule = torch.where((v >= low) & (v <= high), code - v, code)
        count = (
            math.prod(wide.shape[1:])
            if isinstance(quantizer, ActQuant)
            else wide.numel() // quantizer.num_rows
        )
        factor = 1 / math.sqrt(max(1, count) * quantizer.format.qmax)
        expected = (rule * as_rows(weight)).sum(1) * quantizer.scale.detach().double() * math.log(2) * factor
        assert torch.allclose(got.double(), expected, rtol=1e-3, atol=1e-6)

    def test_deepcopy_pickle_and_state_dict(self, spec, x):
        quantizer = make(spec, x)
        y = quantizer(x)
        assert torch.equal(copy.deepcopy(quantizer)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(quantizer))(x), y)
        other = make(spec, 2 * x)
        file = io.BytesIO()
        torch.save(quantizer.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(x), y)


@pytest.mark.parametrize("spec", ONE_OF_A_KIND)
def test_export_and_compile(spec, x):
    torch._dynamo.reset()
    quantizer = make(spec, x).eval()
    y = quantizer(x)
    exported = torch.export.export(quantizer, (x,)).module()
    assert torch.equal(exported(x), y)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    z = x.clone().requires_grad_()
    out = compiled(z)
    assert torch.equal(out, y)
    out.sum().backward()
    eager = x.clone().requires_grad_()
    quantizer(eager).sum().backward()
    assert torch.equal(z.grad, eager.grad)


def test_scale_gradient_equals_finite_differences_of_the_soft_form():
    """With the rounding error held fixed, y(s) = s·(v₀ + e) is smooth; its slope is LSQ's inside."""
    x = torch.tensor([0.31, -0.72, 1.4, -2.0], dtype=torch.float64)
    scale = torch.tensor([0.25], requires_grad=True)
    zero = torch.zeros(1, dtype=torch.int32)
    for element in range(4):
        scale.grad = None
        fake_quantize(x, scale, zero, -8, 7, 1.0)[element].backward()
        v = x[element] / 0.25
        frozen = torch.round(v) - v  # y(s) = s·(x/s + frozen): what rounding would be if it did not jump
        soft = [float(s * (x[element] / s + frozen)) for s in (0.25 - 1e-4, 0.25 + 1e-4)]
        assert float(scale.grad) == pytest.approx((soft[1] - soft[0]) / 2e-4, abs=1e-4)


def test_saturated_scale_gradient_equals_finite_differences():
    x = torch.tensor([5.0, -5.0], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.int32)
    for element in range(2):
        scale = torch.tensor([0.25], requires_grad=True)
        fake_quantize(x, scale, zero, -8, 7, 1.0)[element].backward()
        values = [
            float(fake_quantize(x, torch.tensor([s]), zero, -8, 7, 1.0)[element]) for s in (0.249, 0.251)
        ]
        assert float(scale.grad) == pytest.approx((values[1] - values[0]) / 0.002, rel=1e-4)


def test_rounds_half_to_even():
    zero, one = torch.zeros(1, dtype=torch.int32), torch.ones(1)
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert quantize(x, one, zero, -8, 7).tolist() == [0, 2, 2, 0, -2, -2]
    assert fake_quantize(x, one, zero, -8, 7, 1.0).tolist() == [0, 2, 2, 0, -2, -2]
    table = torch.tensor([-4.0, -1.0, 0.0, 3.0])
    assert nearest_code(torch.tensor([-2.5, -0.5, 1.5]), table).tolist() == [0, 2, 2]


def test_divides_as_onnx_does():
    """Multiplying by 1/scale gives another code for values that fall on a tie one way and not the other."""
    scale, zero = torch.tensor([0.037]), torch.zeros(1, dtype=torch.int32)
    x = (torch.arange(-127, 127) + 0.5) * scale
    codes = quantize(x, scale, zero, -128, 127)
    assert torch.equal(codes, torch.round(x / scale).int())
    assert not torch.equal(codes, torch.round(x * (1 / scale)).int())


def test_fake_quantize_is_dequantize_of_quantize(x):
    scale, zero_point = torch.tensor([0.037]), torch.tensor([100], dtype=torch.int32)
    codes = quantize(x, scale, zero_point, 0, 255)
    assert torch.equal(dequantize(codes, scale, zero_point), fake_quantize(x, scale, zero_point, 0, 255, 1.0))


def test_nan_propagates_through_the_operators():
    x = torch.tensor([math.nan, 1.0])
    zero = torch.zeros(1, dtype=torch.int32)
    assert fake_quantize(x, torch.ones(1), zero, -8, 7, 1.0).isnan().tolist() == [True, False]
    assert fake_codebook(x, torch.ones(1), fixed_table("nf", 4), 1.0).isnan().tolist() == [True, False]


def test_operators_pass_torchs_own_checks():
    x = torch.randn(3, 4, requires_grad=True)
    scale = torch.full((3, 1), 0.1, requires_grad=True)
    zero = torch.zeros(3, 1, dtype=torch.int32)
    torch.library.opcheck(fake_quantize, (x, scale, zero, -8, 7, 1.0))
    torch.library.opcheck(fake_codebook, (x, scale, fixed_table("nf", 4), 1.0))


@pytest.mark.parametrize("spec", WEIGHTS)
def test_codes_and_scales_give_the_fake_quantized_weight(spec, x):
    quantizer = make(spec, x)
    codes = quantizer.quantize(x)
    assert codes.dtype == torch.int32
    assert codes.min() >= -128
    assert codes.max() <= 255
    rows = (quantizer.rows(codes) - quantizer.zero_point[:, None]) * quantizer.scale[:, None]
    assert torch.allclose(quantizer.unrows(rows, x.shape), quantizer(x), rtol=1e-6)
    assert len(codes.unique()) <= 2**quantizer.format.bits or quantizer.codebook is None


@pytest.mark.parametrize("spec", ["int4-g8", "nf4-g8"])
def test_groups_keep_their_own_scales(spec):
    weight = torch.cat([torch.full((2, 8), 1.0), torch.full((2, 8), 1000.0), torch.full((2, 3), 0.01)], 1)
    y = WeightQuant(spec, weight.shape)
    y.fit(weight)
    assert torch.allclose(y(weight), weight, rtol=1e-2)


def test_uncalibrated_is_an_error_that_names_the_tensor():
    with pytest.raises(CalibrationError, match=r"block1\.add has no range yet; run quant\.calibrate"):
        ActQuant(name="block1.add")(torch.ones(2))


def test_set_range_checks():
    quantizer = ActQuant(name="a")
    for scale, match in (
        (torch.zeros(1), "positive"),
        (torch.ones(2), "shape"),
        (torch.tensor([math.inf]), "finite"),
    ):
        with pytest.raises(ConfigError, match=match):
            quantizer.set_range(scale, torch.zeros(1))
    with pytest.raises(ConfigError, match="dynamically"):
        ActQuant("int8-batch").set_range(torch.ones(1), torch.zeros(1))


def test_dynamic_ranges(x):
    per_batch, per_token = ActQuant("int8-batch"), ActQuant("int8-token")
    x = x * torch.tensor([1, 1, 1, 1, 1, 100.0])[:, None]
    errors = [float((q(x).detach() - x)[:5].abs().max()) for q in (per_batch, per_token)]
    assert errors[1] < errors[0] / 10
    assert per_token.dynamic_range(x)[0].shape == (6, 1)


def test_tables():
    assert fixed_table("pot", 4).tolist() == [-128, -64, -32, -16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16, 32, 64]
    for kind, bits in (("nf", 4), ("pot", 2), ("pot", 3), ("codebook", 2), ("codebook", 3), ("codebook", 4)):
        table = fixed_table(kind, bits)
        assert len(table) == 2**bits
        assert table.dtype == torch.int8
        assert torch.equal(table, table.sort().values)
    with pytest.raises(ConfigError, match="nf5"):
        fixed_table("nf", 5)


def test_fitted_table_is_sorted_distinct_and_holds_zero():
    for v in (torch.zeros(100), torch.full((9,), 60.0), torch.randn(1000) * 40):
        table = fit_codebook(v, fixed_table("codebook", 4))
        assert len(table.unique()) == 16
        assert 0 in table.tolist()
        assert torch.equal(table, table.sort().values)


def test_fitting_lowers_the_error():
    v = (torch.randn(4000, generator=torch.Generator().manual_seed(0)).exp() * 9).clamp(max=127)
    start = fixed_table("codebook", 4)
    errors = [
        ((t.float()[nearest_code(v, t.float())] - v) ** 2).mean() for t in (start, fit_codebook(v, start))
    ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("spec", "role", "match"),
    [
        ("int9", "weights", "bits is 9; legal for kind 'int': 2 to 8"),
        ("int1", "weights", "bits is 1"),
        ("nf3", "weights", "legal for kind 'nf': 4 to 4"),
        ("int8-foo", "weights", "unknown part 'foo'"),
        ("eight", "weights", "cannot read the weights format 'eight'"),
        ("int8-token", "weights", "weights are known"),
        ("int8-channel", "activations", "per channel"),
        ("nf4", "activations", "activations are uniform"),
        ("int8-g1", "weights", "legal: 2 or more"),
        ("nf4-asym", "weights", "no zero point"),
        (8, "weights", "cannot read"),
    ],
)
def test_bad_formats(spec, role, match):
    with pytest.raises(ConfigError, match=match):
        parse_format(spec, role)


def test_spec_error_is_a_config_error():
    with pytest.raises(SpecError):
        parse_format("int", "weights")


@pytest.mark.parametrize("spec", [*WEIGHTS, "int5-asym-g32"])
def test_formats_read_back(spec):
    fmt = parse_format(spec, "weights")
    assert parse_format(str(fmt), "weights") == fmt
    for role in ("weights", "activations"):
        if fmt.granularity == "tensor" and fmt.is_uniform:
            assert parse_format(str(fmt), role) == fmt


def test_format_ranges():
    assert (Format(bits=4).qmin, Format(bits=4).qmax) == (-8, 7)
    assert (Format(bits=4, symmetric=False).qmin, Format(bits=4, symmetric=False).qmax) == (0, 15)


def test_set_bits_refits(x):
    quantizer = make("int8", x)
    quantizer.set_bits(3, x)
    fresh = make("int3", x)
    assert torch.equal(quantizer(x), fresh(x))
    assert len(quantizer(x)[0].unique()) <= 8


def test_parameters_have_one_dimension(x):
    for spec in ("int4-tensor", "int4", "int4-g8"):
        parameter = make(spec, x).log2_scale
        assert isinstance(parameter, nn.Parameter)
        assert parameter.ndim == 1
    assert ActQuant().log2_scale.shape == (1,)
