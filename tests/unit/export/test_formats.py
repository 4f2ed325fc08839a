"""Weights in every form, activations dynamic and static, layers of every kind."""

import models
import onnx
import pytest
import torch
from nets import prepared
from torch import nn

from gradq import export, quant
from gradq.export.weights import pack_nibbles

BITS = "int8" if export.features() == "x86-vnni" else "int7"


def run(path, *inputs):
    running = export.session(path)
    feed = {i.name: x.numpy() for i, x in zip(running.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(y) for y in running.run(None, feed)]


def close(got, expected, share=1.0, tolerance=2e-3):
    """Codes may flip where float arithmetic differs in the last bit: few outputs, by little."""
    scale = float(expected.abs().max())
    assert float(((got - expected).abs() <= tolerance * scale).double().mean()) >= share


def test_nibbles_are_packed_low_half_first():
    assert pack_nibbles(torch.tensor([1, -2, 7]).numpy()) == bytes([0xE1, 0x07])


class Mixed(nn.Module):
    """An embedding and linear layers on three axes, one of them without bias, with a max pool between."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(13, 32)
        self.first, self.second, self.third = (
            nn.Linear(32, 24),
            nn.Linear(12, 32, bias=False),
            nn.Linear(32, 5),
        )

    def forward(self, ids):
        x = torch.relu(self.first(self.tokens(ids)))
        x = nn.functional.max_pool1d(x, 2)
        return self.third(self.second(x).transpose(1, 2).transpose(1, 2))


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    """Weights: int4 embedding, nf4, fitted codebook of 8 entries, int3; activations static."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batches = [torch.randint(0, 13, (4, 6)) for _ in range(3)]
    pairs = (("first", "nf4"), ("second", "codebook3"), ("third", "int3-tensor"))
    qmodel = prepared(Mixed().eval(), batches, overrides=pairs, embeddings="int4", placement="full")
    path = tmp_path_factory.mktemp("static") / "model.onnx"
    report = export.onnx(qmodel, path, dynamic_axes={"ids": {1: "length"}})
    return path, report, qmodel, batches


def test_narrow_weights_take_four_bits_and_compute_in_int8(static):
    path, report, qmodel, batches = static
    assert report.opset == 21
    assert report.forms == {"int4": 2, "table": 2}
    graph = onnx.load(str(path)).graph
    kinds = {t.name: t.data_type for t in graph.initializer}
    assert kinds["tokens.weight.codes"] == onnx.TensorProto.INT4
    assert kinds["first.weight.indices"] == onnx.TensorProto.UINT4
    found = export.operators(path)
    assert found.counts["QGemm"] == 3
    assert not found.float_products
    assert torch.equal(run(path, batches[0])[0], quant.integer_reference(qmodel)(batches[0]))


def test_other_axes_can_be_free(static):
    path, _, qmodel, _ = static
    ids = torch.randint(0, 13, (3, 10))
    assert torch.equal(run(path, ids)[0], quant.integer_reference(qmodel)(ids))


@pytest.mark.parametrize(
    ("activations", "weights", "operator"),
    [
        ("int8-batch", BITS, "DynamicQuantizeMatMul"),
        pytest.param("int8-token", "int4-g16", "MatMulNBits", marks=pytest.mark.slow),
        pytest.param("int8-token", BITS, "MatMulInteger", marks=pytest.mark.slow),
        ("int8-sym-token", BITS, "MatMulInteger"),
        pytest.param("int8", "int4-g16", "MatMulNBits", marks=pytest.mark.slow),
        pytest.param(None, "int8", "Gemm", marks=pytest.mark.slow),
        pytest.param(None, "int4-g10", "Gemm", marks=pytest.mark.slow),
    ],
)
def test_dynamic_and_grouped(activations, weights, operator, tmp_path):
    model, batches = models.build("mlp")
    qmodel = prepared(model, batches, activations=activations, weights=weights)
    path = tmp_path / "model.onnx"
    report = export.onnx(qmodel, path)
    counts = export.operators(path).counts
    assert any(name.endswith(operator) for name in counts), counts
    nbits = operator == "MatMulNBits"
    tolerance = 5e-2 if nbits else 1e-5  # MatMulNBits quantizes its input itself
    close(run(path, batches[0])[0], quant.integer_reference(qmodel)(batches[0]), tolerance=tolerance)
    if nbits or operator == "Gemm":
        assert {"MatMulNBits": "nbits"}.get(operator, "float") in report.forms
    if operator == "Gemm":
        assert all("input stays in float" in reason for _, reason in report.float_islands)
        export.verify(path, qmodel, batches, batch_sizes=(), show_progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("target", ["x86-vnni", "arm", "edge-int4"])
def test_every_kind_of_layer(name, target, tmp_path):
    """Transformers, recurrent cells, one- and three-dimensional convolutions, in three targets' formats."""
    model, batches = models.build(name)
    qmodel = quant.prepare(model, batches[0], quant.Config.for_target(target))
    quant.calibrate(qmodel, batches, show_progress=False)
    path = tmp_path / "model.onnx"
    export.onnx(qmodel, path)
    expected = torch.utils._pytree.tree_leaves(quant.integer_reference(qmodel)(batches[0]))
    for got, want in zip(run(path, batches[0]), expected, strict=True):
        close(got, want, share=0.99, tolerance=5e-2 if target == "edge-int4" else 2e-3)
    unexpected = export.operators(path).unexpected
    if target == "arm" and export.features() == "x86-vnni":
        # there ONNX Runtime 1.32 leaves s8 activations in float: right, but slow. With
        # session.qdqisint8allowed it does not, and is slower still (benchmarks/results/int8_tuning.md)
        unexpected = [name for name in unexpected if "on a dequantized weight" not in name]
    assert not unexpected


@pytest.mark.slow
def test_layers_placed_by_hand(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(quant.QuantConv2d(1, 4, 3, padding="same", padding_mode="reflect"), nn.ReLU())
    x = torch.rand(2, 1, 6, 6)
    quant.calibrate(model, [x], show_progress=False)
    export.onnx(model, tmp_path / "m.onnx", example_inputs=x)
    assert torch.equal(run(tmp_path / "m.onnx", x)[0], quant.integer_reference(model)(x))


@pytest.mark.slow
def test_fixed_batch_and_external_data(tmp_path, monkeypatch):
    from gradq.export import write

    layers = nn.Linear(12, 200), nn.ReLU(), nn.Linear(200, 4)
    model = nn.Sequential(*layers).eval()  # onnx keeps tensors below 1 KB inside
    batches = [torch.randn(6, 12) for _ in range(2)]
    qmodel = prepared(model, batches)
    monkeypatch.setattr(write, "_EXTERNAL_FROM", 100)
    report = export.onnx(qmodel, tmp_path / "m.onnx", dynamic_batch=False)
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    assert report.size_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert export.session(tmp_path / "m.onnx").get_inputs()[0].shape == [6, 12]
    assert torch.equal(run(tmp_path / "m.onnx", batches[0])[0], quant.integer_reference(qmodel)(batches[0]))
