"""`gradq export`, from code and data files to a checked model."""

import sys
from pathlib import Path

import pytest
import torch

from gradq.cli.app import run

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CODE = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


def batches():
    torch.manual_seed(1)
    model = build()
    for _ in range(3):
        x = torch.randn(32, 4)
        yield x, model(x).argmax(-1)


def broken():
    return 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "made.py").write_text(CODE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    torch.manual_seed(1)
    x = torch.randn(64, 4)
    torch.save(x, tmp_path / "data.pt")
    yield tmp_path
    sys.modules.pop("made", None)


def call(here: Path, *more: str, model: str = "build", calibrate: str = "made.py:batches") -> int:
    data = str(here / calibrate)
    return run(
        ["export", f"{here / 'made.py'}:{model}", "--calibrate", data, "--out", str(here / "m.onnx"), *more]
    )


def test_a_model_becomes_a_checked_file(here, capsys):
    state = {f"module.{k}": v for k, v in torch.nn.Sequential(
        torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)).state_dict().items()}  # fmt: skip
    torch.save({"model": state}, here / "ck.pt")
    code = call(
        here,
        "--checkpoint",
        str(here / "ck.pt"),
        "--seconds",
        "0.02",
        "--batch-sizes",
        "1,2",
        "--max-loss",
        "9",
    )
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert (here / "m.onnx").exists()
    for step in ("1/4 building", "2/4 quantizing", "calibrating", "3/4 writing", "4/4 checking"):
        assert step in shown.err
    for row in ("size, MB", "latency, ms, batch 2", "accuracy, %", "every bit", "m.onnx on"):
        assert row in shown.out


@pytest.mark.parametrize(
    ("options", "more", "said"),
    [
        ({"model": "nothing"}, (), "has no nothing"),
        ({"model": "broken"}, (), "must return a torch.nn.Module"),
        ({}, ("--target", "tea"), "legal: bundle, onnx, pt2, tensorrt"),
        ({}, ("--batch-sizes", "x"), "--batch-sizes is 'x'"),
        ({}, ("--processor", "z80"), "target is 'z80'"),
        ({}, ("--weights", "float3"), "cannot read the weights format"),
        ({}, ("--checkpoint", "none.pt"), "cannot read none.pt: No such file"),
        ({}, ("--checkpoint", "DATA"), "must hold a state dict"),
        ({"calibrate": "none.npy"}, (), "cannot read"),
        ({"calibrate": "made.py"}, (), "give a .npy, .npz or .pt file"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(here, capsys, options, more, said):
    more = [str(here / "data.pt") if m == "DATA" else m for m in more]
    assert call(here, *more, **options) == 2
    assert said in capsys.readouterr().err
    assert not (here / "m.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("target", "name"), [("pt2", "m.pt2"), ("tensorrt", "m.onnx")])
def test_other_targets(here, capsys, target, name):
    more = ("--target", target, "--processor", "gpu", "--out", str(here / name))
    code = call(here, *more, calibrate="data.pt")
    assert code == 0, capsys.readouterr().err
    assert (here / name).exists()


@pytest.mark.slow
def test_bundles_and_mixed_bits_from_a_data_file(here, capsys):
    code = call(
        here, "--target", "bundle", "--processor", "x86-vnni", "--average-bits", "6", "--seconds", "0.05",
        calibrate="data.pt",
    )  # fmt: skip
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert (here / "m.onnx" / "manifest.json").exists()
    assert "at batch 1" in shown.out or "first that suits" in shown.out


@pytest.mark.slow
def test_a_file_that_loses_too_much_fails_with_its_table(here, capsys):
    assert call(here, "--weights", "int2", "--max-loss", "0", "--seconds", "0.02") == 1
    shown = capsys.readouterr()
    assert "FAILED" in shown.out
    assert "points below fp32" in shown.err
