"""`prepare_within` leaves as few layers in float as the allowed loss asks for."""

import pytest
import torch
from torch import nn

from gradq import quant
from gradq.errors import CalibrationError, ConfigError


class Net(nn.Module):
    """Four layers; one output of the third is so large that one scale of 3 bits loses the others."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))
        with torch.no_grad():
            self.c.weight[0] *= 100
            self.c.bias[0] *= 100
            self.d.weight[:, 0] /= 100

    def forward(self, x):
        for layer in (self.a, self.b, self.c):
            x = torch.relu(layer(x))
        return self.d(x)


CONFIG = quant.Config(weights="int3-tensor", activations=None, weight_observer="minmax")


def setting():
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(64, 16)
    with torch.no_grad():
        truth = model(x)

    def evaluate(candidate):
        assert not candidate.training
        noise = (candidate(x) - truth).square().sum() / truth.square().sum()
        return -100 * float(noise)

    return model, x, evaluate


@torch.no_grad()
def test_the_costliest_layers_stay_in_float_and_no_more():
    model, x, evaluate = setting()
    _, free = quant.prepare_within(model, x, [x], evaluate, max_loss=1e9, config=CONFIG, show_progress=False)
    assert (free.skipped, len(free.tried), set(free.costs)) == ((), 1, {"a", "b", "c", "d"})
    qmodel, report = quant.prepare_within(
        model, x, [x], evaluate, max_loss=0.9 * free.loss, config=CONFIG, show_progress=False
    )
    assert report.skipped == ("c",)
    assert report.loss <= 0.9 * free.loss
    assert report.figure == pytest.approx(evaluate(qmodel.eval()))
    assert isinstance(qmodel.get_submodule("c"), nn.Linear)
    assert ("c", "skipped by the configuration") in quant.prepare_info(qmodel).float_islands
    assert "1 of 4 layers in float: c" in str(report)


@torch.no_grad()
def test_no_loss_at_all_leaves_everything_in_float():
    model, x, evaluate = setting()
    _, report = quant.prepare_within(
        model, x, [x], evaluate, max_loss=0.0, config=CONFIG, show_progress=False
    )
    assert set(report.skipped) == {"a", "b", "c", "d"}
    assert [count for count, _ in report.tried] == [0, 1, 2, 4, 3]


def test_what_cannot_work_is_an_error():
    model, x, evaluate = setting()
    with pytest.raises(ConfigError, match="max_loss is -1"):
        quant.prepare_within(model, x, [x], evaluate, max_loss=-1)
    with pytest.raises(CalibrationError, match="no batch"):
        quant.prepare_within(model, x, [], evaluate, max_loss=1)
    figures = iter([1.0, *[float("nan")] * 9])
    with pytest.raises(ConfigError, match="with every layer in float"):
        quant.prepare_within(
            model, x, [x], lambda m: next(figures), max_loss=1, config=CONFIG, show_progress=False
        )


class Planted(nn.Module):
    """Four layers; what the last but one reads has outliers that one scale a tensor cannot hold."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.bad, self.head = (
            nn.Linear(16, 64),
            nn.Linear(64, 64),
            nn.Linear(64, 64),
            nn.Linear(64, 8),
        )
        with torch.no_grad():
            for layer in (self.a, self.b, self.bad, self.head):
                nn.init.kaiming_normal_(layer.weight)
            self.b.weight[:2] *= 3000
            self.b.bias[:2] *= 3000
            self.bad.weight[:, :2] /= 3000

    def forward(self, x):
        for layer in (self.a, self.b, self.bad):
            x = torch.relu(layer(x))
        return self.head(x)


@torch.no_grad()
def test_at_most_a_point_of_accuracy_and_the_planted_layer_is_named():
    torch.manual_seed(0)
    model, x = Planted().eval(), torch.randn(2000, 16)
    best = model(x).topk(2).values
    sure = (best[:, 0] - best[:, 1]) > (best[:, 0] - best[:, 1]).median()
    x = x[sure]
    labels = model(x).argmax(1)

    def accuracy(candidate):
        return 100 * float((candidate(x).argmax(1) == labels).float().mean())

    config = quant.Config(observer="minmax")
    everything = quant.calibrate(quant.prepare(model, x[:2], config), [x], show_progress=False)
    assert accuracy(everything.eval()) < 90
    qmodel, report = quant.prepare_within(
        model, x[:2], x.split(250), accuracy, max_loss=1.0, config=config, show_progress=False
    )
    assert report.float_figure == 100
    assert report.loss <= 1
    assert accuracy(qmodel.eval()) >= 99
    assert report.skipped == ("bad",)
    assert "1 of 4 layers in float: bad" in str(report)
    quantized = {name for name, m in qmodel.named_modules() if isinstance(m, quant.QuantLinear)}
    assert quantized == {"a", "b", "head"}
