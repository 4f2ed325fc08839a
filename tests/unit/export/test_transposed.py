"""Transposed convolutions compute in integers: as convolutions of their phases, whatever their geometry."""

import numpy as np
import pytest
import torch
from nets import prepared
from torch import nn
from torch.nn import functional

from gradq import export, quant
from gradq.export.subpixel import Subpixel

BITS = "int8" if export.features() == "x86-vnni" else "int7"
GEOMETRIES = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    {"kernel_size": 3, "stride": 2, "output_padding": 1, "groups": 2},
    {"kernel_size": 5, "stride": 3, "padding": 2, "bias": False},
    {"kernel_size": 3, "stride": 1, "padding": 1, "groups": 4},
    {"kernel_size": 1, "stride": 1},
]


class Decoder(nn.Module):
    """Convolution, transposed convolution with batch norm, convolution."""

    def __init__(self, dims, **geometry):
        super().__init__()
        conv, transposed = (nn.Conv1d, nn.ConvTranspose1d) if dims == 1 else (nn.Conv2d, nn.ConvTranspose2d)
        norm = nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d
        self.first, self.up = conv(2, 4, 3, padding=1), transposed(4, 8, **geometry)
        self.norm, self.last = norm(8), conv(8, 3, 1)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.up(torch.relu(self.first(x))))))


def decoder(dims, geometry):
    torch.manual_seed(0)
    model = Decoder(dims, **geometry)
    nn.init.uniform_(model.norm.weight, 0.5, 2.0)
    nn.init.uniform_(model.norm.running_mean, -0.2, 0.2)
    nn.init.uniform_(model.norm.running_var, 0.5, 2.0)
    return model.eval(), torch.randn(2, 2, *(7, 5)[:dims])


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: "-".join(map(str, g.values())))
@pytest.mark.parametrize("dims", [1, 2])
def test_the_convolution_of_the_phases_is_the_transposed_convolution(dims, geometry):
    """Against torch, with plain numbers for codes."""
    torch.manual_seed(0)
    kind = nn.ConvTranspose1d if dims == 1 else nn.ConvTranspose2d
    layer = kind(4, 8, **geometry).double()
    x = torch.randn(2, 4, *(7, 5)[:dims], dtype=torch.float64)
    groups, s = layer.groups, layer.stride[0]
    pixels = Subpixel(s, layer.kernel_size, layer.padding, layer.output_padding)
    weight = layer.weight.detach().reshape(groups, 4 // groups, 8 // groups, *layer.kernel_size)
    weight = weight.transpose(1, 2).flatten(0, 1).numpy()
    wide = torch.from_numpy(pixels.rearrange(weight, np.zeros(1)))
    call = functional.conv1d if dims == 1 else functional.conv2d
    y = call(x, wide, padding=[t - 1 for t in pixels.taps], groups=groups)
    y = y.unflatten(1, (8, *(s,) * dims))
    y = y.transpose(2, 3) if dims == 1 else y.permute(0, 1, 4, 2, 5, 3).flatten(4)
    y = y.flatten(2, 3)
    for axis, (begin, end) in enumerate(pixels.cuts):
        y = y.narrow(2 + axis, begin, y.shape[2 + axis] - begin - end)
    with torch.no_grad():
        bias = 0 if layer.bias is None else layer.bias.view(-1, *(1,) * dims)
        assert torch.allclose(y + bias, layer(x))


@pytest.mark.parametrize(
    "geometry",
    [*GEOMETRIES[:3], *(pytest.param(geometry, marks=pytest.mark.slow) for geometry in GEOMETRIES[3:5])],
    ids=lambda g: "-".join(map(str, g.values())),
)
@pytest.mark.parametrize("dims", [1, 2])
@torch.no_grad()
def test_files_compute_in_integers(dims, geometry, tmp_path):
    model, x = decoder(dims, geometry)
    qmodel = prepared(model, [x], weights=BITS)
    info = quant.prepare_info(qmodel)
    assert [(r.layer, r.batch_norm) for r in info.folded] == [("up", "norm")]
    assert not info.float_islands
    path = tmp_path / "model.onnx"
    report = export.onnx(qmodel, path)
    assert report.forms == {"int8": 3}
    seen = export.verify(path, qmodel, [x], batch_sizes=(), show_progress=False)
    assert seen.operators.counts["QLinearConv"] == 2
    assert not {"Conv", "ConvTranspose", "FusedConv"} & seen.operators.counts.keys()
    assert seen.agreement.exact
    assert seen.fidelity.sqnr_db > 25


@torch.no_grad()
def test_weights_per_channel_4_bits_and_restore():
    model, x = decoder(2, {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 2})
    qmodel = prepared(model, [x], weights="int4")
    assert qmodel.up.weight_quant.num_rows == 8
    assert torch.equal(quant.restore(qmodel).up.weight, model.up.weight)
    qmodel.up.weight.mul_(1.25)  # as if trained
    trained = quant.restore(qmodel)
    assert torch.allclose(trained.up.weight, 1.25 * model.up.weight)


def test_gradients_reach_the_weight():
    model, x = decoder(1, {"kernel_size": 4, "stride": 2, "padding": 1})
    qmodel = prepared(model.train(), [x], weights="int8")
    qmodel(x).square().sum().backward()
    assert float(qmodel.up.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.ConvTranspose2d(3, 4, 3, dilation=2), "dilation"),
        (nn.ConvTranspose2d(3, 4, 3, stride=(1, 2)), "different strides"),
        (nn.ConvTranspose3d(3, 4, 2, 2), "no integer form"),
    ],
)
@torch.no_grad()
def test_what_has_no_integer_form_is_listed(layer, reason):
    x = torch.randn(2, 3, *(6,) * len(layer.kernel_size))
    qmodel = quant.prepare(nn.Sequential(layer).eval(), x)
    [(name, why)] = quant.prepare_info(qmodel).float_islands
    assert name == "0"
    assert reason in why


@torch.no_grad()
def test_layers_are_swapped_by_name(tmp_path):
    model, x = decoder(2, {"kernel_size": 2, "stride": 2})
    before = model(x)
    quant.swap(model, quant.Config(weights=BITS))
    quant.calibrate(model, [x], show_progress=False)
    path = tmp_path / "model.onnx"
    export.onnx(model, path, example_inputs=x)
    report = export.verify(path, model, [x], example_inputs=x, batch_sizes=(), show_progress=False)
    assert report.fidelity.sqnr_db > 25
    assert torch.equal(quant.restore(model).eval()(x), before)


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, 2, padding=1)

    def forward(self, x):
        x = torch.relu(self.a(functional.pad(x, (0, 1, 2, 1))))
        return torch.relu(self.b(functional.pad(x, (0, 1, 0, 1))))[:, :4]


@torch.no_grad()
def test_zeros_in_front_of_a_convolution_are_its_own_padding(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    qmodel = prepared(Padded().eval(), [x], weights=BITS)
    path = tmp_path / "model.onnx"
    export.onnx(qmodel, path)
    report = export.verify(path, qmodel, [x], batch_sizes=(), show_progress=False)
    assert "Pad" not in report.operators.counts
    assert report.agreement.exact
