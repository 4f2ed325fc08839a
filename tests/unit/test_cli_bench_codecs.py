"""`gradq bench codecs`: files, options, errors."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from gradq.cli.app import run

QUICK = ["bench", "codecs", "--quick", "--codecs", "int8,bf16"]


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_quick_run_writes_its_files(tmp_path, capsys):
    assert run([*QUICK, "--out", str(tmp_path / "frontier")]) == 0
    shown = capsys.readouterr()
    assert "int8" in shown.out
    assert "mean of 64" in shown.out
    rows = rows_of(tmp_path / "frontier.csv")
    assert [row["codec"] for row in rows] == ["int8", "bf16"]
    assert 0 < float(rows[0]["mean_of_64"]) < float(rows[0]["gaussian"])
    assert float(rows[0]["encode"]) > 0
    record = json.loads((tmp_path / "frontier.json").read_text())
    assert record["setting"]["quick"] is True
    assert torch.__version__.startswith(record["setting"]["environment"]["torch"])
    assert float(rows[1]["laplace"]) == record["rows"][1]["laplace"]
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    assert "frontier.png" in shown.err


def test_gradients_from_a_file_by_rank(tmp_path, capsys):
    ranks = [{"w": torch.randn(2000)} for _ in range(3)]
    torch.save(ranks, tmp_path / "g.pt")
    options = ["--input", str(tmp_path / "g.pt"), "--no-speed", "--out", str(tmp_path / "f")]
    assert run([*QUICK, *options]) == 0
    row = rows_of(tmp_path / "f.csv")[0]
    assert {"gradients", "mean_of_2"} <= set(row)
    assert not {"mean_of_8", "encode"} & set(row)
    torch.save(ranks[0], tmp_path / "g.pt")
    assert run([*QUICK, *options]) == 0
    assert "no mean: give a list of dicts" in capsys.readouterr().err


def test_gradients_from_a_function(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text("import torch\ndef f(ranks): return [{'w': torch.ones(64)}] * ranks\n")
    assert run([*QUICK, "--gradients", f"{file}:f", "--ranks", "2", "--no-speed"]) == 0
    assert "gradients" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--codecs", "int9"], "no codec is called 'int9'"),
        (["--codecs", "int8,int8"], "given twice"),
        (["--input", "none.pt"], "cannot read none.pt: No such file"),
        (["--gradients", "none.py:f"], "there is no file none.py"),
        (["--input", "a.pt", "--gradients", "b.py:f"], "choose one"),
        (["--ranks", "0"], "--ranks"),
    ],
)
def test_errors(options, complaint, capsys):
    assert run(["bench", "codecs", "--quick", *options]) == 2
    assert complaint in capsys.readouterr().err


def test_help_says_what_is_measured(capsys):
    assert run(["bench", "codecs", "--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("NMSE", "memcpy", "--input", "--ranks", "--no-speed", "--quick"):
        assert word in shown
