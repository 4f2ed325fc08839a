"""nn.LSTM in a file: DynamicQuantizeLSTM against the integer reference and the untouched model."""

import json

import pytest
import torch
from torch import nn

from gradq import export, quant
from gradq.errors import ExportError

pytest.importorskip("onnxruntime")


class Tagger(nn.Module):
    def __init__(self, **kw):
        super().__init__()
        self.words = nn.Embedding(50, 12)
        self.lstm = nn.LSTM(12, 16, 2, batch_first=True, **kw)
        self.head = nn.Linear(32 if kw.get("bidirectional") else 16, 5)

    def forward(self, ids):
        y, (_, c) = self.lstm(self.words(ids))
        return self.head(y), c


class Branching(Tagger):
    """What torch.fx does not trace: a branch on a shape, states given, a dict out."""

    def forward(self, ids, state):
        x = self.words(ids)
        if x.shape[1] > 2:
            x = x * 1.5
        y, (h, _) = self.lstm(x, state)
        return {"tags": self.head(y), "h": h}


CASES = {
    "int7": (Tagger, {}, "int7"),
    "int8, the correct kernel": (Tagger, {"bidirectional": True}, "int8"),
    "int4": (Tagger, {"bias": False}, "int4"),
    "a table": (Tagger, {}, "nf4"),
    "through torch.export": (Branching, {"bidirectional": True}, "int7"),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_file_computes_what_the_reference_does_near_the_untouched_model(case, tmp_path):
    torch.manual_seed(0)
    kind, options, weights = CASES[case]
    model = kind(**options).eval()
    x = (torch.randint(0, 50, (3, 7)),)
    if kind is Branching:
        x = (*x, (torch.randn(4, 3, 16), torch.randn(4, 3, 16)))
    q = quant.prepare(model, x, quant.Config(weights=weights, embeddings="int8"))
    quant.calibrate(q, [x], to_inputs=lambda batch: batch, show_progress=False)
    path = tmp_path / "lstm.onnx"
    report = export.onnx(q, path, dynamic_batch=kind is not Branching)
    assert report.float_islands == []
    seen = export.verify(path, q, [x], batch_sizes=(), show_progress=False)
    assert seen.operators.counts["DynamicQuantizeLSTM"] == 2
    assert "LSTM" not in seen.operators.counts
    assert seen.agreement.largest_difference < 1e-4
    assert seen.agreement.repeatable
    assert seen.fidelity.sqnr_db > (15 if weights in ("int4", "nf4") else 30)
    assert (int(report.metadata["gradq.largest_weight_code"]) > 64) is (weights in ("int8", "nf4"))


@torch.no_grad()
def test_an_lstm_without_an_integer_form_is_listed_once(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("tagger", Tagger())
    x = torch.randint(0, 50, (3, 7))
    q = quant.prepare(model.eval(), x, quant.Config(weights="int7", skip=("tagger.lstm",)))
    quant.calibrate(q, [x], show_progress=False)
    report = export.onnx(q, tmp_path / "float.onnx")
    assert [name for name, _ in report.float_islands] == ["tagger.lstm"]
    assert json.loads(report.metadata["gradq.float_islands"])[0][0] == "tagger.lstm"


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_projection_is_refused_by_name_before_anything_is_written(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory, self.head = nn.LSTM(12, 16, proj_size=4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.memory(x)[0])

    x = torch.randn(3, 2, 12)
    q = quant.prepare(Model().eval(), x, quant.Config(weights="int7"))
    quant.calibrate(q, [x], show_progress=False)
    with pytest.raises(ExportError, match=r"memory is an nn.LSTM with proj_size=4.*without and an nn.Linear"):
        export.onnx(q, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_tensorrt_gets_the_lstm_in_float(tmp_path):
    torch.manual_seed(0)
    model, x = Tagger().eval(), torch.randint(0, 50, (3, 7))
    q = quant.prepare(model, x, quant.Config.for_target("gpu"))
    quant.calibrate(q, [x], show_progress=False)
    report = export.onnx(q, tmp_path / "gpu.onnx", runtime="tensorrt")
    assert "lstm" in dict(report.float_islands)
