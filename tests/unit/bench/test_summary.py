"""What a record says: medians, pairs of the same turn, losses over seeds, and the verdict."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from gradq.bench.reading import read_lines
from gradq.bench.recording import Recorder, finished_seeds
from gradq.bench.scenario import Scenario
from gradq.bench.summary import summarise, within_two_sd
from gradq.bench.sweep import break_even, groups
from gradq.bench.tables import scenario_table
from gradq.errors import BenchError, ConfigError

SCENARIO = Scenario(name="made", codecs=("int8", "int4"), seeds=(0, 1, 2))
# ms a step of rank 0; rank 1 is one ms slower
STEP_MS = {"none": 100.0, "bf16": 60.0, "int8": 40.0, "int4": 30.0, "torch-powersgd:1": 50.0, "compute": 20.0}
LOSSES = {"none": 2.0, "bf16": 2.0, "int8": 2.001, "int4": 2.002, "torch-powersgd:1": 3.0}


def write(
    path, step_ms=STEP_MS, losses=LOSSES, seeds=(0, 1, 2), turns=4, scenario=SCENARIO, interface="eth0"
):
    recorder = Recorder(path, scenario, {"runner": "local", "link": {"asked": "loopback"}})
    for seed in seeds:
        start = {"record": "start", "parameters": 10, "interface": interface, "interface_ranks": 2}
        recorder.take(seed, 0, start)
        for turn in range(turns):
            for codec, ms in step_ms.items():
                slow = 1 + turn / 10  # the whole turn is disturbed: ratios must not see it
                for rank in range(2):
                    block = {"record": "block", "turn": turn, "codec": codec, "steps": 2, "warmup": turn == 0}
                    block |= {"step_ms": (ms + rank) * slow, "cpu_ms": 5.0, "busy": 0.5}
                    block |= {
                        "loss": None if codec == "compute" else 5.0 - turn,
                        "wire_bytes": 1000.0 * (rank + 1),
                    }
                    block |= {"interface_bytes": 3150.0}
                    recorder.take(seed, rank, block)
        for codec, loss in losses.items():
            final = {"record": "final", "codec": codec, "val_loss": loss + 0.01 * seed}
            recorder.take(seed, 0, final)
        recorder.write("end", {"seed": seed})
    recorder.close()
    return summarise(path)


def test_medians_pairs_and_bytes(tmp_path):
    summary = write(tmp_path / "made.jsonl")
    row = summary.row("int4")
    assert row.step_ms.samples == 9, "3 measured turns of 3 seeds"
    assert row.step_ms.median == pytest.approx(31 * 1.2)
    assert (row.step_ms.p20, row.step_ms.p80) == (pytest.approx(31 * 1.1), pytest.approx(31 * 1.3))
    assert row.ratio.p20 == pytest.approx(31 / 101)
    assert row.ratio.p80 == pytest.approx(31 / 101)
    assert row.exposed_ms.median == pytest.approx(10 * 1.2)
    assert row.wire_bytes == 1500
    assert row.busiest_wire_bytes == 2000
    assert row.interface_bytes == 1575, "both ranks read the sum of both"
    assert row.overhead == pytest.approx(0.05)
    assert summary.row("compute").exposed_ms is None
    assert summary.row("compute").losses is None


def test_loopback_counts_for_nothing(tmp_path):
    assert write(tmp_path / "made.jsonl", interface="lo").row("int4").interface_bytes is None


def test_losses_over_seeds(tmp_path):
    summary = write(tmp_path / "made.jsonl")
    losses = summary.row("int4").losses
    assert losses.mean == pytest.approx(2.012)
    assert losses.sd == pytest.approx(0.01)
    assert losses.difference == pytest.approx(0.002)
    assert losses.pooled_sd == pytest.approx(0.01)
    assert losses.within_two_sd is True
    assert summary.row("torch-powersgd:1").losses.within_two_sd is False


def test_two_standard_deviations():
    base = [1.0, 2.0, 3.0]
    pooled = statistics.stdev(base)
    assert within_two_sd([x + 1.99 * pooled for x in base], base) == (pytest.approx(pooled), True)
    assert within_two_sd([x + 2.01 * pooled for x in base], base) == (pytest.approx(pooled), False)
    assert within_two_sd([x - 2.01 * pooled for x in base], base)[1] is False
    assert within_two_sd([1.0, 2.0], [1.0, 2.0])[1] is None, "two seeds say too little"
    assert within_two_sd([1.0], base) == (None, None)


def test_verdicts(tmp_path):
    found = write(tmp_path / "a.jsonl").verdict()
    assert found.startswith("int4 is best here: 0.31 of plain DDP's step (bf16: 0.60)")
    assert "within 2 standard deviations" in found

    slow = STEP_MS | {"bf16": 99.0, "int8": 120.0, "int4": 110.0, "torch-powersgd:1": 130.0}
    found = write(tmp_path / "b.jsonl", slow).verdict()
    assert found == "Do not compress here: plain DDP is best; nothing saves more than 3 % of a step."

    harmful = LOSSES | {"int4": 2.5}
    found = write(tmp_path / "c.jsonl", losses=harmful).verdict()
    assert found.startswith("int8 is best here")
    assert "int4 is faster but ended at a higher loss" in found

    found = write(tmp_path / "d.jsonl", seeds=(0,)).verdict()
    assert "takes at least 3 seeds to say" in found

    found = write(tmp_path / "e.jsonl", seeds=(0,), turns=3).verdict()
    assert found == "No verdict: 2 samples, at least 3 are needed."


def test_the_table_shows_losing_rows_too(tmp_path):
    table = scenario_table(write(tmp_path / "made.jsonl", STEP_MS | {"int8": 300.0})).markdown()
    assert "| int8 | 2.980 |" in table
    assert "no (+1.0000)" in table
    assert "9 samples a codec (a sample is a block of 2 steps), seeds 0, 1, 2." in table


def test_a_torn_line_is_no_harm_and_the_file_goes_on(tmp_path):
    path = tmp_path / "made.jsonl"
    write(path, seeds=(0,))
    with path.open("a") as file:
        file.write('{"record": "block", "seed": 1, "tu')
    assert finished_seeds(path, SCENARIO) == {0}
    samples = summarise(path).row("int4").step_ms.samples
    summary = write(path, seeds=(1,))
    assert finished_seeds(path, SCENARIO) == {0, 1}
    assert summary.row("int4").step_ms.samples == 2 * samples
    assert [line["record"] for line in read_lines(path) if line["record"] in ("header", "resumed")] == [
        "header",
        "resumed",
    ]


def test_samples_of_an_interrupted_seed_are_kept(tmp_path):
    path = tmp_path / "made.jsonl"
    write(path, seeds=(0,))
    lines = [line for line in path.read_text().splitlines() if '"end"' not in line]
    path.write_text("\n".join(lines) + "\n")
    assert finished_seeds(path, SCENARIO) == set()
    summary = write(path, seeds=(0,))
    assert summary.row("int4").step_ms.samples == 6, "3 of each attempt"
    assert len(summary.row("int4").curve) == 4, "the loss is that of one attempt"


def test_another_scenario_is_refused(tmp_path):
    path = tmp_path / "made.jsonl"
    write(path)
    other = Scenario(name="made", codecs=("int8",), seeds=(0,), steps=60)
    with pytest.raises(ConfigError, match=r"another scenario \(it differs in codecs, steps\)"):
        finished_seeds(path, other)


def test_a_restart_drops_halves_of_blocks(tmp_path):
    recorder = Recorder(tmp_path / "made.jsonl", SCENARIO, {})
    block = {"record": "block", "turn": 0, "codec": "none", "steps": 1, "warmup": False, "step_ms": 1.0}
    assert recorder.take(0, 0, block) is None
    recorder.forget()
    assert recorder.take(0, 0, block) is None
    assert recorder.take(0, 1, block | {"step_ms": 2.0})["step_ms"] == [1.0, 2.0]
    recorder.close()


def test_a_full_disk_is_explained_and_keeps_what_there_is(tmp_path):
    import resource

    path = tmp_path / "made.jsonl"
    write(path, seeds=(0,))
    before = read_lines(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    recorder = Recorder(path, SCENARIO, {})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, hard))
        with pytest.raises(BenchError, match="what was measured until now is in it"):
            recorder.write("event", {"event": "long", "reason": "x" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        recorder.close()
    assert read_lines(path)[: len(before)] == before
    assert summarise(path).row("int4").step_ms.samples == 3


def test_a_folder_that_cannot_be_made_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="cannot write"):
        Recorder(tmp_path / "file" / "made.jsonl", SCENARIO, {})


def test_what_is_no_record(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"record": "step"}\n')
    with pytest.raises(ConfigError, match="is not a record of gradq bench"):
        summarise(path)
    path.write_text("not json\n")
    with pytest.raises(ConfigError, match="line 1 is not JSON"):
        summarise(path)
    write(tmp_path / "made.jsonl")
    newer = json.loads((tmp_path / "made.jsonl").read_text().splitlines()[0]) | {"schema_version": 2}
    path.write_text(json.dumps(newer) + "\n")
    with pytest.raises(ConfigError, match="schema 2, this gradq reads 1"):
        summarise(path)


def test_break_even():
    assert break_even([]) == ""
    assert break_even([(1e8, 1.1), (1e9, 1.2)]) == "nowhere"
    assert break_even([(1e8, 0.1), (1e9, 0.9)]) == "> 1 Gbit/s"
    assert break_even([(1e8, 0.5), (1e10, 2.0)]) == "1 Gbit/s", "half way on the logarithmic scale"


def test_groups_differ_in_their_link_only(tmp_path):
    summaries, two_nodes = [], {"nodes": 2, "ranks_per_node": 1, "seeds": [0]}
    for index, rate in enumerate((1e9, None, 1e8)):
        scenario = Scenario.from_dict(
            SCENARIO.to_dict() | two_nodes | {"name": f"s{index}", "link": {"rate_bps": rate}}
        )
        summaries.append(write(tmp_path / f"s{index}.jsonl", seeds=(0,), scenario=scenario))
    (group,) = groups(summaries)
    assert [summary.scenario.link.rate_bps for summary in group.summaries] == [1e8, 1e9, None]
    assert "| int4 | 0.307 | 0.307 | 0.307 |" in group.table().markdown()
    assert group.ratios()["int4"] == [(1e8, pytest.approx(31 / 101)), (1e9, pytest.approx(31 / 101))]
    assert groups(summaries[:1]) == []
    losses = write(tmp_path / "losses.jsonl")  # on one node
    (group,) = groups([losses, *summaries])
    assert [summary.scenario.name for summary in group.summaries] == ["s2", "s0", "s1"], "times are of nodes"
    assert group.others == (losses,)
    assert f"± {losses.row('int4').losses.sd:.4f}, yes |" in group.table().markdown(), "losses are of both"


def test_an_empty_record_gives_no_verdict(tmp_path):
    recorder = Recorder(tmp_path / "made.jsonl", SCENARIO, {})
    recorder.close()
    summary = summarise(tmp_path / "made.jsonl")
    assert summary.rows == []
    assert summary.verdict().startswith("No verdict")
    assert not math.isnan(summary.parameters)
