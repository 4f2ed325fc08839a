"""What `gradq.export.onnx` writes, `verify` sees, and which errors leave nothing behind."""

import json

import models
import numpy as np
import onnx
import pytest
import torch
from nets import prepared
from torch import nn

import gradq
from gradq import export, quant
from gradq.errors import (
    CalibrationError,
    ConfigError,
    ExportError,
    NonFiniteError,
    UnsupportedError,
    VerifyError,
)

BITS = "int8" if export.features() == "x86-vnni" else "int7"  # full 8 bits overflow without VNNI


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    """(path, report, calibrated model, batches): residual, strided, grouped and depthwise convolutions."""
    torch.set_num_threads(1)
    model, batches = models.build("cnn")
    qmodel = prepared(model, batches, weights=BITS)
    path = tmp_path_factory.mktemp("cnn") / "model.onnx"
    return path, export.onnx(qmodel, path, accuracy=97.5, metadata={"note": "hello"}), qmodel, batches


@pytest.fixture(scope="module")
def fp32(cnn):
    """The same model in fp32."""
    path = cnn[0].with_name("fp32.onnx")
    assert export.float_onnx(cnn[2], path) == path.stat().st_size
    return path


@pytest.fixture(scope="module")
def checked(cnn, fp32):
    """The report of `verify`; labels are what the float model chooses."""
    path, _, qmodel, batches = cnn
    model, _ = models.build("cnn")
    loader = [(x, model(x).argmax(-1)) for x in batches]
    return export.verify(
        path, qmodel, loader, seconds=0.02, batch_sizes=(1, 3), max_accuracy_loss=50, baseline=fp32,
        show_progress=False, min_speedup=None,
    )  # fmt: skip


def test_operators_are_the_fused_ones(cnn):
    path, report, _, _ = cnn
    found = export.operators(path)
    assert found.counts["QLinearConv"] == 6
    assert found.counts["QLinearAdd"] == 2
    assert found.counts["QLinearGlobalAveragePool"] == 1
    assert found.counts["QGemm"] == 1
    assert not found.float_products
    assert not found.inexact
    assert not found.unexpected
    assert report.forms == {"int8": 7}
    assert report.float_islands == []
    assert report.size_bytes == path.stat().st_size


def test_metadata(cnn):
    path, report, _, _ = cnn
    facts = {p.key: p.value for p in onnx.load(str(path)).metadata_props}
    assert facts == report.metadata
    assert facts["gradq.version"] == gradq.__version__
    assert json.loads(facts["gradq.config"])["weights"] == BITS
    assert facts["gradq.accuracy"] == "97.5"
    assert facts["note"] == "hello"


def test_no_path_of_this_machine_is_in_the_file(cnn):
    assert b"site-packages" not in cnn[0].read_bytes()
    assert b".py" not in cnn[0].read_bytes()


def test_bias_is_int32_of_scale_input_times_weight(cnn):
    graph = onnx.load(str(cnn[0])).graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    makers = {n.output[0]: n for n in graph.node}
    count = 0
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            x, w, b = (makers[name] for name in node.input)
            assert constants[b.input[0]].dtype == np.int32
            product = constants[x.input[1]] * constants[w.input[1]]
            assert np.array_equal(constants[b.input[1]], product)
            assert product.dtype == np.float32
            count += 1
    assert count == 7


def test_the_batch_is_free(cnn):
    path, _, qmodel, batches = cnn
    running, reference = export.session(path), quant.integer_reference(qmodel)
    for size in (1, 2, 4):
        x = batches[0][:size]
        assert torch.equal(torch.from_numpy(running.run(None, {"x": x.numpy()})[0]), reference(x))


def test_scales_of_activations_are_scalars(cnn):
    """With shape [1] ONNX Runtime 1.32 leaves every addition in float."""
    graph = onnx.load(str(cnn[0])).graph
    dims = {t.name: list(t.dims) for t in graph.initializer}
    assert all(dims[node.input[1]] == [] for node in graph.node if node.op_type == "QuantizeLinear")


def test_verify_compares_everything(checked, cnn):
    assert checked.ok
    assert checked.agreement.exact
    assert checked.agreement.equal == 1.0
    assert checked.agreement.batch_independent
    assert checked.agreement.repeatable
    assert checked.agreement.inputs == 12
    assert checked.agreement.same_choice == 1.0
    assert set(checked.latency) == {1, 3}
    assert checked.latency[1]["int8"].rounds >= 5
    assert checked.latency[1]["fp32"].ratio == 1.0
    assert set(checked.accuracy) == {"fp32", "int8", "reference"}
    assert checked.accuracy["fp32"] == 100.0
    assert checked.accuracy["int8"] == checked.accuracy["reference"]
    assert checked.size_bytes["int8"] == cnn[0].stat().st_size
    assert checked.compression == checked.size_bytes["fp32"] / checked.size_bytes["int8"]
    shown = str(checked)
    for word in ("smaller", "faster", "integer reference", "QLinearConv", "accuracy"):
        assert word in shown


def tampered(path, folder):
    """The same file with one more operator behind the first convolution: the runtime cannot fuse it."""
    proto = onnx.load(str(path))
    conv = next(n for n in proto.graph.node if n.op_type == "Conv")
    extra = onnx.helper.make_node("Erf", [conv.output[0]], ["bent"], name="bent")
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            if name == conv.output[0]:
                node.input[i] = "bent"
    proto.graph.node.insert(list(proto.graph.node).index(conv) + 1, extra)
    onnx.save(proto, str(folder / "bent.onnx"))
    return folder / "bent.onnx", conv.name


def test_verify_names_a_float_convolution_and_a_wrong_result(cnn, fp32, tmp_path):
    bent, name = tampered(cnn[0], tmp_path)
    with pytest.raises(VerifyError, match=f"float instead of int8: {name}") as caught:
        export.verify(bent, cnn[2], cnn[3], batch_sizes=(), baseline=fp32, show_progress=False)
    report = caught.value.report
    assert any("integer reference" in failure for failure in report.failures)
    assert "FAILED" in str(report)


def test_verify_refuses_inputs_that_do_not_fit(cnn):
    path, _, qmodel, _ = cnn
    for wrong, said in (
        (torch.rand(2, 3, 12, 12), r"input x is float32 \[2, 3, 12, 12\]; the model takes float32"),
        (torch.zeros(2, 1, 12, 12, dtype=torch.int64), "input x is int64"),
    ):
        with pytest.raises(ConfigError, match=said):
            export.verify(path, qmodel, [wrong], batch_sizes=(), show_progress=False)


# --- errors leave nothing behind ----------------------------------------------------------------------------


class Bessel(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return torch.special.bessel_j0(self.linear(x))


def refused(tmp_path, error, match, model, **options):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"before")
    with pytest.raises(error, match=match):
        export.onnx(model, path, **options)
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_an_operator_that_onnx_lacks(tmp_path):
    x = torch.rand(2, 3)
    refused(tmp_path, ExportError, "bessel_j0", prepared(Bessel().eval(), [x]))


def test_a_missing_calibration(tmp_path):
    model, batches = models.build("mlp")
    refused(tmp_path, CalibrationError, "has no range yet", quant.prepare(model, batches[0]))


def test_a_weight_with_nan(tmp_path):
    model, batches = models.build("mlp")
    qmodel = prepared(model, batches)
    qmodel.get_submodule("layers.2").weight.data[0, 0] = float("nan")
    refused(tmp_path, NonFiniteError, r"layers\.2\.weight", qmodel)


def test_a_wrong_input_shape(tmp_path, cnn):
    refused(
        tmp_path, ExportError, r"does not run on inputs \[\[2, 3, 12, 12\]\]", cnn[2],
        example_inputs=torch.rand(2, 3, 12, 12),
    )  # fmt: skip


def test_a_model_without_quantized_layers_or_of_another_type(tmp_path):
    x = torch.rand(2, 3)
    refused(tmp_path, ExportError, "no quantized layer", nn.ReLU(), example_inputs=x)
    refused(tmp_path, ConfigError, "pass example_inputs", quant.QuantLinear(3, 3))
    half = prepared(nn.Sequential(nn.Linear(3, 3)), [x]).to(torch.bfloat16)
    refused(tmp_path, ExportError, "bfloat16; export takes fp32", half)


def test_arguments_out_of_range(tmp_path, cnn):
    refused(tmp_path, ConfigError, "opset is 17", cnn[2], opset=17)
    refused(tmp_path, ConfigError, "names", cnn[2], dynamic_axes={"y": {1: "n"}})
    refused(tmp_path, ConfigError, "axis 7", cnn[2], dynamic_axes={"x": {7: "n"}})
    narrow = prepared(nn.Sequential(nn.Linear(3, 3)), [torch.rand(2, 3)], weights="int4")
    refused(tmp_path, ConfigError, "21 or more", narrow, opset=20)


def test_paths_that_cannot_be_written(tmp_path, cnn):
    with pytest.raises(ExportError, match="cannot write"):
        export.onnx(cnn[2], tmp_path / "missing" / "model.onnx")
    with pytest.raises(ExportError, match="is a folder"):
        export.onnx(cnn[2], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ExportError, match="does not exist"):
        export.session(tmp_path / "none.onnx", precise=False)
    (tmp_path / "bad.onnx").write_bytes(b"not onnx")
    with pytest.raises(ExportError, match="cannot"):
        export.session(tmp_path / "bad.onnx")


def test_a_missing_package_names_the_install_command(tmp_path, cnn, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install 'gradq\[export\]'"):
        export.onnx(cnn[2], tmp_path / "model.onnx")


def test_prepared_models_only_where_the_graph_is_needed():
    with pytest.raises(UnsupportedError):
        quant.prepare_info(nn.Linear(2, 2))
