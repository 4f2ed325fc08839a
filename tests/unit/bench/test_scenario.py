"""Scenarios: what files and options may say, and what they are told when they say something else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gradq.bench.scenario import Link, Scenario, load_scenario, parse_delay, parse_rate
from gradq.errors import ConfigError

SHIPPED = sorted((Path(__file__).parents[3] / "benchmarks" / "scenarios").glob("*.toml"))


@pytest.mark.parametrize(
    ("text", "bps"),
    [("1gbit", 1e9), ("250 Mbit/s", 250e6), ("2.5Gbps", 2.5e9), ("64kbit", 64e3), ("10gb/s", 1e10)],
)
def test_rates(text, bps):
    assert parse_rate(text) == bps


@pytest.mark.parametrize(("text", "ms"), [("0.2ms", 0.2), ("500us", 0.5), ("1s", 1000.0)])
def test_delays(text, ms):
    assert parse_delay(text) == pytest.approx(ms)


@pytest.mark.parametrize("text", ["", "fast", "1", "gbit", "-1gbit", "0gbit", "1.2.3gbit"])
def test_what_is_no_rate(text):
    with pytest.raises(ConfigError, match=r"is no rate: write for instance"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["", "2", "1h", "1.2.3ms"])
def test_what_is_no_delay(text):
    with pytest.raises(ConfigError, match="is no delay"):
        parse_delay(text)


def test_links_as_a_table_shows_them():
    assert str(Link()) == "unshaped"
    assert str(Link(rate_bps=2.5e9)) == "2.5 Gbit/s"
    assert str(Link(rate_bps=1e8, delay_ms=20, loss=0.01)) == "100 Mbit/s + 20 ms, 1 % loss"


def test_a_file(tmp_path):
    path = tmp_path / "slow.toml"
    path.write_text(
        'model = "mlp-25m"\ncodecs = ["int8"]\nnodes = 4\nranks_per_node = 1\nseeds = [0, 1, 2]\n'
        '[link]\nrate = "100mbit"\ndelay = "5ms"\nloss = 0.01\n'
    )
    scenario = load_scenario(path)
    assert scenario.name == "slow"
    assert scenario.link == Link(rate_bps=1e8, delay_ms=5.0, loss=0.01)
    assert scenario.seeds == (0, 1, 2)
    assert scenario.world_size == 4
    assert Scenario.from_dict(scenario.to_dict()) == scenario


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_scenarios_are_valid(path):
    assert load_scenario(path).name == path.stem


def test_there_are_shipped_scenarios():
    assert len(SHIPPED) >= 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model =", "is not TOML"),
        ("modle = 'gpt-1m'", "no such key: modle; did you mean model"),
        ("steps = 'many'", "steps = 'many' is not int"),
        ("steps = true", "steps = True is not int"),
        ("codecs = 'int8'", "is not a list of str"),
        ("link = '1gbit'", "link is a table"),
        ("[link]\nrate = 'fast'", "is no rate"),
        ("[link]\nspeed = 1", "link: no such key: speed"),
        ("codecs = ['int9']", "codec 'int9'"),
        ("codecs = ['torch-powersgd:x']", "torch-powersgd:RANK"),
        ("codecs = ['torch-topk']", "torch's are"),
        ("codecs = ['nowhere.py:hook']", "there is no file nowhere.py"),
        ("ranks_per_node = 1", "one rank has nothing to exchange"),
        ("steps = 2\nblock = 2\nwarmup = 1", "nothing would be"),
        ("seeds = [1, 1]", "each once"),
        ("precision = 'fp8'", "choose fp32 or bf16"),
        ("name = 'a/b'", "it becomes a file name"),
        ("batch_size = 0", "at least 1"),
    ],
)
def test_wrong_files_are_explained(tmp_path, text, message):
    path = tmp_path / "scenario.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_scenario(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_explained(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the scenario"):
        load_scenario(tmp_path / "none.toml")


def test_baselines_are_always_there():
    contenders = Scenario(codecs=("int8", "int4+int4")).contenders
    assert contenders == (
        "none",
        "bf16",
        "int8",
        "int4+int4",
        "torch-powersgd:1",
        "free:int4+int4",
        "compute",
    )
    asked = Scenario(codecs=("int4", "torch-powersgd:4", "free:int8")).contenders
    assert asked == ("none", "bf16", "int4", "torch-powersgd:4", "free:int8", "compute")
    assert Scenario(codecs=("none",)).contenders == ("none", "bf16", "torch-powersgd:1", "compute")


def test_a_scenario_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Scenario().steps = 3
