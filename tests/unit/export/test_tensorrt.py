"""The form for GPUs: what TensorRT asks for, in the graph; its numbers, in ONNX Runtime on the CPU."""

import models
import numpy as np
import onnx
import pytest
import torch
from nets import prepared

from gradq import export, quant
from gradq.errors import ConfigError, ExportError

GPU = {"weights": "int8", "activations": "int8-sym", "embeddings": None}


def constants_and_makers(path):
    graph = onnx.load(str(path)).graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    return graph, constants, {name: node for node in graph.node for name in node.output}


@pytest.mark.parametrize("name", ["cnn", "mlp", pytest.param("transformer", marks=pytest.mark.slow)])
@torch.no_grad()
def test_s8_symmetric_with_float_biases(name, tmp_path):
    model, batches = models.build(name)
    qmodel = prepared(model, batches, **GPU)
    report = export.onnx(qmodel, tmp_path / "m.onnx", runtime="tensorrt")
    assert set(report.forms) == {"int8"}
    assert report.metadata["gradq.runtime"] == "tensorrt"
    graph, constants, makers = constants_and_makers(tmp_path / "m.onnx")
    assert not any(value.dtype in (np.uint8, np.int32) for value in constants.values())
    products = 0
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = constants[node.input[2]]
            assert zero.dtype == np.int8
            assert not zero.any()
        if node.op_type == "QuantizeLinear":
            readers = [n.op_type for n in graph.node if node.output[0] in n.input]
            assert set(readers) == {"DequantizeLinear"}
        if node.op_type in ("Conv", "Gemm", "MatMul") and makers[node.input[1]].op_type == "DequantizeLinear":
            products += 1
            weight = makers[node.input[1]]
            assert constants[weight.input[0]].dtype == np.int8
            axis = next(a.i for a in weight.attribute if a.name == "axis")
            assert constants[weight.input[0]].shape[axis] == len(constants[weight.input[1]])
            if len(node.input) > 2:
                assert constants[node.input[2]].dtype == np.float32
    assert products >= sum(report.forms.values())  # attention over two inputs reads its weight in parts
    options = export.session(tmp_path / "m.onnx", precise=True)
    out = torch.from_numpy(options.run(None, {options.get_inputs()[0].name: batches[0].numpy()})[0])
    expected = qmodel(batches[0])
    assert float((out - expected).abs().max() / expected.abs().max()) < 0.03


def test_the_preset_for_gpus_is_what_it_takes():
    config = quant.Config.for_target("gpu")
    assert str(quant.parse_format(config.activations, "activations")) == "int8-sym-tensor"
    assert str(quant.parse_format(config.weights, "weights")) == "int8-sym-channel"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"activations": "int8"}, "x has the format int8-asym-tensor; TensorRT takes static symmetric"),
        ({"activations": "int8-token"}, "TensorRT takes static symmetric"),
        ({"weights": "int4"}, r"layers\.0\.weight has the format int4-sym-channel; TensorRT takes symmetric"),
        ({"weights": "nf4"}, "TensorRT takes symmetric weights of 8 bits"),
    ],
)
def test_other_formats_are_named_and_leave_nothing(config, said, tmp_path):
    model, batches = models.build("mlp")
    with pytest.raises(ExportError, match=said):
        export.onnx(prepared(model, batches, **GPU | config), tmp_path / "m.onnx", runtime="tensorrt")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_runtime(tmp_path):
    model, batches = models.build("mlp")
    with pytest.raises(ConfigError, match="runtime is 'coreml'; legal: onnxruntime, tensorrt"):
        export.onnx(prepared(model, batches), tmp_path / "m.onnx", runtime="coreml")
