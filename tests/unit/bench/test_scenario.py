"""Scenarios: what files and options may say, and what they are told when they say something else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gradq.bench.link import Link, parse_delay, parse_rate
from gradq.bench.scenario import Scenario
from gradq.bench.scenario_file import load_scenario
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


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fast",
        "1",
        "gbit",
        "-1gbit",
        "0gbit",
        "1.2.3gbit",
        ".gbit",
        "nangbit",
        "infgbit",
        "9" * 400 + "gbit",
    ],
)
def test_what_is_no_rate(text):
    with pytest.raises(ConfigError, match=r"is not a rate: write for instance"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["", "2", "1h", "1.2.3ms", "nanms", "-1ms", ".s"])
def test_what_is_no_delay(text):
    with pytest.raises(ConfigError, match="is not a delay"):
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
        ("model =", "is not TOML: Invalid value"),
        ("steps = 1\nsteps = 2", "is not TOML"),
        ("a = " + "[" * 3000, "is not TOML"),
        ("steps = " + "9" * 5000, "is not TOML"),
        ("", "is empty: write"),
        ("# only a comment", "is empty: write"),
        ("modle = 'gpt-1m'", "no such key: modle = 'gpt-1m'; did you mean model"),
        ("hosts = 4", "no such key: hosts = 4; the number of hosts is nodes"),
        ("ranks = 4", "ranks of each host are ranks_per_node"),
        ("learning_rate = 0.1", "the learning rate is lr"),
        ("rate = '1gbit'", "links have a table of their own"),
        ("[links]\nrate = '1gbit'", "links have a table of their own"),
        ("zzz = 1", "no such key: zzz = 1; there are: accumulate, batch_size"),
        ("steps = 'many'", "steps = 'many' is not a whole number"),
        ("steps = '40'", "is not a whole number: write it without quotes"),
        ("steps = true", "steps = True is not a whole number"),
        ("steps = 1.5", "steps = 1.5 is not a whole number"),
        ("steps = 99999999999999999999", "from 1 to"),
        ("steps = 2024-01-01", "is not a whole number"),
        ("name = 3", "name = 3 is not text in quotes"),
        ("evaluate = 'yes'", "evaluate = 'yes' is not true or false"),
        ("codecs = 'int8'", r'is not a list of texts in quotes: write \["int8"\]'),
        ("codecs = [8]", r'is not a list of texts in quotes: write \["int8", "int4"\]'),
        ("seeds = 3", r"seeds = 3 is not a list of whole numbers: write \[3\]"),
        ("seeds = [-1]", "each once, from 0"),
        ("timeout_s = nan", "timeout_s = nan is not a number"),
        ("timeout_s = -1", "timeout_s = -1: a finite number above 0"),
        ("budget_s = inf", "budget_s = inf is not a number"),
        ("budget_s = -5", "budget_s = -5: a finite number above 0"),
        ("lr = nan", "lr = nan is not a number"),
        ("lr = -0.1", "lr = -0.1: a finite number above 0"),
        ("link = '1gbit'", "link = '1gbit' is not a table; write a table"),
        ("link = {rate = 100000000}", 'rate = 100000000 has no unit; .* rate = "100mbit"'),
        ("link = {rate = nan}", "rate = nan has no unit"),
        ("link = {rate = true}", "rate = True has no unit"),
        ("link = {rate = []}", "has no unit"),
        ("link = {delay = 5}", 'delay = 5 has no unit; .* delay = "0.2ms"'),
        ("link = {rate = '1gbit', rate_bps = 5.0}", "rate and rate_bps say the same"),
        ("[link]\nrate = 'fast'", "link: rate = 'fast' is not a rate"),
        ("[link]\nrate = '5 ms'", "is not a rate"),
        ("[link]\ndelay = '1gbit'", "link: delay = '1gbit' is not a delay"),
        ("[link]\nrate = '1kbit'", "from 100 kbit/s"),
        ("[link]\nrate = '100tbit'", "to 10 Tbit/s"),
        ("[link]\nrate_bps = inf", "rate_bps = inf is not a number"),
        ("[link]\nloss = nan", "loss = nan is not a number"),
        ("[link]\nloss = 1", "a packet loss of 1: a fraction"),
        ("[link]\nloss = '1%'", "loss = '1%' is not a number"),
        ("[link]\ndelay = '20s'", "from 0 to 10000 ms"),
        ("[link]\nspeed = 1", "link: no such key: speed = 1; the rate is rate"),
        (
            "[link]\nlos = 0.1",
            "link: no such key: los = 0.1; did you mean loss.? there are: delay, loss, rate",
        ),
        ("[link]\ndealy = '1ms'", "link: no such key: dealy = '1ms'; did you mean delay"),
        ("codecs = ['int9']", "codec 'int9'"),
        ("codecs = []", "name at least one"),
        ("model = 'gpt-9t'", "model='gpt-9t': choose from"),
        ("model = 'nowhere.py:net'", "there is no file nowhere.py"),
        ("codecs = ['']", "codec ''"),
        ("codecs = ['free:powersgd:4']", "write for instance free:int4"),
        ("codecs = ['free:none']", "write for instance free:int4"),
        ("codecs = ['torch-powersgd:x']", "torch-powersgd:RANK"),
        ("codecs = ['torch-topk']", "torch's are"),
        ("codecs = ['nowhere.py:hook']", "there is no file nowhere.py"),
        ("ranks_per_node = 1", "one rank has nothing to exchange"),
        ("steps = 2\nblock = 2\nwarmup = 1", "nothing would be; give at least 4 steps"),
        ("seeds = [1, 1]", "each once"),
        ("precision = 'fp8'", "precision = 'fp8': choose fp32 or bf16"),
        ("optimizer = 'lion'", "optimizer = 'lion': choose auto, sgd or adamw"),
        ("name = 'a/b'", "it becomes a file name"),
        ("batch_size = 0", "batch_size = 0: from 1"),
    ],
)
def test_wrong_files_are_explained(tmp_path, text, message):
    path = tmp_path / "scenario.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_scenario(path)
    assert str(path) in str(error.value)


def test_a_missing_file_and_a_folder_are_explained(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the scenario .*none\.toml: No such file"):
        load_scenario(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"cannot read the scenario .*: Is a directory"):
        load_scenario(tmp_path)


def test_a_file_that_is_not_utf8_is_explained(tmp_path):
    path = tmp_path / "latin.toml"
    path.write_bytes(b"steps = 40\n# caf\xe9\n")
    with pytest.raises(
        ConfigError, match=r"latin\.toml, line 2: byte 0xe9 is not UTF-8: save the file as UTF-8"
    ):
        load_scenario(path)


def test_a_byte_order_mark_is_not_part_of_the_file(tmp_path):
    path = tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbfsteps = 12\r\n")
    assert load_scenario(path).steps == 12


def test_a_record_can_be_read_where_its_peers_are_not():
    """A report is made on another machine than the measurement."""
    assert Scenario.from_dict({"codecs": ["elsewhere.py:hook"]}).contenders[2] == "elsewhere.py:hook"


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
    documented = Scenario(codecs=("int8", "int4", "powersgd:4")).contenders
    assert documented == (
        "none",
        "bf16",
        *("int8", "int4", "powersgd:4"),
        "torch-powersgd:4",
        "free:int4",
        "compute",
    )
    assert Scenario(codecs=("powersgd:2",)).contenders == (
        "none",
        "bf16",
        "powersgd:2",
        "torch-powersgd:2",
        "compute",
    )


def test_a_scenario_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Scenario().steps = 3
