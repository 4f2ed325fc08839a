"""Records that are cut off, damaged, foreign or unfinished: the report shows the rest and names them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from gradq.bench import plots
from gradq.bench.reading import read_record
from gradq.bench.report import write_report
from gradq.bench.summary import summarise
from gradq.bench.tables import Table, escape, one_line
from gradq.cli.app import run
from gradq.cli.bench_terminal import to_json
from gradq.errors import ConfigError

RECORDS = Path(__file__).parents[2] / "fixtures" / "bench"
GOOD = RECORDS / "sweep_gpt_2ranks_1gbit.jsonl"
LINES = GOOD.read_text().splitlines()
BLOCK = next(line for line in LINES if '"record": "block"' in line)


def changed(line: str, **fields: object) -> str:
    """A line with some fields replaced; None takes one away."""
    record = json.loads(line) | fields
    return json.dumps({key: value for key, value in record.items() if value is not None})


@pytest.fixture
def quick_plots(monkeypatch):
    """Plots are another test's; these are empty files."""
    monkeypatch.setattr(plots, "save", lambda draw, path: "<svg></svg>" if path.write_bytes(b"") == 0 else "")


HEADER = LINES[0]
BAD_HEADERS = {
    "": "is empty",
    "\n": "line 1 is not JSON",
    '{"record": "header", "benchmark"': "line 1 is cut off",
    "[" * 100_000 + "\n": "line 1 is not JSON",
    "9" * 5000 + "\n": "line 1 is not JSON",
    changed(HEADER, schema_version=2): "schema 2, this gradq reads 1; update gradq",
    changed(HEADER, schema_version="x"): "schema 'x', this gradq reads 1; it is damaged",
    changed(HEADER, schema_version=None): "schema None",
    changed(HEADER, scenario=None): "the header has no table 'scenario'",
    changed(HEADER, environment=[]): "the header has no table 'environment'",
    changed(HEADER, scenario={"steps": "many"}): "steps = 'many' is not a whole number",
    changed(HEADER, scenario={"future": 1}): "no such key: future",
    changed(HEADER, command=5): "command is not a text",
    changed(HEADER, link={"measured": [{"from": 0}]}): "the link is damaged",
    changed(HEADER, link={"measured": {}}): "the link is damaged",
    changed(HEADER, link=[]): "the link is damaged",
}
BAD_LINES = {
    "{": "is not JSON",
    "[1]": "is not JSON",
    "NaN": "is not JSON",
    '{"seed": 0}': "does not say what it records",
    '{"record": 3}': "does not say what it records",
    '{"record": "block"}': "(block) has no attempt",
    '{"record": "end"}': "(end) has no seed",
    '{"record": "end", "seed": true}': "(end) has a seed that makes no sense",
    '{"record": "event"}': "(event) has no event",
    '{"record": "final", "seed": 0, "codec": "int8", "val_loss": "low"}': "(final) has a val_loss",
    '{"record": "refused", "codec": "int8"}': "(refused) has no reason",
    '{"record": "preflight", "seed": 0, "warnings": [3]}': "(preflight) has a warnings",
    changed(BLOCK, step_ms=[]): "(block) has a step_ms that makes no sense",
    changed(BLOCK, step_ms=[math.nan]): "(block) has a step_ms",
    changed(BLOCK, step_ms=[-1.0]): "(block) has a step_ms",
    changed(BLOCK, step_ms=[1e300]): "(block) has a step_ms",
    changed(BLOCK, step_ms="fast"): "(block) has a step_ms",
    changed(BLOCK, turn=10**30): "(block) has a turn",
    changed(BLOCK, codec=None): "(block) has no codec",
    changed(BLOCK, wire_bytes=[None]): "(block) has a wire_bytes",
    changed(BLOCK, steps=0): "(block) has a steps",
}


def test_a_bad_header_costs_its_record_only(tmp_path, capsys):
    shutil.copy(RECORDS / "collectives.json", tmp_path)
    for index, text in enumerate(BAD_HEADERS):
        whole = text[-1:] in ("", "\n", '"')
        (tmp_path / f"bad{index:02d}.jsonl").write_text(text if whole else f"{text}\n")
    assert run(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == len(BAD_HEADERS)
    for index, (line, message) in enumerate(zip(shown, BAD_HEADERS.values(), strict=True)):
        assert line.startswith(f"left out: {tmp_path}/bad{index:02d}.jsonl")
        assert message in line
    markdown = (tmp_path / "report.md").read_text()
    assert "## Collectives: " in markdown
    assert "## Left out" in markdown


def test_a_bad_line_costs_itself_only(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([*LINES, *BAD_LINES, '{"record": "block", "se']))
    reading = read_record(path)
    assert len(reading.lines) == len(LINES) - 1
    for found, (number, message) in zip(
        reading.left_out, enumerate(BAD_LINES.values(), start=len(LINES) + 1), strict=False
    ):
        assert found.startswith(f"line {number} {message}")
    assert reading.left_out[-1] == f"line {len(LINES) + len(BAD_LINES) + 1} is cut off"
    assert [row.ratio for row in summarise(path).rows] == [row.ratio for row in summarise(GOOD).rows]


@pytest.mark.usefixtures("quick_plots")
def test_the_report_lists_what_is_left_out(tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text("\n".join([*LINES, "{", ""]))
    shutil.copy(GOOD, tmp_path / "good.jsonl")
    (tmp_path / "training.jsonl").write_text('{"record": "step"}\n')
    (tmp_path / "other.json").write_text('{"benchmark": "kernels"}')
    (tmp_path / "cut.json").write_text('{"benchmark": "collec')
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9\xff\n")
    table = json.loads((RECORDS / "collectives.json").read_text())
    del table["rows"][1]["busbw_gbps"]
    (tmp_path / "rows.json").write_text(json.dumps(table))
    (tmp_path / "unfinished.jsonl").write_text(f"{HEADER}\n")
    assert run(["report", str(tmp_path)]) == 0
    left_out = [line.removeprefix("left out: ") for line in capsys.readouterr().err.splitlines()]
    assert left_out[0] == f"{tmp_path}/bad.jsonl, line {len(LINES) + 1} is not JSON"
    assert left_out[1].startswith(f"{tmp_path}/cut.json is not JSON, or cut off")
    assert left_out[2].startswith(f"{tmp_path}/latin.jsonl is not text in UTF-8 (byte 0)")
    assert left_out[3] == f"{tmp_path}/rows.json, row 2: has no busbw_gbps"
    assert left_out[4].startswith(
        f"{tmp_path}/unfinished.jsonl: unfinished: it ended before the first measured"
    )
    assert "the same command continues: python benchmarks/sweep.py" in left_out[4]
    assert len(left_out) == 5
    page, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "Left out" in page
    assert "1 damaged line(s) of bad.jsonl are left out" in markdown


@pytest.mark.usefixtures("quick_plots")
def test_records_of_one_name_have_plots_of_their_own(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(GOOD, tmp_path / folder)
    write_report(tmp_path)
    stem = GOOD.stem
    assert (tmp_path / f"{stem}_step.png").is_file()
    assert f"({stem}-2_step.png)" in (tmp_path / "report.md").read_text()
    assert (tmp_path / f"{stem}-2_step.png").is_file()


def test_only_an_unfinished_record_is_not_called_empty(tmp_path):
    (tmp_path / "half.jsonl").write_text(
        f'{HEADER}\n{{"record": "event", "event": "stopped", "reason": "Ctrl"}}\n'
    )
    with pytest.raises(
        ConfigError, match=r"half\.jsonl: unfinished: .* \(Ctrl\); the same command continues"
    ):
        write_report(tmp_path)


@pytest.mark.usefixtures("quick_plots")
def test_a_file_a_folder_and_nothing(tmp_path, capsys, monkeypatch):
    shutil.copy(GOOD, tmp_path / "one.jsonl")
    assert run(["report", str(tmp_path / "one.jsonl")]) == 0
    assert (tmp_path / "report.html").is_file()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    capsys.readouterr()
    for arguments, message in (
        ([str(tmp_path / "empty")], "has no records with samples\nmake some: gradq bench --out"),
        ([str(tmp_path / "nowhere")], "there is no folder"),
        ([], "there is no folder out/bench; gradq bench writes records to --out"),
    ):
        assert run(["report", *arguments]) == 2
        assert message in capsys.readouterr().err


HOSTILE = "<b>&|`[x](y)`*_$\\frac$ \x1b[31m\nend"


def test_names_are_shown_as_they_are(tmp_path):
    """Scenario, refused codecs, events and commands come from outside."""
    header = json.loads(HEADER)
    header["command"] = HOSTILE
    header["scenario"]["codecs"] += ["p$x$|y.py:hook"]
    lines = [line.replace('"int8"', '"p$x$|y.py:hook"') for line in LINES[1:]]
    lines += [json.dumps({"record": "refused", "codec": f"{HOSTILE}.py:f", "reason": HOSTILE})]
    lines += [json.dumps({"record": "event", "event": "stopped", "reason": HOSTILE})]
    (tmp_path / "names.jsonl").write_text("\n".join([json.dumps(header), *lines, ""]))
    page = write_report(tmp_path).read_text()
    assert "<b>" not in page
    assert "\x1b" not in page
    assert "&lt;b&gt;&amp;|`[x](y)`*_$\\frac$ [31m end" in page
    markdown = (tmp_path / "report.md").read_text()
    assert "\x1b" not in markdown
    assert r"&lt;b>&amp;\|\`\[x\](y)\`\*\_\$\\frac\$ \[31m end" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    columns = {line.replace("\\|", "").count("|") for line in rows}
    assert columns == {rows[0].count("|")}, "no name adds a column"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("torch-powersgd:4", "torch-powersgd:4"),
        ("fp8_e4m3", "fp8_e4m3"),
        ("topk(percent=0.1)", "topk(percent=0.1)"),
        ("int4+int4", "int4+int4"),
        ("_x_", r"\_x\_"),
        ("a|b", r"a\|b"),
        ("a\\|b", r"a\\\|b"),
        ("a\r\n  b\t", "a b"),
    ],
)
def test_escaping(text, shown):
    assert escape(text) == shown
    assert "\n" not in one_line(text)


def test_a_table_keeps_its_columns():
    table = Table(["a|b", "c"], [["1|2", "`x`"]], below=["* not a list"])
    assert table.markdown() == "| a\\|b | c |\n|---|---:|\n| 1\\|2 | \\`x\\` |\n\n\\* not a list"


@pytest.mark.usefixtures("quick_plots")
def test_a_codec_that_diverges_is_not_recommended(tmp_path):
    lines = list(LINES)
    for seed in range(1):
        for codec in ("none", "bf16", "int8", "int4"):
            loss = math.nan if codec == "int4" else 2.0
            lines.append(json.dumps({"record": "final", "seed": seed, "codec": codec, "val_loss": loss}))
    path = tmp_path / "nan.jsonl"
    path.write_text("\n".join([*lines, ""]))
    summary = summarise(path)
    assert math.isnan(summary.row("int4").losses.mean)
    assert not summary.verdict().startswith("int4 is best")
    assert write_report(tmp_path).is_file()
    assert json.loads(to_json(summary.to_dict()))["rows"][3]["losses"]["mean"] is None
