"""GPTQ: codes by the second moments of the inputs beat the nearest ones, and stay on the grid."""

import pytest
import torch
from torch import nn

from gradq import quant
from gradq.errors import CalibrationError, ConfigError


def correlated(rows, inputs, seed=0):
    """Inputs that depend on few numbers, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(max(2, inputs // 4), inputs, generator=torch.Generator().manual_seed(7))
    x = torch.randn(rows, len(mix), generator=generator) @ mix
    return x + 0.05 * torch.randn(rows, inputs, generator=generator)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 40)).eval()


def loss(model, truth, x):
    with torch.no_grad():
        return float((model(x) - truth(x)).square().sum() / truth(x).square().sum())


@pytest.mark.parametrize(
    ("weights", "activations"),
    [("int4", None), ("int4-g16", None), ("int3-tensor", None), ("int4-asym-g16", None), ("int4", "int8")],
)
@torch.no_grad()
def test_outputs_are_nearer_than_with_the_nearest_codes(weights, activations):
    model, x = net(), correlated(256, 48)
    qmodel = quant.prepare(model, x[:2], quant.Config(weights=weights, activations=activations))
    quant.calibrate(qmodel, [x], show_progress=False)
    fresh = correlated(256, 48, seed=1)
    before = loss(qmodel, model, fresh)
    quant.gptq(qmodel, x.split(64), show_progress=False)
    assert loss(qmodel, model, fresh) < 0.7 * before
    for layer in (qmodel.get_submodule("0"), qmodel.get_submodule("2")):
        assert torch.allclose(layer.weight_quant(layer.weight), layer.weight, rtol=0, atol=1e-6)
    assert loss(quant.float_model(qmodel), model, fresh) == 0


@torch.no_grad()
def test_silent_inputs_single_batches_and_swapped_models():
    model, x = net(), correlated(64, 48)
    x[:, 5] = 0  # its moments say nothing: its weights are rounded to the nearest code
    quant.swap(model, quant.Config(weights="int4", activations=None))
    weight = model[0].weight.clone()
    quant.gptq(model, [x], num_batches=1, show_progress=False)
    nearest = model[0].weight_quant(weight)
    assert torch.allclose(model[0].weight[:, 5], nearest[:, 5])
    assert not torch.allclose(model[0].weight, nearest)


def test_what_cannot_work_is_an_error():
    model, x = net(), correlated(8, 48)
    qmodel = quant.prepare(model, x, quant.Config(activations=None))
    with pytest.raises(ConfigError, match="damping"):
        quant.gptq(qmodel, [x], damping=0)
    with pytest.raises(CalibrationError, match="no batch"):
        quant.gptq(qmodel, [])


@torch.no_grad()
def test_a_weight_that_is_an_embedding_too_is_left_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.inner, self.head = nn.Embedding(12, 16), nn.Linear(16, 16), nn.Linear(16, 12)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(torch.relu(self.inner(self.embed(ids))))

    torch.manual_seed(0)
    ids = torch.arange(12)[None]
    qmodel = quant.prepare(Tied().eval(), ids, quant.Config(weights="int4", activations=None))
    before = {name: p.clone() for name, p in qmodel.named_parameters()}
    quant.gptq(qmodel, [ids], show_progress=False)
    after = dict(qmodel.named_parameters())
    assert torch.equal(after["embed.weight"], before["embed.weight"])
    assert not torch.equal(after["inner.weight"], before["inner.weight"])
