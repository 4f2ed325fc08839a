"""Channel scales moved into weights: the float model stays, and outliers cost less."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from gradq import quant
from gradq.errors import CalibrationError, ConfigError, UnsupportedError
from gradq.quant.batches import float_mode

WIDTH = 32


class Norm(nn.Module):
    """RMS norm as Hugging Face writes it: statements, not a layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    """Pre-norm attention and a gated or plain feed-forward part; some channels of the norms are large."""

    def __init__(self, norm, gated, outliers=1.0):
        super().__init__()
        self.norm1, self.norm2, self.gated = norm(), norm(), gated
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        with torch.no_grad():
            for n in (self.norm1, self.norm2):
                n.weight[:3] *= outliers
            for layer in (self.qkv, self.gate, self.up):
                layer.weight[:, :3] /= outliers**0.5

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v))
        y = self.norm2(x)
        if self.gated:
            return x + self.down(functional.silu(self.gate(y)) * self.up(y))
        return x + self.down(torch.relu(self.up(y)))


def layer_norm():
    norm = nn.LayerNorm(WIDTH)
    with torch.no_grad():
        norm.bias.normal_(std=0.1)
    return norm


NORMS = {"layer": layer_norm, "rms": lambda: nn.RMSNorm(WIDTH), "written": Norm}


def net(norm="layer", gated=True, outliers=1.0):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(NORMS[norm], gated, outliers) for _ in range(2)), nn.Linear(WIDTH, 8)).eval()


def data(rows=8, seed=0):
    """Tokens whose channels have unlike sizes, as those of trained models."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(WIDTH, generator=torch.Generator().manual_seed(9)).exp()
    return torch.randn(rows, 12, WIDTH, generator=generator) * sizes


def decibels(got, truth):
    return float(10 * torch.log10(truth.square().sum() / (got - truth).square().sum()))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("norm", list(NORMS))
@pytest.mark.parametrize("how", [quant.awq, quant.smooth])
@torch.no_grad()
def test_the_float_model_stays_and_every_norm_gives_its_scales(how, norm, gated):
    model, x = net(norm, gated, outliers=10.0), data()
    kept = copy.deepcopy(model)
    truth = model(x)
    activations = None if how is quant.awq else "int8"
    qmodel = quant.prepare(model, x[:2], quant.Config(weights="int4", activations=activations))
    before = {name: p.clone() for name, p in qmodel.named_parameters()}
    report = how(qmodel, x.split(4), show_progress=False)
    names = [f"{i}.{n}" for i in "01" for n in (["qkv", "up", "down"] + ["gate"] * gated)]
    assert set(report.scaled) == set(names)
    assert set(report.left) == {"0.out", "1.out", "2"}
    assert report.scaled["1.down"] == "1.up"
    assert "norm2" in report.scaled["1.up"]
    after = dict(qmodel.named_parameters())
    changed = [n for n in names if not torch.equal(after[f"{n}.weight"], before[f"{n}.weight"])]
    assert len(changed) > len(names) // 2
    with float_mode(qmodel):
        assert decibels(qmodel(x), truth) > 100
    assert decibels(quant.restore(qmodel)(x), truth) > 100
    assert torch.equal(quant.float_model(qmodel)(x), truth)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), kept.parameters(), strict=True))


@torch.no_grad()
def test_awq_rounds_better_and_gptq_may_follow():
    model, x, fresh = net(outliers=100.0), data(16), data(16, seed=1)
    truth = model(fresh)

    def quality(*steps):
        qmodel = quant.prepare(model, x[:2], quant.Config(weights="int4-g16", activations=None))
        for step in steps:
            step(qmodel, x.split(8), show_progress=False)
        return decibels(qmodel(fresh), truth)

    nearest = quality()
    scaled = quality(quant.awq)
    assert scaled > nearest + 0.5
    assert quality(quant.awq, quant.gptq) > scaled


@torch.no_grad()
def test_smoothing_gives_back_what_planted_outliers_cost():
    """Activations 100 times as large in three channels: a scale a tensor loses the others."""
    x, fresh = data(16), data(16, seed=1)

    def quality(outliers, alpha=None):
        model = net(outliers=outliers)
        qmodel = quant.prepare(model, x[:2], quant.Config())
        if alpha is not None:
            quant.smooth(qmodel, x.split(8), alpha=alpha, show_progress=False)
        quant.calibrate(qmodel, x.split(8), show_progress=False)
        return decibels(quant.integer_reference(qmodel)(fresh), model(fresh))

    plain, hurt, smoothed = quality(1.0), quality(100.0), quality(100.0, alpha=0.5)
    assert hurt < plain - 6
    assert smoothed > hurt + 0.7 * (plain - hurt)


@torch.no_grad()
def test_ranges_are_asked_for_again():
    model, x = net(), data()
    qmodel = quant.prepare(model, x, quant.Config())
    quant.calibrate(qmodel, [x], show_progress=False)
    quant.smooth(qmodel, [x], show_progress=False)
    with pytest.raises(CalibrationError, match=r"run quant\.calibrate"):
        qmodel(x)
    quant.calibrate(qmodel, [x], show_progress=False)
    qmodel(x)


class PostNorm(nn.Module):
    """BERT's order: the sum reads the norm, too."""

    def __init__(self):
        super().__init__()
        self.norm, self.wide, self.narrow = layer_norm(), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x):
        x = self.norm(x)
        return x + self.narrow(functional.gelu(self.wide(x)))


class Twice(nn.Module):
    """One weight behind two norms."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = layer_norm(), layer_norm(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.fc(self.a(x)) + self.fc(self.b(x))


@pytest.mark.parametrize(
    ("model", "why"), [(PostNorm(), "add reads its input, too"), (Twice(), "more than once")]
)
def test_what_cannot_be_scaled_is_refused_with_the_reason(model, why):
    qmodel = quant.prepare(model.eval(), data(), quant.Config())
    for how in (quant.awq, quant.smooth):
        with pytest.raises(UnsupportedError, match=why):
            how(qmodel, [data()], show_progress=False)


def test_what_cannot_work_is_an_error():
    qmodel = quant.prepare(net(), data(), quant.Config())
    with pytest.raises(ConfigError, match=r"alpha is 1\.5"):
        quant.smooth(qmodel, [data()], alpha=1.5)
    with pytest.raises(CalibrationError, match="no batch"):
        quant.awq(qmodel, [])
    with pytest.raises(UnsupportedError, match="made by gradq"):
        quant.awq(net(), [data()])


@torch.no_grad()
def test_silent_channels_stay():
    model, x = net(), data()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight[4], module.bias[4] = 0, 0
    qmodel = quant.prepare(model, x, quant.Config(weights="int4", activations=None))
    quant.awq(qmodel, [x], show_progress=False)
    quant.smooth(qmodel, [x], show_progress=False)
    with float_mode(qmodel):
        assert decibels(qmodel(x), model(x)) > 100
