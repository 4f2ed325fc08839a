"""The prepared graph computes what the model computes: rewrites, in-place statements, planted faults."""

import copy
import pickle
import sys
import warnings

import pytest
import torch
from models import build
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from gradq import quant
from gradq.errors import ConfigError, TraceError
from gradq.quant import rewrites
from gradq.quant.batches import float_mode
from gradq.quant.integer import integer_bias


def distance(model, qmodel, x):
    """Largest difference, relative to the largest output, with the quantizers off."""
    with torch.no_grad(), float_mode(qmodel):
        a, b = model(x.clone()), qmodel.eval()(x.clone())
    return float((a - b).abs().max() / a.abs().max())


def sqnr(a, b):
    return float(10 * torch.log10(a.square().sum() / (a - b).square().sum()))


class TokenNorm(nn.Module):
    """Batch norm over tokens: axis 1, which is not the linear layer's output axis."""

    def __init__(self, tokens=8, width=8):
        super().__init__()
        self.fc, self.bn, self.head = (
            nn.Linear(6, width),
            nn.BatchNorm1d(tokens),
            nn.Linear(tokens * width, 3),
        )

    def forward(self, x):
        return self.head(torch.relu(self.bn(self.fc(x))).flatten(1))


@pytest.mark.parametrize("width", [8, 5])
@torch.no_grad()
def test_batch_norm_over_another_axis_is_not_folded(width):
    torch.manual_seed(0)
    model = TokenNorm(width=width)
    model.bn.weight.uniform_(0.3, 3)
    model.bn.running_mean.uniform_(-1, 1)
    model.eval()
    x = torch.randn(5, 8, 6)
    qmodel = quant.prepare(model, x)
    assert quant.prepare_info(qmodel).folded == []
    assert "another axis" in dict(quant.prepare_info(qmodel).float_islands)["bn"]
    assert distance(model, qmodel, x) < 1e-6
    flat = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).eval()
    assert len(quant.prepare_info(quant.prepare(flat, x[:, 0])).folded) == 1


class InPlace(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.norm, self.b = kind, nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.a(self.norm(x))
        if self.kind == "method":
            h.add_(x)
        elif self.kind == "statement":
            h += x
        elif self.kind == "module":
            self.relu(h)
        elif self.kind == "function":
            functional.relu(h, inplace=True)
        elif self.kind == "chain":
            h.mul_(2).add_(x)
        elif self.kind == "input":
            x.add_(1)
            h = h + x
        elif self.kind == "view":
            h[:, 0].add_(3)
        elif self.kind == "part":
            h[:, 0] = 0
        return self.b(h)


@pytest.mark.parametrize(
    "kind", ["method", "statement", "module", "function", "chain", "input", "view", "part"]
)
@torch.no_grad()
def test_statements_in_place_are_edges(kind):
    torch.manual_seed(0)
    model, x = InPlace(kind).eval(), torch.randn(64, 6)
    qmodel = quant.prepare(model, x.clone())
    quant.calibrate(qmodel, [x.clone()], show_progress=False)
    assert distance(model, qmodel, x) < 1e-6
    assert sqnr(model(x.clone()), qmodel(x.clone())) > 30
    assert sqnr(model(x.clone()), quant.integer_reference(qmodel)(x.clone())) > 30


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.fc(x) * self.calls


def test_a_buffer_that_counts_is_refused_by_name_and_the_remedy_works():
    x = torch.randn(4, 6)
    with pytest.raises(TraceError, match=r"the buffer calls .* quant\.swap\(model\)"):
        quant.prepare(Counts().eval(), x)
    swapped = quant.swap(Counts().eval())
    quant.calibrate(swapped, [x], show_progress=False)
    assert isinstance(swapped.fc, quant.QuantLinear)


class Chain(nn.Module):
    """Convolutions and a linear layer whose weights some mechanism computes."""

    def __init__(self, wrap):
        super().__init__()
        self.a = wrap(nn.Conv1d(2, 6, 3, padding=1))
        self.b = wrap(nn.Conv1d(6, 6, 3, padding=1))
        self.fc = wrap(nn.Linear(6, 3))

    def forward(self, x):
        return self.fc(torch.relu(self.b(torch.relu(self.a(x)))).mean(-1))


MECHANISMS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": old_weight_norm,
    "old spectral_norm": old_spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
}


@pytest.mark.parametrize("name", MECHANISMS)
@torch.no_grad()
def test_computed_weights_are_quantized_and_restored(name):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the old mechanism old
        model = Chain(MECHANISMS[name])
    x = torch.randn(4, 2, 9)
    model(x)
    model.eval()
    model(x)
    before = copy.deepcopy(model.state_dict())
    qmodel = quant.prepare(model, x)
    quant.calibrate(qmodel, [x], show_progress=False)
    assert sum(isinstance(m, (quant.QuantConv1d, quant.QuantLinear)) for m in qmodel.modules()) == 3
    assert distance(model, qmodel, x) < 1e-5
    assert sqnr(model(x), qmodel(x)) > 25
    back = quant.restore(qmodel)
    assert list(back.state_dict()) == list(before)
    for key, value in back.state_dict().items():
        assert torch.equal(value, before[key]), key
        assert torch.equal(model.state_dict()[key], before[key]), key
    qmodel.b.weight.mul_(1.25)
    trained = quant.restore(qmodel).eval()
    assert distance(trained, qmodel, x) < 1e-4
    assert not torch.allclose(trained(x), model(x))


def test_subclasses_and_functional_layers_are_quantized_under_their_names():
    class Plain(nn.Conv2d):
        """Nothing of its own."""

    class Normalized(nn.Conv2d):
        def forward(self, x):
            return functional.conv2d(x, self.weight, self.bias, self.stride, self.padding)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Plain(1, 4, 3), Normalized(4, 4, 3, padding=1)
            self.w = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return functional.linear(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)), self.w)

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 1, 8, 8)
    qmodel = quant.prepare(model, x)
    quant.calibrate(qmodel, [x], show_progress=False)
    assert isinstance(qmodel.a, quant.QuantConv2d)
    assert isinstance(qmodel.b, quant.QuantConv2d)
    assert sum(isinstance(m, quant.QuantLinear) for m in qmodel.modules()) == 1
    assert quant.prepare_info(qmodel).float_islands == []
    assert {"a.weight", "b.weight", "b.bias"} <= set(dict(qmodel.named_parameters()))
    assert distance(model, qmodel, x) < 1e-6
    with torch.no_grad():
        for parameter in qmodel.parameters():
            parameter.mul_(1.5) if parameter.ndim > 1 else None
    assert distance(quant.restore(qmodel), qmodel, x) < 1e-5


class Constants(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 6)
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]))
        self.register_buffer("mask", torch.ones(9, 9).tril())
        self.table = nn.Embedding(6, 4)

    def forward(self, x):
        if self.kind == "normalize":
            x = (x - self.mean.view(1, 3, 1, 1)) / self.mean[None, :, None, None]
        elif self.kind == "literal":
            x = x * torch.tensor(2.0)
        y = self.fc(torch.relu(self.conv(x)).mean((2, 3)))
        if self.kind == "arange":
            y = y + self.table(torch.arange(6)).sum(-1)
        elif self.kind == "slice":
            y = y @ self.mask[:6, :6]
        elif self.kind == "mask":
            y = self.fc(
                torch.cat([y, y[:, :2]], 1) + torch.where(self.mask[0, :8] > 0, 0.0, -1e9).clamp(min=-1e9)
            )
            y = y.clamp(-1e9, 1e9)
        return y


@pytest.mark.parametrize("kind", ["normalize", "literal", "arange", "slice"])
@torch.no_grad()
def test_constants_made_in_forward_are_no_activations(kind):
    torch.manual_seed(0)
    model, x = Constants(kind).eval(), torch.rand(2, 3, 8, 8)
    qmodel = quant.prepare(model, x)
    quant.calibrate(qmodel, [x], show_progress=False)
    assert distance(model, qmodel, x) < 1e-6
    assert sqnr(model(x), qmodel(x)) > 30
    from gradq.quant.operators import constants

    fixed = constants(qmodel)
    for node in qmodel.graph.nodes:
        if node.op == "call_module" and isinstance(qmodel.get_submodule(node.target), quant.ActQuant):
            assert node not in fixed


class Containers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        h = torch.relu(self.a(x))
        out = {"logits": self.b(h), "more": [h, {"deep": h + 1}]}
        if self.training:
            out["loss"] = out["logits"].square().mean()
        return out


def test_outputs_in_containers_and_branches_on_the_mode():
    model, x = Containers(), torch.randn(4, 8)
    qmodel = quant.prepare(model, x)
    quant.calibrate(qmodel, [x], show_progress=False)
    with torch.no_grad(), float_mode(qmodel):
        expected, got = model.eval()(x), qmodel(x)
    assert list(got) == ["logits", "more"]
    assert torch.allclose(got["more"][1]["deep"], expected["more"][1]["deep"], atol=1e-6)
    for candidate in (qmodel, copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        with pytest.raises(TraceError, match="Containers"):
            candidate.train()
        assert not candidate.training
    quant.restore(qmodel).train()


class TestPlantedFaults:
    """A rewrite that goes wrong is an error of `prepare` that names the layer."""

    def test_a_fold_on_the_wrong_axis(self, monkeypatch):
        original = rewrites.fold_batch_norm

        def wrong(layer, bn):
            weight, bias = original(layer, bn)
            return nn.Parameter(weight.detach().roll(1, 0)), bias

        monkeypatch.setattr(rewrites, "fold_batch_norm", wrong)
        model, batches = build("cnn")
        with pytest.raises(TraceError, match=r"after folding batch norm .* first layer that differs is stem"):
            quant.prepare(model, batches[0])

    def test_a_lost_edge(self, monkeypatch):
        monkeypatch.setattr(sys.modules["gradq.quant.prepare"], "functionalize", lambda traced, inputs: None)
        with pytest.raises(
            TraceError, match=r"taking out what computes nothing.*first layer that differs is b"
        ):
            quant.prepare(InPlace("method").eval(), torch.randn(8, 6))

    def test_an_equalization_that_forgets_half(self, monkeypatch):
        def half(first, second):
            with torch.no_grad():
                first.weight.mul_(2)

        monkeypatch.setattr(rewrites, "equalize_pair", half)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
        with pytest.raises(TraceError, match="after equalization"):
            quant.prepare(model, torch.randn(5, 3), quant.Config(equalize=True))

    def test_a_number_that_was_baked_in(self):
        class Drifts(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc, self.calls = nn.Linear(3, 3), 0

            def forward(self, x):
                self.calls += 1
                return self.fc(x) * self.calls

        with pytest.raises(TraceError, match="state"):
            quant.prepare(Drifts().eval(), torch.randn(2, 3))


class TestTheFloatModel:
    @torch.no_grad()
    def test_correction_and_training_do_not_move_it(self):
        model, batches = build("cnn")
        given = copy.deepcopy(model)
        qmodel = quant.prepare(model, batches[0], quant.Config(weights="int3"))
        quant.calibrate(qmodel, batches, show_progress=False)
        plain = qmodel(batches[0])
        quant.correct_bias(qmodel, batches, show_progress=False)
        assert not torch.equal(qmodel(batches[0]), plain)
        assert distance(given, qmodel, batches[0]) < 1e-5
        back = quant.restore(qmodel)
        for (key, a), b in zip(given.state_dict().items(), back.state_dict().values(), strict=True):
            assert torch.equal(a, b), key
        for parameter in (*qmodel.parameters(), *model.parameters()):
            parameter.add_(1)
        original = quant.float_model(copy.deepcopy(qmodel))
        for (key, a), b in zip(given.state_dict().items(), original.state_dict().values(), strict=True):
            assert torch.equal(a, b), key

    @torch.no_grad()
    def test_a_correction_is_saved_and_loaded(self):
        model, batches = build("cnn")
        qmodel = quant.prepare(model, batches[0], quant.Config(weights="int3"))
        quant.calibrate(qmodel, batches, show_progress=False)
        fresh = copy.deepcopy(qmodel)
        quant.correct_bias(qmodel, batches, show_progress=False)
        expected = qmodel(batches[0])
        assert torch.equal(copy.deepcopy(qmodel)(batches[0]), expected)
        assert torch.equal(pickle.loads(pickle.dumps(qmodel))(batches[0]), expected)
        without = fresh.state_dict()
        fresh.load_state_dict(qmodel.state_dict())
        assert torch.equal(fresh(batches[0]), expected)
        fresh.load_state_dict(without)
        assert fresh.stem.bias_correction is None

    def test_it_is_no_part_of_the_module(self):
        model, batches = build("mlp")
        qmodel = quant.prepare(model, batches[0])
        names = {n for n, _ in qmodel.named_parameters()} | set(qmodel.state_dict())
        assert not any("float" in n or "origin" in n for n in names)
        assert quant.float_model(copy.deepcopy(qmodel)) is quant.float_model(qmodel)
        small = quant.prepare(model, batches[0], keep_float=False)
        with pytest.raises(ConfigError, match="float_model=model"):
            quant.float_model(small)


@torch.no_grad()
def test_a_dead_filter_keeps_its_bias_in_the_integer_reference():
    """int32 biases of channels whose weights are nearly zero: against the float model, not the simulation."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )
    for layer, scale in ((model[0], 1e-9), (model[2], 1e-12), (model[5], 1e-20)):
        layer.weight[:3] *= scale
        layer.bias[:3] = torch.tensor([1.0, -2.0, 3.0])
    model.eval()
    x = torch.rand(16, 1, 8, 8)
    for weights in ("int8", "int4", "int8-asym", "nf4"):
        qmodel = quant.prepare(model, x, quant.Config(weights=weights))
        quant.calibrate(qmodel, [x], show_progress=False)
        for out in (qmodel(x), quant.integer_reference(qmodel)(x)):
            assert sqnr(model(x), out) > (30 if "8" in weights else 15)
            assert (out[:, :3] - torch.tensor([1.0, -2.0, 3.0])).abs().max() < 0.05
        readers = quant.input_quantizers(qmodel)
        for name, quantizers in readers.items():
            layer = qmodel.get_submodule(name)
            codes = integer_bias(layer.effective_bias(), quantizers[0].scale, layer.weight_quant.scale)
            assert int(codes.abs().max()) < 2**31 - 1
