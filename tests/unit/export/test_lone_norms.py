"""Batch norms without a layer in front to go into: depthwise convolutions in the file, weights exact."""

import pytest
import torch
from nets import prepared
from torch import nn

from gradq import export, quant

BITS = "int8" if export.features() == "x86-vnni" else "int7"


class Dense(nn.Module):
    """A stem, two dense layers (the first norm of each reads a concatenation), a norm and a head."""

    def __init__(self, width=8, growth=4):
        super().__init__()
        self.stem, self.layers = nn.Conv2d(1, width, 3, padding=1), nn.ModuleList()
        for inputs in (width, width + growth):
            self.layers.append(
                nn.Sequential(
                    nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, 2 * growth, 1, bias=False),
                    nn.BatchNorm2d(2 * growth), nn.ReLU(), nn.Conv2d(2 * growth, growth, 3, padding=1),
                )
            )  # fmt: skip
        self.norm, self.head = nn.BatchNorm2d(width + 2 * growth), nn.Linear(width + 2 * growth, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(torch.relu(self.norm(x)).mean((2, 3)))


class Preactivation(nn.Module):
    """A norm reads a sum that another sum reads, too."""

    def __init__(self, width=8):
        super().__init__()
        self.stem, self.body = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm, self.end, self.head = nn.BatchNorm2d(width), nn.BatchNorm2d(width), nn.Linear(width, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.body(torch.relu(self.norm(x)))
        return self.head(torch.relu(self.end(x)).mean((2, 3)))


class BehindReLU(nn.Module):
    """Convolution, ReLU, norm in one dimension, with padding behind it."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv1d(1, 8, 3), nn.BatchNorm1d(8), nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 62, 5)

    def forward(self, x):
        return self.head(torch.relu(self.b(self.norm(torch.relu(self.a(x.flatten(2)))))).flatten(1))


MODELS = {
    Dense: (["layers.0.0", "layers.1.0", "norm"], 8),
    Preactivation: (["norm", "end"], 4),
    BehindReLU: (["norm"], 3),
}


@torch.no_grad()
def trained(make):
    """A model in evaluation whose norms have statistics, and inputs."""
    torch.manual_seed(0)
    model, x = make(), torch.rand(64, 1, 8, 8)
    for norm in model.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, -1.5, 1.5)  # a negative one turns the codes around
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    for _ in range(20):
        model(x)
    return model.eval(), x


@pytest.mark.parametrize("make", MODELS)
@torch.no_grad()
def test_they_are_integer_convolutions_and_nothing_is_lost(make, tmp_path):
    model, x = trained(make)
    norms, convolutions = MODELS[make]
    qmodel = prepared(model, [x], weights=BITS)
    info = quant.prepare_info(qmodel)
    assert info.convolved == norms
    assert not info.float_islands
    for name in norms:
        layer = qmodel.get_submodule(name)
        assert torch.allclose(layer.weight_quant(layer.weight), layer.weight, rtol=1e-6)
    path = tmp_path / "model.onnx"
    export.onnx(qmodel, path)
    report = export.verify(path, qmodel, [x], batch_sizes=(), show_progress=False)
    counts = report.operators.counts
    assert counts["QLinearConv"] == convolutions
    assert not {"BatchNormalization", "Relu"} & set(counts)
    assert report.agreement.equal == 1
    assert report.fidelity.sqnr_db > 25
    skipped = quant.prepare(model, x[:2], quant.Config(weights=BITS, skip=tuple(norms)))
    assert [name for name, _ in quant.prepare_info(skipped).float_islands] == norms


@pytest.mark.parametrize("make", MODELS)
def test_restore_gives_them_back_untrained_bit_for_bit_and_trained_with_what_was_learned(make):
    model, x = trained(make)
    qmodel = prepared(model, [x], weights=BITS)
    back, truth = quant.restore(qmodel).state_dict(), model.state_dict()
    assert back.keys() == truth.keys()
    assert all(torch.equal(back[key], truth[key]) for key in truth)
    qmodel.train()
    optimizer = torch.optim.Adam(quant.param_groups(qmodel, lr=1e-2))
    for _ in range(3):
        optimizer.zero_grad()
        qmodel(x).square().mean().backward()
        optimizer.step()
    restored = quant.restore(qmodel).eval()
    norm = MODELS[make][0][0]
    assert not torch.equal(restored.get_submodule(norm).weight, model.get_submodule(norm).weight)
    again = quant.prepare(restored, x[:2], quant.Config(weights=None, activations=None))
    with torch.no_grad():
        assert torch.allclose(again(x), in_float(qmodel)(x), rtol=1e-4, atol=1e-5)


def in_float(qmodel):
    """The quantized model's graph with its quantizers off."""
    qmodel = qmodel.eval()
    for module in qmodel.modules():
        if isinstance(module, (quant.ActQuant, quant.WeightQuant)):
            module.mode = "float"
    return qmodel


@torch.no_grad()
def test_where_it_does_not_pay_they_stay_in_float_and_are_listed():
    class Ends(nn.Module):
        """A norm on the input, whose channels may have any range, and one whose output is the model's."""

        def __init__(self):
            super().__init__()
            self.first, self.conv, self.last = nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return torch.relu(self.last(torch.relu(self.conv(self.first(x)))))

    info = quant.prepare_info(quant.prepare(Ends().eval(), torch.rand(2, 1, 8, 8)))
    assert not info.convolved
    assert [name for name, _ in info.float_islands] == ["first", "last"]
    model, x = trained(Preactivation)
    for config in (quant.Config(weights="int8-tensor"), quant.Config(activations=None)):
        assert not quant.prepare_info(quant.prepare(model, x[:2], config)).convolved
