"""The frontier: errors that are known, inputs that are not gradients, records, the picture."""

from __future__ import annotations

import csv
import math
import sys

import numpy as np
import pytest
import torch

from gradq import codecs
from gradq.bench import frontier, gradients
from gradq.bench.frontier_plot import plot_frontier
from gradq.bench.interleaved import fastest_copy, interleave, least
from gradq.errors import ConfigError, SpecError


@pytest.fixture(scope="module")
def gaussian():
    return gradients.synthetic(1 << 16)["gaussian"]


# --- errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "variance"), [("int8(rounding=nearest)", 1 / 12), ("int8", 1 / 6)])
def test_error_of_int8_is_that_of_its_steps(gaussian, spec, variance):
    """Uniform in a step for nearest rounding; a stochastic one adds as much again."""
    steps = gaussian.view(-1, 256).abs().amax(1) / 127
    expected = variance * 256 * float(steps.square().sum()) / float(gaussian.square().sum())
    assert frontier.nmse(codecs.from_spec(spec), [gaussian]) == pytest.approx(expected, rel=0.05)


def test_error_of_sign_is_that_of_half_normal_numbers(gaussian):
    assert frontier.nmse(codecs.from_spec("sign"), [gaussian]) == pytest.approx(1 - 2 / math.pi, rel=0.02)


def test_errors_of_several_tensors_are_weighted_by_energy(gaussian):
    int8, quiet = codecs.from_spec("int8"), 1e-3 * gaussian
    assert frontier.nmse(int8, [gaussian, quiet]) == pytest.approx(frontier.nmse(int8, [gaussian]), rel=1e-3)
    with pytest.raises(ConfigError, match="not all zero"):
        frontier.nmse(int8, [torch.zeros(8)])


def test_floor_halves_the_amplitude_with_every_bit():
    assert frontier.floor(4) == 2**-8
    assert frontier.floor(3) / frontier.floor(4) == 4


def test_error_of_the_mean(gaussian):
    same = [{"weight": gaussian[:4096]}] * 8
    assert frontier.error_of_mean(codecs.from_spec("fp32"), same) < 1e-13
    one = frontier.error_of_mean(codecs.from_spec("int8"), same[:1])
    assert one == pytest.approx(frontier.nmse(codecs.from_spec("int8"), [gaussian[:4096]]), rel=0.1)
    # unbiased roundings are averaged down at least as 1 / W; nearest ones of equal numbers not at all
    assert frontier.error_of_mean(codecs.from_spec("int8"), same) < 1.2 * one / 8
    nearest = codecs.from_spec("int8(rounding=nearest)")
    few, many = frontier.error_of_mean(nearest, same[:1]), frontier.error_of_mean(nearest, same)
    assert few == pytest.approx(many, rel=1e-4)


def test_a_row_has_what_the_csv_has(gaussian, tmp_path):
    inputs = {"gaussian": [gaussian[:4096]], "gradients": [gaussian[:300], gaussian[300:500]]}
    by_rank = gradients.correlated(4096, 8)
    rows = [
        frontier.measure_errors(codecs.from_spec(s), inputs, by_rank, num_seeds=1) for s in ("int8", "bf16")
    ]
    assert [row.bits for row in rows] == [8 + 16 / 256, 16]
    assert set(rows[0].means) == {2, 8}
    frontier.write_csv(rows, tmp_path / "new" / "rows.csv")
    with (tmp_path / "new" / "rows.csv").open() as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == ["codec", "bits", "floor", "gaussian", "gradients", "mean_of_2", "mean_of_8"]
    assert float(read[1]["gaussian"]) == rows[1].errors["gaussian"]


# --- which codecs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("", []),
        ("rot4", ["rot4"]),
        (" rot4 , int8;", ["rot4", "int8"]),
        (
            "int4(block_size=64,rounding=nearest),rot2(scale=mse)",
            ["int4(block_size=64,rounding=nearest)", "rot2(scale=mse)"],
        ),
    ],
)
def test_specs_are_split_outside_of_parentheses(text, specs):
    assert frontier.split_specs(text) == specs


def test_choose():
    assert [str(codec) for codec in frontier.choose("int8,bf16")] == ["int8", "bf16"]
    with pytest.raises(SpecError, match="int9"):
        frontier.choose("int8,int9")
    names = {codec.name for codec in frontier.choose("")}
    assert names == set(codecs.names()) - {"fp16", "fp32", "fp64"}


# --- timing --------------------------------------------------------------------------------------------


def test_interleaved_calls_take_turns_and_the_best_round_counts():
    calls, now = [], [0.0]

    def work(name, seconds):
        calls.append(name)
        now[0] += seconds[len([c for c in calls if c == name]) - 1]

    seconds = interleave(
        {"slow": lambda: work("slow", [9, 4, 6]), "fast": lambda: work("fast", [9, 2, 1])},
        rounds=2,
        clock=lambda: now[0],
    )
    assert seconds == {"slow": [4, 6], "fast": [2, 1]}  # the first is not counted
    assert sorted(calls[:2]) == sorted(calls[2:4]) == sorted(calls[4:]) == ["fast", "slow"]
    assert least(seconds, "fast", "slow") == 4


def test_speeds_are_measured_of_all_codecs():
    chosen = frontier.choose("int8,bf16,fp64")
    speeds = frontier.measure_speeds(chosen, numel=5000, rounds=2)
    assert set(speeds) == {"int8", "bf16", "fp64"}
    assert all(speed.encode > 0 and speed.decode > 0 for speed in speeds.values())
    x, out = torch.randn(100), torch.zeros(100)
    fastest_copy(x, out)[1]()
    assert torch.equal(x, out)


# --- gradients -----------------------------------------------------------------------------------------


def test_drawn_numbers_are_what_they_are_called():
    drawn = gradients.synthetic(1 << 16)
    kurtosis = {name: float((x**4).mean() / (x**2).mean() ** 2) for name, x in drawn.items()}
    assert kurtosis["gaussian"] == pytest.approx(3, rel=0.05)
    assert kurtosis["laplace"] == pytest.approx(6, rel=0.1)
    assert kurtosis["student-t"] > 8
    shared = gradients.correlated(1 << 14, 2)
    product = float((shared[0]["gaussian"] * shared[1]["gaussian"]).mean())
    assert product == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("loaded", "names"),
    [
        ({"a": torch.ones(2, 3), "b": torch.ones(1, dtype=torch.bfloat16)}, ["a", "b"]),
        ([torch.ones(2), torch.ones(3)], ["0", "1"]),
        (torch.ones(2), ["tensor"]),
        ([{"a": torch.ones(2)}, {"a": torch.zeros(2) + 1}], ["a"]),
        ({"a": torch.ones(2), "empty": torch.zeros(0)}, ["a"]),
    ],
)
def test_files_of_gradients(tmp_path, loaded, names):
    torch.save(loaded, tmp_path / "g.pt")
    ranks = gradients.from_file(tmp_path / "g.pt")
    assert len(ranks) == (2 if isinstance(loaded, list) and isinstance(loaded[0], dict) else 1)
    assert list(ranks[0]) == names
    assert all(x.dtype == torch.float32 and x.dim() == 1 for x in ranks[0].values())


def test_files_of_numpy(tmp_path):
    np.savez(tmp_path / "g.npz", weight=np.ones((2, 2)))
    assert gradients.from_file(tmp_path / "g.npz")[0]["weight"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("loaded", "complaint"),
    [
        ({"a": torch.tensor([1.0, math.nan])}, "'a' holds NaN or Inf"),
        ({"a": torch.ones(2, dtype=torch.int64)}, "'a' is torch.int64"),
        ({"a": 1.0}, "'a' is float"),
        ({"a": torch.zeros(3)}, "no gradient but zeros"),
        ({}, "no gradient but zeros"),
        ("text", "holds a str"),
        ([{"a": torch.ones(2)}, {"a": torch.ones(3)}], "ranks 0 and 1 differ in 'a'"),
    ],
)
def test_what_is_no_gradient(tmp_path, loaded, complaint):
    torch.save(loaded, tmp_path / "g.pt")
    with pytest.raises(ConfigError, match=complaint):
        gradients.from_file(tmp_path / "g.pt")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none\.pt: No such file"):
        gradients.from_file(tmp_path / "none.pt")
    (tmp_path / "bad.pt").write_text("not a checkpoint")
    with pytest.raises(ConfigError, match=r"cannot read .*bad\.pt"):
        gradients.from_file(tmp_path / "bad.pt")


def test_functions_that_give_gradients(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\ndef f(ranks):\n    return [{'a': torch.ones(3) * (r + 1)} for r in range(ranks)]\n"
    )
    assert [rank["a"][0].item() for rank in gradients.from_function(f"{file}:f", 3)] == [1, 2, 3]
    with pytest.raises(ConfigError, match="has no function 'g'"):
        gradients.from_function(f"{file}:g", 1)
    with pytest.raises(ConfigError, match=r"there is no file"):
        gradients.from_function(f"{tmp_path / 'none.py'}:f", 1)
    file.write_text("1 / 0")
    with pytest.raises(ConfigError, match="cannot be imported: ZeroDivisionError"):
        gradients.from_function(f"{file}:f", 1)


# --- the picture ---------------------------------------------------------------------------------------


def some_rows(speed=None):
    rows = []
    for codec, bits in (("int8", 8.06), ("rot4(scale=mse)", 4.06), ("sign", 1.06), ("mine", 2.0)):
        errors = {"gaussian": frontier.floor(bits) * 2}
        rows.append(frontier.Row(codec=codec, bits=bits, errors=errors, means={8: 0.1 / bits}, speed=speed))
    return rows


@pytest.mark.parametrize("speed", [None, frontier.Speed(encode=0.4, decode=1.2)])
def test_a_picture(tmp_path, speed):
    plot_frontier(some_rows(speed), tmp_path / "new" / "f.png", title="test")
    assert (tmp_path / "new" / "f.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_needs_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'gradq\[plot\]'"):
        plot_frontier(some_rows(), tmp_path / "f.png", title="test")
