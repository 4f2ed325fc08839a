"""nn.LSTM on codes: against torch's own kernel, and packed sequences."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gradq import quant
from gradq.quant.batches import float_mode
from gradq.quant.lstm import QuantLSTM


def sqnr(truth, given):
    truth, given = truth.double(), given.double()
    return float(10 * torch.log10(truth.square().sum() / (truth - given).square().sum().clamp(min=1e-300)))


SHAPES = {
    "plain": {},
    "deep, both ways, batch first": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "no bias": {"bias": False, "num_layers": 2},
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("states", [False, True])
@torch.no_grad()
def test_outputs_and_states_are_those_of_torch_up_to_rounding(kind, states):
    torch.manual_seed(0)
    layer, x = nn.LSTM(12, 16, **SHAPES[kind]).eval(), torch.randn(5, 3, 12)
    given = SHAPES[kind]
    batch = 5 if given.get("batch_first") else 3
    number = given.get("num_layers", 1) * (2 if given.get("bidirectional") else 1)
    hx = (torch.randn(number, batch, 16), torch.randn(number, batch, 16)) if states else None
    mine = QuantLSTM.from_float(layer, "int8")
    y, (h, c) = layer(x, hx)
    my, (mh, mc) = mine(x, hx)
    assert my.shape == y.shape
    assert mh.shape == h.shape
    assert mc.shape == c.shape
    for truth, value in ((y, my), (h, mh), (c, mc)):
        assert 30 < sqnr(truth, value) < 90  # near, and quantized
    with float_mode(mine):
        assert torch.equal(mine(x, hx)[0], y)


@torch.no_grad()
def test_one_sequence_without_a_batch_axis():
    torch.manual_seed(0)
    layer, x = nn.LSTM(12, 16).eval(), torch.randn(5, 12)
    mine = QuantLSTM.from_float(layer, "int8")
    (y, (h, _)), (my, (mh, _)) = layer(x), mine(x)
    assert my.shape == y.shape
    assert mh.shape == h.shape
    assert sqnr(y, my) > 30


@pytest.mark.parametrize("sorted_", [False, True])
@torch.no_grad()
def test_packed_sequences_end_where_they_end(sorted_):
    torch.manual_seed(0)
    layer = nn.LSTM(12, 16, 2, bidirectional=True, batch_first=True).eval()
    lengths = [7, 5, 4, 1] if sorted_ else [4, 7, 1, 5]
    packed = pack_padded_sequence(torch.randn(4, 7, 12), lengths, batch_first=True, enforce_sorted=sorted_)
    mine = QuantLSTM.from_float(layer, "int8")
    (y, (h, c)), (my, (mh, mc)) = layer(packed), mine(packed)
    assert torch.equal(my.batch_sizes, y.batch_sizes)
    pairs = ((y.data, my.data), (h, mh), (c, mc))
    assert all(sqnr(a, b) > 30 for a, b in pairs)
    assert pad_packed_sequence(my, batch_first=True)[1].tolist() == lengths


class Reader(nn.Module):
    """One LSTM that is called twice, and a head."""

    def __init__(self, **kw):
        super().__init__()
        self.lstm, self.head = nn.LSTM(12, 12, batch_first=True, **kw), nn.Linear(12, 3)

    def forward(self, x):
        y, state = self.lstm(x)
        y, (h, _) = self.lstm(y, state)
        return self.head(y[:, -1] + h[-1])


@torch.no_grad()
def test_restore_gives_the_layer_back_and_the_reference_computes_in_integers():
    torch.manual_seed(0)
    model, x = Reader().eval(), torch.randn(4, 6, 12)
    q = quant.prepare(model, x, quant.Config(weights="int7"))
    quant.calibrate(q, [x], show_progress=False)
    assert isinstance(q.lstm, QuantLSTM)
    assert not quant.prepare_info(q).float_islands
    assert sqnr(model(x), q(x)) > 25
    assert sqnr(q(x), quant.integer_reference(q)(x)) > 40
    back = quant.restore(q)
    assert type(back.lstm) is nn.LSTM
    assert torch.equal(back(x), model(x))
    copied = copy.deepcopy(q)
    assert torch.equal(copied(x), q(x))


def test_it_trains():
    torch.manual_seed(0)
    model, x = Reader(), torch.randn(4, 6, 12)
    q = quant.prepare(model.train(), x, quant.Config(weights="int4"))
    quant.calibrate(q, [x], show_progress=False)
    q.train()(x).square().sum().backward()
    for name, parameter in q.named_parameters():
        if "lstm" in name:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    ("layer", "config", "words"),
    [
        (nn.LSTM(12, 12, proj_size=4), {}, "proj_size"),
        (nn.GRU(12, 12), {}, "none for nn.GRU"),
        (nn.RNN(12, 12), {}, "two nn.Linear"),
        (nn.LSTM(12, 12), {"activations": None}, "together with quantized activations"),
        (nn.LSTM(12, 12), {"activations": "int8-sym"}, "activations='int8'"),
        (nn.LSTM(12, 12), {"weights": "uint8"}, "symmetric weights"),
    ],
)
def test_what_stays_in_float_says_why_traced_or_swapped(layer, config, words):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory, self.head = layer, nn.Linear(12, 2)

        def forward(self, x):
            y, _ = self.memory(x)
            return self.head(nn.functional.pad(y, (0, 12 - y.shape[-1])))

    model, x = Model().eval(), torch.randn(3, 2, 12)
    q = quant.prepare(model, x, quant.Config(**config))
    assert words in dict(quant.prepare_info(q).float_islands)["memory"]
    swapped = quant.swap(copy.deepcopy(model), quant.Config(**config))
    assert words in dict(quant.swap_info(swapped).float_islands)["memory"]
