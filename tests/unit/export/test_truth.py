"""`verify` compares with the float model as it was given to `prepare`; planted faults are found."""

import sys

import models
import pytest
import torch
from nets import prepared
from torch import nn

from gradq import export, quant
from gradq.errors import ConfigError, VerifyError
from gradq.export.timing import Latency
from gradq.export.verification import _judge
from gradq.quant import placement

BITS = "int8" if export.features() == "x86-vnni" else "int7"
QUIET = {"batch_sizes": (), "show_progress": False}


def written(qmodel, folder, name="model.onnx"):
    path = folder / name
    export.onnx(qmodel, path)
    return path


@torch.no_grad()
def test_corrected_biases_do_not_move_the_baseline(tmp_path):
    """int2 ruins this network; the float model says so, corrected biases or not."""
    model, batches = models.build("cnn")
    loader = [(x, model(x).argmax(-1)) for x in batches]
    qmodel = prepared(model, batches, weights="int2")
    quant.correct_bias(qmodel, batches, show_progress=False)
    path = written(qmodel, tmp_path)
    report = export.verify(path, qmodel, loader, strict=False, max_accuracy_loss=1e9, **QUIET)
    assert report.accuracy["fp32"] == 100.0
    assert not report.fidelity.trained
    with torch.no_grad():
        got = torch.from_numpy(export.session(path).run(None, {"x": batches[0].numpy()})[0])
    if bool((got.argmax(-1) != loader[0][1]).any()):
        with pytest.raises(VerifyError, match="below fp32"):
            export.verify(path, qmodel, loader, max_accuracy_loss=0.0, **QUIET)
    fp32 = tmp_path / "fp32.onnx"
    export.float_onnx(qmodel, fp32)
    theirs = torch.from_numpy(export.session(fp32).run(None, {"x": batches[0].numpy()})[0])
    assert torch.allclose(theirs, model(batches[0]), atol=1e-4)


@torch.no_grad()
def test_a_clamped_bias_is_found(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    model[0].weight[:3] *= 1e-9
    model[0].bias[:3] = 1.0
    model.eval()
    x = torch.rand(16, 1, 8, 8)
    path = written(prepared(model, [x], weights=BITS), tmp_path)
    out = torch.from_numpy(export.session(path).run(None, {"input": x.numpy()})[0])
    assert float((out - model(x)).abs().max() / model(x).abs().max()) < 0.1
    for name in ("calibrate", "prepare"):
        monkeypatch.setattr(sys.modules[f"gradq.quant.{name}"], "widen_scales", lambda model: model)
    broken = prepared(model, [x], weights=BITS)
    with pytest.raises(VerifyError, match="dB"):
        export.verify(written(broken, tmp_path), broken, [x], **QUIET)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("mask", torch.tensor([1.5, -2.5, 2.0, -1.0, 3.0, -2.0, 1.0, -1e4]))

    def forward(self, x):
        return self.b((self.a(x) + self.mask).clamp(min=-3))


@torch.no_grad()
def test_a_quantized_constant_is_found(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, x = Masked().eval(), torch.randn(32, 8)
    good = prepared(model, [x])
    assert export.verify(written(good, tmp_path), good, [x], **QUIET).ok
    monkeypatch.setattr(placement, "constants", lambda traced: set())
    broken = prepared(model, [x])
    with pytest.raises(VerifyError, match="dB"):
        export.verify(written(broken, tmp_path), broken, [x], **QUIET)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 8)

    def forward(self, first, second):
        return torch.tanh(self.a(first)) - self.b(second)


@torch.no_grad()
def test_inputs_are_compared_by_name(tmp_path):
    torch.manual_seed(0)
    model, x, y = Two().eval(), torch.randn(6, 4), torch.randn(6, 4)
    qmodel = quant.prepare(model, {"second": y, "first": x})
    quant.calibrate(qmodel, [{"second": y, "first": x}], show_progress=False)
    path = written(qmodel, tmp_path)
    labels = model(x, y).argmax(-1)
    for loader in (None, [{"second": y, "first": x, "labels": labels}], [(x, y, labels)]):
        report = export.verify(path, qmodel, loader, **QUIET)
        assert report.fidelity.sqnr_db > 25
        if loader is not None:
            assert report.accuracy["fp32"] == 100.0
    with pytest.raises(ConfigError, match="a batch has no 'second'"):
        export.verify(path, qmodel, [{"first": x}], **QUIET)


@torch.no_grad()
def test_metrics_keep_their_unit(tmp_path):
    model, batches = models.build("mlp")
    qmodel = prepared(model, batches, weights=BITS)
    path = written(qmodel, tmp_path)
    loader = [(x, model(x)) for x in batches]

    def psnr(out, target):
        return float(-10 * torch.log10((out - target).square().mean() + 1e-8))

    report = export.verify(path, qmodel, loader, metric=psnr, strict=False, **QUIET)
    assert report.accuracy["fp32"] == pytest.approx(80.0)
    assert 10 < report.accuracy["int8"] < 80
    assert report.failures == [f"psnr is {80 - report.accuracy['int8']:.4g} below fp32; allowed: {0.8:.4g}"]
    assert export.verify(path, qmodel, loader, metric=psnr, max_accuracy_loss=75, **QUIET).ok
    with pytest.raises(ConfigError, match="pass metric=function"):
        export.verify(path, qmodel, loader, **QUIET)


@torch.no_grad()
def test_labels_of_images_are_compared_over_the_channels(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval()
    x = torch.rand(4, 1, 6, 6)
    qmodel = prepared(model, [x], weights=BITS)
    report = export.verify(
        written(qmodel, tmp_path), qmodel, [(x, model(x).argmax(1))], max_accuracy_loss=20, **QUIET
    )
    assert report.accuracy["fp32"] == 100.0


@torch.no_grad()
def test_a_trained_model_may_differ_and_says_so(tmp_path):
    model, batches = models.build("mlp")
    qmodel = prepared(model, batches, weights=BITS)
    for parameter in qmodel.parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    quant.calibrate(qmodel, batches, show_progress=False)
    report = export.verify(written(qmodel, tmp_path), qmodel, batches, **QUIET)
    assert report.fidelity.trained
    assert "trained since prepare" in report.warnings[0]


def test_the_float_model_can_be_given_instead_of_kept(tmp_path):
    model, batches = models.build("mlp")
    qmodel = quant.prepare(model, batches[0], quant.Config(weights=BITS), keep_float=False)
    quant.calibrate(qmodel, batches, show_progress=False)
    path = written(qmodel, tmp_path)
    with pytest.raises(ConfigError, match="pass float_model=model"):
        export.verify(path, qmodel, batches, **QUIET)
    assert export.verify(path, qmodel, batches, float_model=model, **QUIET).fidelity.sqnr_db > 20


@pytest.mark.parametrize(
    ("int8_ms", "high", "asked", "fails"),
    [(2.0, 0.6, 1.0, True), (2.0, 1.1, 1.0, False), (1.04, 0.97, 1.0, False), (2.0, 0.6, None, False)],
)
def test_slower_than_float_fails_unless_it_is_noise(tmp_path, int8_ms, high, asked, fails):
    model, batches = models.build("mlp")
    qmodel = prepared(model, batches, weights=BITS)
    report = export.verify(written(qmodel, tmp_path), qmodel, batches, **QUIET)
    report.latency[1] = {
        "fp32": Latency(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9),
        "int8": Latency(int8_ms, int8_ms, int8_ms, 1 / int8_ms, 0.4, high, 9),
    }
    _judge(report, False, None, None, asked)
    assert bool(report.failures) == fails
    assert fails or "slower than fp32" in report.warnings[-1]
