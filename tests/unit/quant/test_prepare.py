"""prepare: untouched originals, kept names, one quantizer a tensor, undo, and errors that name the place."""

import copy
import pickle

import pytest
import torch
from models import NAMES, build
from torch import nn

from gradq import quant
from gradq.errors import ConfigError, NonFiniteError, TraceError, UnsupportedError
from gradq.quant.batches import float_mode
from gradq.quant.calibrate import quantizers


def ready(name, config=None):
    model, batches = build(name)
    qmodel = quant.prepare(model, batches[0], config)
    quant.calibrate(qmodel, batches, show_progress=False)
    return model, batches, qmodel


def leaves(out):
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize("name", NAMES)
class TestEveryModel:
    @torch.no_grad()
    def test_quantized_is_close_to_float_and_not_equal(self, name):
        model, batches, qmodel = ready(name)
        for a, b in zip(leaves(model(batches[0])), leaves(qmodel(batches[0])), strict=True):
            error = float((a - b).square().sum() / a.square().sum())
            assert 0 < error < 5e-3

    @torch.no_grad()
    def test_float_mode_computes_the_float_model(self, name):
        model, batches, qmodel = ready(name)
        with float_mode(qmodel):
            for a, b in zip(leaves(model(batches[1])), leaves(qmodel(batches[1])), strict=True):
                assert torch.allclose(a, b, atol=1e-5)

    def test_the_model_is_untouched_and_names_are_kept(self, name):
        model, batches = build(name)
        before = copy.deepcopy(model)
        model.train()
        qmodel = quant.prepare(model, batches[0])
        quant.calibrate(qmodel, batches, show_progress=False)
        optimizer = torch.optim.SGD(qmodel.parameters(), 0.1)
        sum(out.square().sum() for out in leaves(qmodel(batches[0]))).backward()
        optimizer.step()
        assert model.training
        assert qmodel.training
        assert not hasattr(model, "mode_constant_0")
        for (key, a), b in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
            assert torch.equal(a, b), key
        assert all(p.grad is None for p in model.parameters())
        own = {k for k, _ in qmodel.named_parameters() if not k.endswith("log2_scale")}
        folded = {r.batch_norm for r in quant.prepare_info(qmodel).folded}
        expected = {k for k, _ in model.named_parameters() if k.rpartition(".")[0] not in folded}
        assert expected <= own
        assert len(own - expected) == sum(
            model.get_submodule(r.layer).bias is None for r in quant.prepare_info(qmodel).folded
        )

    @torch.no_grad()
    def test_restore_gives_the_model_back_bit_for_bit(self, name):
        model, _, qmodel = ready(name)
        back = quant.restore(qmodel)
        assert type(back) is type(model)
        for (key, a), (other, b) in zip(model.state_dict().items(), back.state_dict().items(), strict=True):
            assert key == other
            assert torch.equal(a, b), key

    @torch.no_grad()
    def test_copies_compute_the_same(self, name):
        _, batches, qmodel = ready(name)
        expected = leaves(qmodel(batches[0]))
        fresh = quant.prepare(build(name)[0], batches[0])
        fresh.load_state_dict(qmodel.state_dict())
        exported = torch.export.export(qmodel, (batches[0],)).module()
        pickled = pickle.loads(pickle.dumps(qmodel))
        assert (
            quant.prepare_info(copy.deepcopy(pickled)).activations == quant.prepare_info(qmodel).activations
        )
        for candidate in (copy.deepcopy(qmodel), pickled, fresh, exported):
            for a, b in zip(expected, leaves(candidate(batches[0])), strict=True):
                assert torch.equal(a, b)

    def test_every_parameter_gets_a_gradient(self, name):
        """DDP fails on a parameter without one."""
        _, batches, qmodel = ready(name)
        qmodel.train()
        sum(out.square().sum() for out in leaves(qmodel(batches[0]))).backward()
        assert [n for n, p in qmodel.named_parameters() if p.grad is None] == []

    def test_each_tensor_has_one_quantizer(self, name):
        _, _, qmodel = ready(name)
        nodes = [
            n
            for n in qmodel.graph.nodes
            if n.op == "call_module" and isinstance(qmodel.get_submodule(n.target), quant.ActQuant)
        ]
        sources = [n.args[0] for n in nodes]
        assert len(set(sources)) == len(sources) == len(quant.prepare_info(qmodel).activations)
        # nothing is quantized twice in a row, through whatever only moves elements
        from gradq.quant.operators import source_of

        for node in nodes:
            assert source_of(node.args[0], qmodel) not in nodes


def test_compiled_model_computes_and_trains_the_same():
    torch._dynamo.reset()
    _, batches, qmodel = ready("cnn")
    compiled = torch.compile(qmodel, backend="aot_eager", fullgraph=True)
    out, expected = compiled(batches[0]), qmodel(batches[0])
    assert torch.equal(out, expected)
    out.sum().backward()
    grads = [p.grad.clone() for p in qmodel.parameters()]
    qmodel.zero_grad()
    expected.sum().backward()
    for a, p in zip(grads, qmodel.parameters(), strict=True):
        assert torch.allclose(a, p.grad, rtol=1e-4, atol=1e-6)


def test_placement_in_a_residual_network():
    """Input, every ReLU, both inputs of each addition, the pool; no output, nothing between conv and ReLU."""
    _, _, qmodel = ready("cnn")
    assert quant.prepare_info(qmodel).activations == [
        "quant_x", "quant_relu",
        "quant_relu_1", "quant_blocks_0_conv2", "quant_relu6",
        "quant_relu_2", "quant_blocks_1_conv2", "quant_relu6_1",
        "quant_relu_3", "quant_mean",
    ]  # fmt: skip


def test_placement_in_a_transformer_is_the_inputs_of_matmuls():
    _, _, qmodel = ready("gpt")
    assert quant.prepare_info(qmodel).activations == [
        "quant_norm",
        "quant_scaled_dot_product_attention",
        "quant_add_1",
    ]
    full = quant.prepare(*(lambda m, b: (m, b[0]))(*build("gpt")), quant.Config(placement="full"))
    assert len(quant.prepare_info(full).activations) > 3


def test_tied_weights_share_one_quantizer_and_stay_tied():
    _, _, qmodel = ready("gpt")
    assert qmodel.head.weight is qmodel.tokens.weight
    assert qmodel.head.weight_quant is qmodel.tokens.weight_quant


def test_arguments_left_out_keep_their_defaults():
    model, batches = build("gpt")
    qmodel = quant.prepare(model, batches[0])
    assert [n.name for n in qmodel.graph.nodes if n.op == "placeholder"] == ["tokens"]
    both = quant.prepare(model, {"tokens": batches[0], "targets": batches[0]})
    quant.calibrate(both, [{"tokens": b, "targets": b, "other": 1} for b in batches], show_progress=False)
    assert both(batches[0], batches[0]).ndim == 0


def test_functional_dropout_follows_the_mode():
    _, batches, qmodel = ready("cnn")
    qmodel.train()
    assert not torch.equal(qmodel(batches[0]), qmodel(batches[0]))
    qmodel.eval()
    assert torch.equal(qmodel(batches[0]), qmodel(batches[0]))


def test_dropout_and_batch_norm_keep_their_settings():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, eps=0.01, momentum=0.37), nn.Dropout(0.123))
    qmodel = quant.prepare(model, torch.randn(2, 1, 4, 4), quant.Config(batch_norm="train"))
    conv = qmodel.get_submodule("0")
    assert (conv.bn.eps, conv.bn.momentum) == (0.01, 0.37)
    assert qmodel.get_submodule("2").p == 0.123


class TestBatchNorm:
    def test_live_statistics_follow_the_float_model(self):
        model, batches = build("cnn")
        qmodel = quant.prepare(model, batches[0], quant.Config(batch_norm="train"))
        quant.calibrate(qmodel, batches, show_progress=False)
        reference = copy.deepcopy(model).train()
        qmodel.train()
        for batch in batches:
            reference(batch)
            qmodel(batch)
        for name in ("stem", "blocks.0.conv1"):
            bn = {"stem": reference.bn, "blocks.0.conv1": reference.blocks[0].bn1}[name]
            live = qmodel.get_submodule(name).bn
            assert int(live.num_batches_tracked) == int(bn.num_batches_tracked)
            assert torch.allclose(live.running_mean, bn.running_mean, atol=0.02)
            assert torch.allclose(live.running_var, bn.running_var, rtol=0.1)

    @torch.no_grad()
    def test_finalize_keeps_the_function(self):
        model, batches = build("cnn")
        model.bn.weight[0] = 0.0  # a dead channel must not divide by zero
        qmodel = quant.prepare(model, batches[0], quant.Config(batch_norm="train"))
        quant.calibrate(qmodel, batches, show_progress=False)
        expected = qmodel(batches[0])
        assert expected.isfinite().all()
        folded = quant.finalize(copy.deepcopy(qmodel))
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        step = max(float(q.scale) for q in quantizers(folded).values())
        assert torch.allclose(folded(batches[0]), expected, atol=step)
        assert torch.allclose(quant.restore(folded)(batches[0]), model(batches[0]), atol=1e-5)

    def test_restore_after_training_computes_what_was_learned(self):
        model, batches, qmodel = ready("cnn")
        with torch.no_grad():
            for p in qmodel.parameters():
                p.add_(0.01 * torch.randn_like(p)) if p.ndim > 1 else None
            qmodel.stem.bias.add_(0.1)
            back = quant.restore(qmodel)
            with float_mode(qmodel):
                assert torch.allclose(back(batches[0]), qmodel(batches[0]), atol=1e-4)
        assert not torch.allclose(back.stem.weight, model.stem.weight)
        assert torch.equal(back.bn.running_var, model.bn.running_var)

    def test_frozen_statistics_stay(self):
        model, batches = build("cnn")
        qmodel = quant.prepare(model, batches[0], quant.Config(batch_norm="train"))
        quant.calibrate(qmodel, batches, show_progress=False)
        schedule = quant.RangeSchedule(qmodel, freeze_batch_norm_at=1)
        qmodel.train()
        qmodel(batches[0])
        schedule.step()
        qmodel.train()
        before = qmodel.stem.bn.running_mean.clone()
        qmodel(batches[1])
        assert torch.equal(qmodel.stem.bn.running_mean, before)


def test_equalization_keeps_the_float_function_and_helps_per_tensor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        factors = torch.logspace(-2, 2, 8)
        model[0].weight.mul_(factors.view(-1, 1, 1, 1))
        model[0].bias.mul_(factors)
        model[2].weight.div_(factors.view(1, -1, 1, 1))
    x = torch.randn(4, 3, 9, 9)
    errors = []
    for equalize in (False, True):
        config = quant.Config(weights="int8-tensor", activations=None, equalize=equalize)
        qmodel = quant.prepare(model, x, config)
        with float_mode(qmodel), torch.no_grad():
            assert torch.allclose(qmodel(x), model(x), rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            errors.append(float((qmodel(x) - model(x)).square().mean()))
    assert errors[1] < errors[0] / 5


def test_skip_and_overrides():
    model, batches = build("cnn")
    config = quant.Config(skip=("blocks.1.*", "head"), overrides=(("stem", "int4"), ("blocks.*", "nf4")))
    qmodel = quant.prepare(model, batches[0], config)
    assert type(qmodel.head) is nn.Linear
    assert str(qmodel.stem.weight_quant.format) == "int4-sym-channel"
    assert str(qmodel.get_submodule("blocks.0.conv1").weight_quant.format) == "nf4-channel"
    islands = dict(quant.prepare_info(qmodel).float_islands)
    assert islands["head"] == "skipped by the configuration"
    assert "blocks.1.conv1" in islands


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        if x.sum() > 0:  # depends on the data
            x = -x
        return self.layer(x)


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.odd, self.head = Untraceable(), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.odd(x))


def test_untraceable_models_name_the_line_and_the_way_out():
    with pytest.raises(TraceError, match=r"test_prepare\.py:\d+ in forward: if x\.sum\(\) > 0:") as caught:
        quant.prepare(Holder(), torch.ones(1, 3))
    assert "quant.swap(model)" in str(caught.value)
    qmodel = quant.prepare(Holder(), torch.ones(1, 3), quant.Config(skip=("odd",)))
    assert isinstance(qmodel.head, quant.QuantLinear)
    assert isinstance(qmodel.odd, Untraceable)


class TwoPaths(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x):
        return self.a(x) if self.training else torch.relu(self.a(x))


def test_a_structure_that_depends_on_the_mode_is_for_evaluation_only():
    qmodel = quant.prepare(TwoPaths(), torch.ones(1, 3))
    assert not qmodel.training
    with pytest.raises(TraceError, match=r"evaluation only: TwoPaths\.forward"):
        qmodel.train()


def test_other_refusals_name_what_and_where():
    model, batches = build("mlp")
    with torch.no_grad():
        model.layers[2].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"parameter layers\.2\.weight holds NaN"):
        quant.prepare(model, batches[0])
    with pytest.raises(ConfigError, match=r"example_inputs do not fit MLP\.forward"):
        quant.prepare(build("mlp")[0], (batches[0], batches[0]))
    with pytest.raises(ConfigError, match="example_inputs is a int"):
        quant.prepare(build("mlp")[0], 3)
    with pytest.raises(UnsupportedError, match="not made by"):
        quant.restore(model)
    attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=3)
    with pytest.raises(UnsupportedError, match="kdim"):
        quant.QuantMultiheadAttention.from_float(attention, "int8", None, name="a")


@torch.no_grad()
def test_attention_is_the_torch_layer():
    """Masks, padding, both layouts, weights or not, one to three inputs."""
    torch.manual_seed(0)
    for batch_first in (False, True):
        layer = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
        a, b, c = (torch.randn(3, 3, 8) for _ in range(3))
        mask = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)
        padding = torch.tensor([[False, False, True], [False] * 3, [False] * 3])
        for inputs, count in (((a, a, a), 1), ((a, b, b), 2), ((a, b, c), 3)):
            own = quant.QuantMultiheadAttention.from_float(
                layer, "int8", "int8", num_inputs=count, name="m"
            ).eval()
            for kw in (
                {},
                {"attn_mask": mask},
                {"key_padding_mask": padding, "need_weights": False},
                {"average_attn_weights": False},
            ):
                with float_mode(own):
                    expected, got = layer(*inputs, **kw), own(*inputs, **kw)
                assert torch.allclose(expected[0], got[0], atol=1e-6)
                assert (expected[1] is None) == (got[1] is None)
                if got[1] is not None:
                    assert torch.allclose(expected[1], got[1], atol=1e-6)


@torch.no_grad()
def test_cells_are_the_torch_cells():
    torch.manual_seed(0)
    x, h, c = torch.randn(3, 4), torch.randn(3, 5), torch.randn(3, 5)
    for cell, own, state in (
        (nn.LSTMCell(4, 5), quant.QuantLSTMCell, (h, c)),
        (nn.GRUCell(4, 5, bias=False), quant.QuantGRUCell, h),
    ):
        mine = own.from_float(cell, "int8", "int8", name="cell")
        with float_mode(mine):
            for hx in (None, state):
                for a, b in zip(leaves(cell(x, hx)), leaves(mine(x, hx)), strict=True):
                    assert torch.allclose(a, b, atol=1e-6)


def test_layers_placed_by_hand():
    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = quant.QuantEmbedding(7, 6)
            self.conv = quant.QuantConv1d(6, 5, 3, padding=1, name="conv")
            self.head = quant.QuantLinear(5, 2, weights="int4", name="head")
            self.squash = quant.ActQuant("int8", name="squash")

        def forward(self, x):
            y = self.squash(torch.relu(self.conv(self.embed(x).transpose(1, 2))).mean(2))
            if y.sum() > 1e9:  # fx could not trace this
                return self.head(-y)
            return self.head(y)

    torch.manual_seed(0)
    model = ByHand()
    batches = [torch.randint(0, 7, (4, 9)) for _ in range(2)]
    quant.calibrate(model, batches, show_progress=False)
    report = quant.sensitivity(model, batches, widths=(2, 8), show_progress=False)
    assert {r.name for r in report.rows} == {"embed.weight", "conv.weight", "head.weight"}
    with torch.no_grad():
        with float_mode(model):
            expected = model(batches[0])
        assert torch.allclose(model(batches[0]), expected, atol=0.05)
        assert torch.allclose(quant.integer_reference(model)(batches[0]), model(batches[0]), atol=0.02)
    with pytest.raises(UnsupportedError, match="not made by"):
        quant.restore(model)
