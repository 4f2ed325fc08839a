"""Models that fx cannot trace: through torch.export, and by name without any tracing."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional

from gradq import quant
from gradq.errors import ConfigError, TraceError, UnsupportedError
from gradq.quant.batches import float_mode, run_batch


def sqnr(a, b):
    return float(10 * torch.log10(a.square().sum() / (a - b).square().sum()))


@dataclass
class Answer:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


torch.export.register_dataclass(Answer)


class Product(nn.Module):
    """x @ weight + bias, as GPT-2's layers are written."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(inputs, outputs) * 0.3),
            nn.Parameter(torch.randn(outputs)),
        )

    def forward(self, x):
        out = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return out.view(*x.shape[:-1], -1)


class Encoder(nn.Module):
    """What Hugging Face's models do: keyword inputs, masks cut to length, branches on shapes and flags."""

    def __init__(self, width=16):
        super().__init__()
        self.words, self.places = nn.Embedding(50, width), nn.Embedding(32, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.norm, self.drop = Product(width, 2 * width), nn.LayerNorm(width), nn.Dropout(0.1)
        self.head = nn.Linear(2 * width, 5)
        self.register_buffer("causal", torch.ones(32, 32, dtype=torch.bool).tril(), persistent=False)

    def forward(self, ids, mask=None, return_hidden=False, **more):
        B, T = ids.shape
        if T > 32:
            raise ValueError("too long")
        with torch.no_grad():
            places = torch.arange(T, device=ids.device)
        h = self.words(ids) + self.places(places)[None]
        allowed = self.causal[None, None, :T, :T]
        if mask is not None:
            allowed = allowed & mask[:, None, None, :].bool()
        q, k, v = self.qkv(self.norm(h)).view(B, T, 3, 2, -1).permute(2, 0, 3, 1, 4)
        rate = 0.1 if self.training else 0.0
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=rate)
        y = y.transpose(1, 2).contiguous().view(B, T, -1)  # a copy in training, none in evaluation
        h = h + self.drop(self.out(y))
        return Answer(self.head(functional.gelu(self.up(h))), h if return_hidden else None)


@pytest.fixture(scope="module")
def encoder():
    """(model, prepared and calibrated copy, batch)."""
    torch.manual_seed(0)
    model = Encoder().train()
    batch = {"ids": torch.randint(0, 50, (3, 8)), "mask": torch.ones(3, 8, dtype=torch.int64)}
    batch["mask"][1, 5:] = 0
    qmodel = quant.prepare(model, batch)
    quant.calibrate(qmodel, [batch], show_progress=False)
    return model.eval(), qmodel.eval(), batch


class TestEncoder:
    @torch.no_grad()
    def test_the_function_the_container_and_free_axes(self, encoder):
        model, qmodel, batch = encoder
        short = {"ids": batch["ids"][:1, :5], "mask": batch["mask"][:1, :5]}
        for b in (batch, short):
            with float_mode(qmodel):
                got = qmodel(**b)
            assert type(got) is Answer
            assert torch.allclose(got.logits, model(**b).logits, atol=1e-5)
            for out in (
                qmodel(**b),
                quant.integer_reference(qmodel)(**b),
                run_batch(qmodel, {**b, "more": 1}),
            ):
                assert sqnr(model(**b).logits, out.logits) > 25
        layers = [n for n, m in qmodel.named_modules() if isinstance(m, quant.QuantLinear)]
        assert sorted(layers) == ["head", "out", "qkv", "up"]
        assert isinstance(qmodel.words, quant.QuantEmbedding)
        assert quant.prepare_info(qmodel).float_islands == []

    def test_it_trains_and_comes_back(self, encoder):
        model, qmodel, batch = encoder
        qmodel = copy.deepcopy(qmodel)
        back = quant.restore(qmodel)
        for (key, a), b in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
            assert torch.equal(a, b), key
        qmodel.train()
        a, b = qmodel(**batch), qmodel(**batch)
        assert not torch.equal(a.logits, b.logits)  # dropout, in the layer and in attention
        optimizer = torch.optim.SGD(qmodel.parameters(), 0.05)
        a.logits.square().mean().backward()
        assert all(p.grad is not None for p in qmodel.parameters())
        optimizer.step()
        qmodel.eval()
        back = quant.restore(qmodel).eval()
        with torch.no_grad(), float_mode(qmodel):
            assert torch.allclose(back(**batch).logits, qmodel(**batch).logits, atol=1e-5)
        assert not torch.equal(back.up.weight, model.up.weight)

    @torch.no_grad()
    def test_copies(self, encoder):
        _, qmodel, batch = encoder
        expected = qmodel(**batch).logits
        for candidate in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
            assert torch.equal(candidate(**batch).logits, expected)

    def test_flags_are_fixed_and_said(self, encoder):
        model, _, batch = encoder
        qmodel = quant.prepare(model, {**batch, "return_hidden": True})
        quant.calibrate(qmodel, [batch], show_progress=False)
        assert qmodel(**batch).hidden is not None
        with pytest.raises(ConfigError, match="return_hidden=True and got False"):
            qmodel(**batch, return_hidden=False)
        with pytest.raises(TraceError, match=r"prepare\(model\.train\(\)"):
            qmodel.train()


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 6)

    def forward(self, batch, scale):
        first, rest = batch["x"], batch["more"][0]
        if first.shape[1] == 4:  # control flow on a shape, behind fx's back
            first = first.clone()
            first[:, :2] += 1  # a part changed in place
        keys = sorted(batch)  # fx cannot sort a proxy's keys
        return {"out": self.a(first) * scale + self.b(rest), "keys": len(keys)}


@torch.no_grad()
def test_nested_inputs_and_parts_changed_in_place():
    torch.manual_seed(0)
    model = Nested().eval()
    args = ({"x": torch.randn(5, 4), "more": [torch.randn(5, 3)]}, torch.tensor(2.0))
    qmodel = quant.prepare(model, args)
    quant.calibrate(qmodel, [args], show_progress=False)
    with float_mode(qmodel):
        got = qmodel(*args)
    assert got["keys"] == 2
    assert torch.allclose(got["out"], model(*args)["out"], atol=1e-6)
    assert sqnr(model(*args)["out"], quant.integer_reference(qmodel)(*args)["out"]) > 25
    with pytest.raises(ConfigError, match="structure"):
        qmodel({"x": args[0]["x"]}, args[1])
    with pytest.raises(ConfigError, match=r"shape \[5, 3\]"):
        qmodel({"x": args[0]["x"][:, :3], "more": args[0]["more"]}, args[1])


def test_skipped_modules_stay_in_float_and_are_listed():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, *, names):
            return self.fc(x) * len(sorted(names))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = Inner(), nn.Linear(4, 2)

        def forward(self, x):
            h = self.inner(x, names={"a": 1, "b": 2})
            return self.head(h) if x.shape[0] > 1 else self.head(h) + 1

    model, x = Outer().eval(), torch.randn(3, 4)
    qmodel = quant.prepare(model, {"x": x}, quant.Config(skip=("inner",)))
    assert [n for n, m in qmodel.named_modules() if isinstance(m, quant.QuantLinear)] == ["head"]
    assert any(n.startswith("inner") for n, _ in quant.prepare_info(qmodel).float_islands)


class Memory(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.memory = kind(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x, lengths=None):
        if lengths is not None:
            x = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = self.memory(x)
        if lengths is not None:
            y, _ = nn.utils.rnn.pad_packed_sequence(y, batch_first=True)
        return self.head(y.mean(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@torch.no_grad()
def test_recurrent_layers_are_quantized_or_listed_and_packed_sequences_swap(kind):
    torch.manual_seed(0)
    model, x, lengths = Memory(kind).eval(), torch.randn(4, 7, 6), torch.tensor([7, 3, 5, 1])
    qmodel = quant.prepare(model, x)
    quant.calibrate(qmodel, [x], show_progress=False)
    quantized = kind is nn.LSTM
    islands = dict(quant.prepare_info(qmodel).float_islands)
    assert isinstance(qmodel.memory, quant.QuantLSTM) is quantized
    assert quantized or "none for nn.GRU" in islands["memory"]
    assert sqnr(model(x), qmodel(x)) > 25
    with pytest.raises(TraceError, match=r"quant\.swap\(model\)"):
        quant.prepare(model, (x, lengths))
    swapped = quant.swap(copy.deepcopy(model))
    quant.calibrate(swapped, [(x, lengths)], to_inputs=lambda b: b, show_progress=False)
    assert sqnr(model(x, lengths), swapped(x, lengths)) > 25
    assert [n for n, _ in quant.swap_info(swapped).float_islands] == ([] if quantized else ["memory"])


@torch.no_grad()
def test_swap_by_name_is_undone_bit_for_bit():
    torch.manual_seed(0)
    model = Encoder().eval()
    batch = {"ids": torch.randint(0, 50, (3, 8))}
    given = copy.deepcopy(model)
    out = quant.swap(model, quant.Config(skip=("head",)))
    assert out is model
    assert quant.swap_info(model).swapped == ["words", "places", "qkv", "out"]
    assert type(model.head) is nn.Linear
    quant.calibrate(model, [batch], show_progress=False)
    assert sqnr(given(**batch).logits, model(**batch).logits) > 25
    assert set(dict(given.named_parameters())) <= set(dict(model.named_parameters()))
    back = quant.restore(model)
    assert torch.equal(back(**batch).logits, given(**batch).logits)
    model.qkv.weight.mul_(1.1)
    with float_mode(model):
        assert torch.allclose(quant.restore(model)(**batch).logits, model(**batch).logits, atol=1e-6)
    with pytest.raises(UnsupportedError, match="already"):
        quant.swap(model)
    with pytest.raises(UnsupportedError, match="no layer"):
        quant.swap(nn.ReLU())
