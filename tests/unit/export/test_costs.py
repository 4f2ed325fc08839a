"""What a file's time goes into: what stays in float is named with its share."""

import pytest
import torch
from torch import nn

from gradq import export, quant

pytest.importorskip("onnxruntime")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = torch.erf(self.stem(x))
        return self.head(torch.relu(self.body(x)).mean((2, 3)))


@torch.no_grad()
def test_verify_lists_what_is_in_float_with_its_share_of_the_time(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 24, 24)
    q = quant.prepare(Net().eval(), x, quant.Config(weights="int7", skip=("stem",)))
    quant.calibrate(q, [x], show_progress=False)
    export.onnx(q, tmp_path / "net.onnx")
    seen = export.verify(
        tmp_path / "net.onnx", q, [x], batch_sizes=(1,), seconds=0.05, min_speedup=None, show_progress=False
    )
    by_name = {cost.name: cost for cost in seen.costs}
    assert sum(cost.share for cost in seen.costs) == pytest.approx(1)
    stem = by_name["Conv of stem"]
    assert stem.kind == "float"
    assert stem.nodes == 1
    assert by_name["Erf"].kind == "float"
    assert by_name["QLinearConv"].kind == "integers"
    assert by_name["QuantizeLinear"].kind == "conversion"
    assert "Erf" in str(seen)
    assert "% in float" in str(seen)


@torch.no_grad()
def test_the_report_says_which_forms_are_slow_and_what_to_do(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval(), torch.randn(4, 32)
    grouped = (("int8-g32", "int8-token", True), ("int8-g32", None, False), ("int4-g32", None, False))
    for weights, activations, said in grouped:
        q = quant.prepare(model, x, quant.Config(weights=weights, activations=activations))
        report = export.onnx(q, tmp_path / "model.onnx")
        assert any("MatMulNBits" in text and "int8-batch" in text for text in report.slow) is said
        computed_in_float = any("stored in int8, computed in float" in why for _, why in report.float_islands)
        assert computed_in_float is (weights == "int8-g32" and activations is None)
        assert ("slow: 2 layers" in str(report)) is said
