"""fp8 (e4m3): rounding as torch does it, gradients, refusals, and the file in onnx's reference evaluator."""

import models
import numpy as np
import onnx
import pytest
import torch
from nets import prepared
from onnx.reference import ReferenceEvaluator

from gradq import export, quant
from gradq.errors import ExportError, SpecError, UnsupportedError
from gradq.quant.config import processor_notice

FP8 = {"weights": "fp8", "activations": "fp8", "embeddings": None}


@torch.no_grad()
def test_values_are_those_of_the_type_and_the_largest_is_448_scales():
    torch.manual_seed(0)
    weight = torch.randn(6, 40) * torch.logspace(-3, 3, 6)[:, None]
    quantizer = quant.WeightQuant("fp8", weight.shape)
    quantizer.fit(weight)
    assert torch.allclose(quantizer.scale * 448, weight.abs().amax(1), rtol=1e-6)
    got = quantizer(weight)
    expected = (weight / quantizer.scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(got, expected * quantizer.scale[:, None])
    assert (
        float(((got - weight).abs() / weight.abs().clamp(min=1e-2 * weight.abs().max(1)[0][:, None])).max())
        < 1 / 15
    )
    bits = quantizer.quantize(weight).to(torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(bits, expected)


def test_gradients_pass_inside_the_range():
    quantizer = quant.ActQuant("fp8")
    quantizer.set_range(torch.tensor([1.0]), torch.tensor([0]))
    x = torch.tensor([0.3, -5.0, 448.0, 449.0, -1e4], requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    assert y.tolist() == [0.3125, -5.0, 448.0, 448.0, -448.0]
    assert x.grad.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_no_integer_kernel_is_warned_of():
    assert not processor_notice(quant.Config(**FP8), "flags: avx2")


def test_the_format_is_written_as_fp8():
    for role, text in (("weights", "fp8-channel"), ("activations", "fp8-tensor")):
        fmt = quant.parse_format("fp8", role)
        assert (str(fmt), fmt.symmetric, fmt.is_uniform, fmt.is_float8) == (text, True, False, True)
        assert quant.parse_format(str(fmt), role) == fmt
    with pytest.raises(SpecError, match="uniform, or fp8"):
        quant.parse_format("nf4", "activations")


@pytest.mark.parametrize("name", ["cnn", "mlp", "transformer"])
@torch.no_grad()
def test_the_file_computes_the_simulation(name, tmp_path):
    model, batches = models.build(name)
    qmodel = prepared(model, batches, **FP8)
    path = tmp_path / "m.onnx"
    report = export.onnx(qmodel, path, runtime="tensorrt")
    assert set(report.forms) == {"fp8"}
    graph = onnx.load(str(path)).graph
    constants = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert constants[node.input[2]].data_type == onnx.TensorProto.FLOAT8E4M3FN
    x, expected = batches[0].numpy(), qmodel(batches[0]).numpy()
    truth = model(batches[0]).numpy()
    for run in (ReferenceEvaluator(str(path)), export.session(path)):
        found = run.run(None, {graph.input[0].name: x})[0]
        close = np.abs(found - expected).max() / np.abs(expected).max()
        assert close < 0.03, (type(run).__name__, close)  # other orders of adding round a few codes elsewhere
        assert np.square(truth).sum() > 100 * np.square(found - truth).sum()


@torch.no_grad()
def test_what_cannot_take_it_says_so(tmp_path):
    model, batches = models.build("mlp")
    qmodel = prepared(model, batches, **FP8)
    with pytest.raises(ExportError, match="write it with runtime='tensorrt'"):
        export.onnx(qmodel, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="runtime='tensorrt'"):
        export.pt2(qmodel, tmp_path / "m.pt2")
    with pytest.raises(UnsupportedError, match="no integer arithmetic"):
        quant.integer_reference(qmodel)
