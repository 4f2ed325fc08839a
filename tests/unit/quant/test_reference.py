"""The integer reference: against the float simulation, exact integers, and ONNX Runtime's kernels."""

import copy

import pytest
import torch
from models import NAMES, build
from torch import nn

from gradq import quant
from gradq.errors import CalibrationError, NonFiniteError, UnsupportedError
from gradq.quant.fake import ActQuant, WeightQuant
from gradq.quant.integer import (
    Accumulator,
    Codes,
    PendingSum,
    integer_bias,
    integer_conv,
    integer_linear,
    quantize_activation,
)


def ready(name, config=None):
    model, batches = build(name)
    qmodel = quant.prepare(model, batches[0], config)
    quant.calibrate(qmodel, batches, show_progress=False)
    return batches, qmodel


def leaves(out):
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "config",
    [
        quant.Config(),
        quant.Config(weights="int4", activations="int8-sym", placement="full"),
        quant.Config(weights="codebook4", embeddings="nf4"),
        quant.Config(weights="int8-asym"),
        quant.Config.for_target("edge-int4"),
        quant.Config(activations="int8-batch"),
        quant.Config(activations=None),
        quant.Config(batch_norm="train"),
    ],
    ids=["w8a8", "w4a8-full", "codebook", "asym", "edge", "dynamic", "weights-only", "live-bn"],
)
@torch.no_grad()
def test_simulation_and_reference_agree_to_a_code(name, config):
    batches, qmodel = ready(name, config)
    reference = quant.integer_reference(qmodel)
    for batch in batches:
        for a, b in zip(leaves(qmodel(batch)), leaves(reference(batch)), strict=True):
            assert a.shape == b.shape
            # a few codes differ by one: far less than quantization itself costs
            assert float((a - b).square().sum() / a.square().sum()) < 5e-4


@torch.no_grad()
def test_codes_differ_from_the_simulation_in_few_elements_by_one():
    batches, qmodel = ready("cnn", quant.Config())  # 8 bits on every processor
    reference = quant.integer_reference(qmodel)
    codes = reference.codes(batches[0])
    assert list(codes) == quant.prepare_info(qmodel).activations
    seen = {}
    hooks = [
        qmodel.get_submodule(name).register_forward_hook(
            lambda m, i, o, name=name: seen.__setitem__(name, (m, o))
        )
        for name in codes
    ]
    qmodel(batches[0])
    for hook in hooks:
        hook.remove()
    for name, (quantizer, out) in seen.items():
        simulated = torch.round(out / quantizer.scale).int() + quantizer.zero_point
        difference = (simulated - codes[name]).abs()
        assert int(difference.max()) <= 2
        assert float((difference > 0).float().mean()) < 0.1
        assert codes[name].min() >= 0
        assert codes[name].max() <= 255


@torch.no_grad()
def test_the_accumulator_is_exact():
    """Against Python integers."""
    torch.manual_seed(0)
    x, w = torch.randint(0, 256, (2, 50)), torch.randn(3, 50)
    codes = Codes(x.int(), torch.tensor([0.02]), torch.tensor([7], dtype=torch.int32))
    quantizer = WeightQuant("int8", w.shape)
    quantizer.fit(w)
    bias = torch.tensor([1.0, -2.0, 0.5])
    out = integer_linear(codes, w, quantizer, bias)
    wq = quantizer.quantize(w).tolist()
    bq = integer_bias(bias, codes.scale, quantizer.scale).tolist()
    expected = [
        [sum((a - 7) * b for a, b in zip(row, col, strict=True)) + c for col, c in zip(wq, bq, strict=True)]
        for row in x.tolist()
    ]
    assert out.total.tolist() == expected


@torch.no_grad()
def test_snapshot_and_modes():
    batches, qmodel = ready("cnn", quant.Config(batch_norm="train"))
    qmodel.train()
    before = copy.deepcopy(qmodel.state_dict())
    reference = quant.integer_reference(nn.DataParallel(qmodel) if False else qmodel)
    out = reference(batches[0])
    assert qmodel.training
    assert torch.equal(out, reference(x=batches[0]))
    for (key, a), b in zip(before.items(), qmodel.state_dict().values(), strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b), key
    for p in qmodel.parameters():
        p.zero_()
    assert torch.equal(out, reference(batches[0]))


def test_errors_name_what_is_wrong():
    model, batches = build("cnn")
    qmodel = quant.prepare(model, batches[0])
    with pytest.raises(CalibrationError, match="has no range yet"):
        quant.integer_reference(qmodel)
    quant.calibrate(qmodel, batches, show_progress=False)
    reference = quant.integer_reference(qmodel)
    with pytest.raises(NonFiniteError, match="x holds NaN"):
        reference(batches[0] * float("nan"))
    with pytest.raises(UnsupportedError, match=r"takes \['x'\]"):
        reference(batches[0], wrong=1)


@torch.no_grad()
def test_empty_batches():
    batches, qmodel = ready("cnn", quant.Config())
    assert qmodel(batches[0][:0]).shape == (0, 5)
    assert quant.integer_reference(qmodel)(batches[0][:0]).shape == (0, 5)


# --- against ONNX Runtime, operator by operator ------------------------------------------------------------


def run_onnx(nodes, inputs, output_type, initializers):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from onnx import helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for k, v in inputs.items()
        ],
        [helper.make_tensor_value_info("y", output_type, None)],
        [numpy_helper.from_array(v, k) for k, v in initializers.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    # without VNNI the fast kernel overflows 16 bits; on other processors this changes nothing
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    _ = onnx
    return torch.from_numpy(session.run(None, inputs)[0])


def output_quantizer(scale, zero_point, fmt="int8"):
    quantizer = ActQuant(fmt)
    quantizer.set_range(torch.tensor([scale]), torch.tensor([zero_point]))
    return quantizer


def operands(seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (2, 8, 9, 9), generator=g)
    w = torch.randn(16, 8, 3, 3, generator=g)
    codes = Codes(x.int(), torch.tensor([0.0173]), torch.tensor([121], dtype=torch.int32))
    quantizer = WeightQuant("int8", w.shape)
    quantizer.fit(w)
    bias = torch.randn(16, generator=g)
    return codes, w, quantizer, bias


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_convolution_equals_onnx_runtime_bit_for_bit(seed):
    onnx = pytest.importorskip("onnx")
    codes, w, quantizer, bias = operands(seed)
    out = integer_conv(codes, w, quantizer, bias, lambda a, b, c: nn.functional.conv2d(a, b, c, padding=1))
    result = output_quantizer(0.061, 128 - seed * 60)
    mine = out.requantize(result).codes
    node = onnx.helper.make_node(
        "QLinearConv",
        ["x", "sx", "zx", "w", "sw", "zw", "sy", "zy", "b"],
        ["y"],
        pads=[1, 1, 1, 1],
        kernel_shape=[3, 3],
    )
    scale = quantizer.scale.numpy()
    theirs = run_onnx(
        [node],
        {"x": codes.codes.to(torch.uint8).numpy()},
        onnx.TensorProto.UINT8,
        {
            "sx": codes.scale[0].numpy(), "zx": codes.zero_point[0].to(torch.uint8).numpy(),
            "w": quantizer.quantize(w).to(torch.int8).numpy(), "sw": scale,
            "zw": torch.zeros(16, dtype=torch.int8).numpy(),
            "sy": result.scale[0].numpy(), "zy": result.zero_point[0].to(torch.uint8).numpy(),
            "b": integer_bias(bias, codes.scale, quantizer.scale).numpy(),
        },
    )  # fmt: skip
    assert torch.equal(mine, theirs.int())


@pytest.mark.parametrize("has_output_scale", [True, False])
@torch.no_grad()
def test_linear_equals_onnx_runtime_bit_for_bit(has_output_scale):
    onnx = pytest.importorskip("onnx")
    g = torch.Generator().manual_seed(0)
    w, bias = torch.randn(33, 70, generator=g), torch.randn(33, generator=g)
    codes = Codes(
        torch.randint(0, 256, (17, 70), generator=g).int(),
        torch.tensor([0.03]),
        torch.tensor([99], dtype=torch.int32),
    )
    quantizer = WeightQuant("int8", w.shape)
    quantizer.fit(w)
    out = integer_linear(codes, w, quantizer, bias)
    result = output_quantizer(0.31, 140)
    names = ["x", "sx", "zx", "w", "sw", "zw", "b"] + (["sy", "zy"] if has_output_scale else [])
    node = onnx.helper.make_node("QGemm", names, ["y"], domain="com.microsoft", transB=1)
    values = {
        "sx": codes.scale[0].numpy(), "zx": codes.zero_point[0].to(torch.uint8).numpy(),
        "w": quantizer.quantize(w).to(torch.int8).numpy(), "sw": quantizer.scale.numpy(),
        "zw": torch.zeros(33, dtype=torch.int8).numpy(),
        "b": integer_bias(bias, codes.scale, quantizer.scale).numpy(),
        "sy": result.scale[0].numpy(), "zy": result.zero_point[0].to(torch.uint8).numpy(),
    }  # fmt: skip
    kind = onnx.TensorProto.UINT8 if has_output_scale else onnx.TensorProto.FLOAT
    theirs = run_onnx(
        [node],
        {"x": codes.codes.to(torch.uint8).numpy()},
        kind,
        {k: v for k, v in values.items() if k in names},
    )
    if has_output_scale:
        assert torch.equal(out.requantize(result).codes, theirs.int())
    else:
        assert torch.equal(out.dequantize(), theirs)


@torch.no_grad()
def test_addition_equals_onnx_runtime_bit_for_bit():
    """On x86; another architecture's kernel rounds in another order."""
    onnx = pytest.importorskip("onnx")
    import platform

    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the order of operations is that of the x86 kernel")
    a, b = (torch.arange(256).repeat_interleave(256), torch.arange(256).repeat(256))
    for sa, za, sb, zb, sy, zy in ((0.0173, 121, 0.0311, 3, 0.041, 77), (0.5, 0, 0.013, 255, 0.4999, 0)):
        left = Codes(a.int(), torch.tensor([sa]), torch.tensor([za], dtype=torch.int32))
        right = Codes(b.int(), torch.tensor([sb]), torch.tensor([zb], dtype=torch.int32))
        result = output_quantizer(sy, zy)
        mine = PendingSum(left, right).requantize(result).codes
        node = onnx.helper.make_node(
            "QLinearAdd", ["a", "sa", "za", "b", "sb", "zb", "sy", "zy"], ["y"], domain="com.microsoft"
        )
        byte = torch.uint8
        theirs = run_onnx(
            [node],
            {"a": a.to(byte).numpy(), "b": b.to(byte).numpy()},
            onnx.TensorProto.UINT8,
            {
                "sa": left.scale[0].numpy(), "za": left.zero_point[0].to(byte).numpy(),
                "sb": right.scale[0].numpy(), "zb": right.zero_point[0].to(byte).numpy(),
                "sy": result.scale[0].numpy(), "zy": result.zero_point[0].to(byte).numpy(),
            },
        )  # fmt: skip
        assert torch.equal(mine, theirs.int())


@torch.no_grad()
def test_quantize_linear_equals_onnx_runtime_bit_for_bit():
    onnx = pytest.importorskip("onnx")
    quantizer = output_quantizer(0.037, 100)
    x = torch.cat(
        [
            torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 5,
            (torch.arange(-200, 200) + 0.5) * 0.037,
        ]
    )
    node = onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
    values = {"s": quantizer.scale[0].numpy(), "z": quantizer.zero_point[0].to(torch.uint8).numpy()}
    theirs = run_onnx([node], {"x": x.numpy()}, onnx.TensorProto.UINT8, values)
    assert torch.equal(quantize_activation(x, quantizer).codes, theirs.int())


@torch.no_grad()
def test_clips_are_dropped_only_where_saturation_clips_already():
    total = torch.tensor([-100.0, 0.0, 50.0, 1000.0], dtype=torch.float64)
    relu = Accumulator(total, torch.tensor([0.1]), low=0.0)
    assert relu.dequantize().tolist() == [0.0, 0.0, 5.0, 100.0]
    assert relu.requantize(output_quantizer(0.5, 0)).codes.tolist() == [0, 0, 10, 200]
    # a quantizer that could hold negative values: the clip must still be applied
    assert relu.requantize(output_quantizer(0.5, 100)).codes.tolist() == [100, 100, 110, 255]
    six = Accumulator(total, torch.tensor([0.1]), low=0.0, high=6.0)
    assert six.requantize(output_quantizer(0.5, 0)).codes.tolist() == [0, 0, 10, 12]
