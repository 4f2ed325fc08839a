"""Whole models: the integer reference against ONNX Runtime, bit for bit, on 450 inputs.

A minimal writer of QDQ graphs stands here so that the reference is tested without the exporter, which is then
tested against the reference.
"""

import platform
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from gradq import quant
from gradq.quant.fake import ActQuant
from gradq.quant.integer import integer_bias
from gradq.quant.modules import _QuantConv

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.block1, self.down, self.block2 = Residual(16), nn.Conv2d(16, 32, 3, 2, 1), Residual(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.block1(torch.relu(self.bn(self.stem(x))))
        return self.head(self.block2(torch.relu(self.down(x))).mean((2, 3)))


class Writer:
    """QDQ by the recipe: int32 bias of scale input·weight; a ReLU that saturation implies is left out."""

    def __init__(self, qmodel):
        self.qmodel, self.nodes, self.constants = qmodel, [], []
        self.scales = {}

    def constant(self, name, value):
        self.constants.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, kind, inputs, output, **attributes):
        self.nodes.append(onnx.helper.make_node(kind, inputs, [output], **attributes))

    def quantizer(self, node, source, module):
        scale = self.constant(f"{node}_s", module.scale.detach()[0].numpy())
        zero = self.constant(f"{node}_z", module.zero_point[0].to(torch.uint8).numpy())
        self.add("QuantizeLinear", [source, scale, zero], f"{node}_q")
        self.add("DequantizeLinear", [f"{node}_q", scale, zero], node)
        self.scales[node] = module.scale.detach()

    def layer(self, node, source, module):
        codes, scale = module.weight_quant.quantize(module.weight), module.weight_quant.scale.detach()
        values = {
            "w": (codes.to(torch.int8).numpy(), scale.numpy(), np.zeros(len(codes), np.int8)),
            "b": (
                integer_bias(module.bias, self.scales[source], scale).numpy(),
                (self.scales[source] * scale).numpy(),
                np.zeros(len(codes), np.int32),
            ),
        }
        for kind, parts in values.items():
            names = [self.constant(f"{node}_{kind}{i}", part) for i, part in enumerate(parts)]
            self.add("DequantizeLinear", names, f"{node}_{kind}", axis=0)
        inputs = [source, f"{node}_w", f"{node}_b"]
        if isinstance(module, _QuantConv):
            padding, strides = list(module.padding) * 2, list(module.stride)
            self.add(
                "Conv", inputs, node, strides=strides, pads=padding, kernel_shape=list(module.kernel_size)
            )
        else:
            self.add("Gemm", inputs, node, transB=1)

    def write(self, shape):
        alias = {}
        for node in self.qmodel.graph.nodes:
            source = [alias.get(n.name, n.name) for n in node.all_input_nodes]
            if node.op == "call_module":
                module = self.qmodel.get_submodule(node.target)
                write = self.quantizer if isinstance(module, ActQuant) else self.layer
                write(node.name, source[0], module)
            elif node.op == "call_function" and node.target is torch.relu:
                following = self.qmodel.get_submodule(next(iter(node.users)).target)
                assert int(following.zero_point) == 0
                alias[node.name] = source[0]
            elif node.op == "call_function":
                self.add("Add", source, node.name)
            elif node.op == "call_method":
                axes = self.constant(f"{node.name}_axes", np.array([2, 3], np.int64))
                self.add("ReduceMean", [source[0], axes], node.name, keepdims=0)
            elif node.op == "output":
                out = source[0]
        make, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
        graph = onnx.helper.make_graph(
            self.nodes, "g", [make("x", kind, shape)], [make(out, kind, None)], self.constants
        )
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="bit for bit is promised per target"
)
@pytest.mark.parametrize("spec", ["int8", "int4", "int3", "nf4", "codebook4", "mixed"])
@torch.no_grad()
def test_integer_reference_is_onnx_runtime_bit_for_bit_on_450_inputs(spec, tmp_path):
    torch.manual_seed(0)
    model, data = Net(), torch.rand(450, 1, 8, 8)
    for _ in range(20):
        model(data[:64])
    model.eval()
    qmodel = quant.prepare(model, data[:2], quant.Config(weights="int8" if spec == "mixed" else spec))
    quant.calibrate(qmodel, data[:128].split(32), show_progress=False)
    if spec == "mixed":
        report = quant.sensitivity(qmodel, [data[:32]], show_progress=False)
        assert len(set(quant.assign_bits(qmodel, report, average_bits=4).values())) > 1
    written = Writer(qmodel).write(["b", 1, 8, 8])
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = runtime.InferenceSession(
        written.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    theirs = torch.from_numpy(session.run(None, {"x": data.numpy()})[0])
    mine = quant.integer_reference(qmodel)(data)
    assert torch.equal(mine, theirs)
    assert not torch.equal(qmodel(data), theirs)  # the simulation is close, and not the truth
    counts = Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node)
    assert counts["QLinearConv"] == 6
    assert counts["QGemm"] == 1
    assert counts["Conv"] == counts["Gemm"] == 0
