"""Placement by region: which operators a file runs, behind convolutions, norms, gates and enlargements."""

import pytest
import torch
from nets import prepared
from torch import nn
from torch.nn import functional

from gradq import export, quant

BITS = "int8" if export.features() == "x86-vnni" else "int7"
QUIET = {"batch_sizes": (), "show_progress": False}


class Residual(nn.Module):
    """A residual block, a mean, and one operator at the end that used to decide for the whole network."""

    def __init__(self, end):
        super().__init__()
        self.end = end
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.b(torch.relu(self.a(x)))).mean((2, 3))
        if self.end == "norm":
            x = self.norm(x)
        y = self.head(x)
        return functional.softmax(y, -1) if self.end == "softmax" else y


class Other(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.group, self.layer, self.fc = nn.GroupNorm(2, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.a(x)
        if self.kind == "group":
            x = torch.relu(self.group(x))
        elif self.kind == "silu":
            x = functional.silu(x)
        elif self.kind == "hardswish":
            x = functional.hardswish(x)
        elif self.kind == "convnext":
            x = x + self.fc(self.layer(self.b(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        elif self.kind == "nearest":
            x = functional.interpolate(torch.relu(x), scale_factor=2)
        elif self.kind == "bilinear":
            x = functional.interpolate(torch.relu(x), scale_factor=2, mode="bilinear", align_corners=True)
        elif self.kind == "difference":
            x = torch.relu(self.b(x) - torch.relu(x))
        elif self.kind == "number":
            x = torch.relu(self.b(x) / 2 - 0.1)
        elif self.kind == "quotient":
            x = self.b(x) / (1 + torch.relu(x))
        elif self.kind == "pad":
            x = functional.pad(torch.relu(x), (0, 1, 0, 1))
        return self.head(self.b(x))


def checked(model, x, folder):
    """(operators, dB to the float model) of an exported file that `verify` accepts."""
    qmodel = prepared(model, [x], weights=BITS)
    path = folder / "model.onnx"
    export.onnx(qmodel, path)
    report = export.verify(path, qmodel, [x], **QUIET)
    return report.operators.counts, report.fidelity.sqnr_db


@pytest.mark.parametrize("end", ["plain", "softmax", "norm"])
@torch.no_grad()
def test_one_operator_at_the_end_does_not_decide_for_the_network(end, tmp_path):
    torch.manual_seed(0)
    counts, quality = checked(Residual(end).eval(), torch.rand(4, 1, 8, 8), tmp_path)
    assert (counts["QLinearConv"], counts["QLinearAdd"], counts["QGemm"]) == (3, 1, 1)
    assert quality > 20


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("group", {"QLinearConv": 2}),
        ("silu", {"QLinearConv": 2, "QLinearSigmoid": 1, "QLinearMul": 1}),
        ("hardswish", {"QLinearConv": 2, "QLinearAdd": 1, "QLinearMul": 1}),
        ("convnext", {"QLinearConv": 3, "QGemm": 1}),
        ("nearest", {"QLinearConv": 2, "Resize": 1, "QuantizeLinear": 1}),
        ("bilinear", {"QLinearConv": 2}),
        ("difference", {"QLinearConv": 3, "QLinearAdd": 1, "Sub": 0, "Relu": 0}),
        ("number", {"QLinearConv": 3, "QLinearAdd": 0}),
        ("quotient", {"QLinearConv": 3, "QLinearAdd": 0}),
        ("pad", {"QLinearConv": 2, "Pad": 0, "QuantizeLinear": 1}),
    ],
)
@torch.no_grad()
def test_convolutions_are_fused_whatever_reads_them(kind, expected, tmp_path):
    """All but the last one, which is the model's output."""
    torch.manual_seed(0)
    counts, quality = checked(Other(kind).eval(), torch.rand(2, 3, 8, 8), tmp_path)
    assert {op: counts.get(op, 0) for op in expected} == expected
    assert counts["ConvInteger"] == 1
    assert quality > 25


@torch.no_grad()
def test_a_float_activation_is_not_fused_into_an_integer_product(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return torch.relu(self.a(x)) - self.b(x)

    torch.manual_seed(0)
    counts, quality = checked(Net().eval(), torch.randn(4, 8), tmp_path)
    assert counts["QGemm"] == 2
    assert quality > 25


@torch.no_grad()
def test_columns_that_are_looked_up_and_stacked_need_no_operator_for_their_axes(tmp_path):
    class Net(nn.Module):
        """As in DLRM: a table for each column of ids, their rows and a dense feature side by side."""

        def __init__(self):
            super().__init__()
            self.tables = nn.ModuleList([nn.Embedding(20, 16) for _ in range(3)])
            self.dense, self.head = nn.Linear(4, 16), nn.Linear(64, 5)

        def forward(self, x, ids):
            rows = [table(ids[:, i]) for i, table in enumerate(self.tables)]
            return self.head(torch.stack([self.dense(x), *rows], 1).flatten(1))

    torch.manual_seed(0)
    inputs = (torch.randn(8, 4), torch.randint(0, 20, (8, 3)))
    counts, quality = checked(Net().eval(), inputs, tmp_path)
    assert counts.get("Squeeze", 0) == 0
    assert counts.get("Unsqueeze", 0) <= 1  # of the dense feature
    assert quality > 25


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.table = nn.Linear(8, 16), nn.Embedding(16, 64)

    def forward(self, x):
        return self.fc(x) + self.table(torch.arange(16)).sum(-1)


@torch.no_grad()
def test_constants_that_the_runtime_computes_at_load_need_not_be_equal_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    qmodel = prepared(Positions().eval(), [x], weights=BITS)
    path = tmp_path / "model.onnx"
    export.onnx(qmodel, path)
    report = export.verify(path, qmodel, [x], **QUIET)
    assert "ReduceSum" in report.operators.inexact
    assert quant.prepare_info(qmodel).activations == ["quant_x"]


@pytest.mark.skipif(
    not export.features().startswith("x86"), reason="what x86 makes of other processors' files"
)
@pytest.mark.parametrize("target", ["arm", "gpu"])
@torch.no_grad()
def test_a_file_for_another_processor_is_said_to_be_one(target, tmp_path):
    """On this processor it may run in float or in a slower kernel: the report says what to do."""
    torch.manual_seed(0)
    x = torch.rand(2, 1, 8, 8)
    path = tmp_path / "model.onnx"

    def report_on(target):
        qmodel = quant.prepare(Residual("plain").eval(), x, quant.Config.for_target(target))
        quant.calibrate(qmodel, [x], show_progress=False)
        export.onnx(qmodel, path)
        return export.verify(path, qmodel, [x], strict=False, **QUIET)

    report = report_on(target)
    said = " ".join([*report.failures, *report.warnings])
    assert "verify it there" in said
    assert f"for_target('{export.features()}')" in said
    native = report_on(export.features())
    assert native.ok
    assert not native.warnings


@pytest.mark.skipif(export.features() != "x86-avx2", reason="of processors without VNNI")
@torch.no_grad()
def test_weights_that_need_the_slower_kernel_are_said(tmp_path):
    torch.manual_seed(0)
    x = torch.rand(2, 1, 8, 8)
    qmodel = prepared(Residual("plain").eval(), [x], weights="int8")
    path = tmp_path / "model.onnx"
    export.onnx(qmodel, path)
    [warning] = export.verify(path, qmodel, [x], **QUIET).warnings
    assert "slower, correct kernel" in warning
