"""Bundles: variants for processors, the choice between them, damage and wrong use."""

import json
import zipfile

import models
import pytest
import torch
from nets import prepared

from gradq import export, quant
from gradq.errors import ConfigError, ExportError
from gradq.export.timing import Turn
from gradq.quant.calibrate import weights


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """(zip file, model, batches) with two variants."""
    torch.set_num_threads(1)
    model, batches = models.build("mlp")
    qmodel = prepared(model, batches)
    path = tmp_path_factory.mktemp("bundle") / "model.zip"
    export.bundle(qmodel, path, variants=("x86-avx2", "arm"), accuracy={"arm": 90.0})
    return path, qmodel, batches


def test_the_manifest_says_what_is_in_it(packed):
    with zipfile.ZipFile(packed[0]) as archive:
        manifest = json.loads(archive.read("manifest.json"))
        assert {v["file"] for v in manifest["variants"]} | {"manifest.json"} == set(archive.namelist())
    names = [(v["name"], v["accuracy"]) for v in manifest["variants"]]
    assert names == [("x86-avx2", None), ("arm", 90.0), ("float", None)]
    assert manifest["inputs"] == [{"name": "x", "dtype": "float32", "shape": [6, 12], "high": None}]


def test_loading_chooses_for_this_processor_and_says_why(packed):
    path, qmodel, batches = packed
    loaded = export.load(path, seconds=0.05)
    assert loaded.chosen in loaded.why
    assert export.features() in loaded.why
    loaded = export.load(path, seconds=0)
    expected = quant.integer_reference(export.variant(qmodel, loaded.chosen))(batches[0])
    assert torch.equal(torch.from_numpy(loaded(batches[0])[0]), expected)


def planted(monkeypatch, **ms):
    """Timings as they are given, instead of measured."""
    turns = {name: [Turn(t, t) for t in times] for name, times in ms.items()}
    order = {"x86-avx2": "avx2", "arm": "arm", "float": "plain"}
    monkeypatch.setattr(
        "gradq.export.bundles.interleave", lambda calls, **_: {n: turns[order[n]] for n in calls}
    )


@pytest.mark.parametrize(
    ("ms", "chosen"),
    [
        ({"avx2": [1.0, 1.0, 1.04], "arm": [0.97, 0.99, 1.0], "plain": [2.0] * 3}, "x86-avx2"),  # noise
        ({"avx2": [1.0, 1.0, 1.0], "arm": [0.7, 1.0, 0.7], "plain": [2.0] * 3}, "x86-avx2"),  # not always
        ({"avx2": [1.0, 1.0, 1.0], "arm": [0.7, 0.8, 0.7], "plain": [2.0] * 3}, "arm"),
        ({"avx2": [1.0, 1.0, 1.0], "arm": [0.7, 0.8, 0.7], "plain": [0.5] * 3}, "float"),
    ],
)
def test_the_native_variant_is_taken_unless_another_is_clearly_faster(packed, monkeypatch, ms, chosen):
    planted(monkeypatch, **ms)
    loaded = export.load(packed[0], processor="x86-vnni")
    assert set(loaded.timings_ms) == {"x86-avx2", "arm", "float"}
    assert loaded.chosen == chosen
    assert "at batch 1, against" in loaded.why
    assert ("made for it" in loaded.why) or chosen == "x86-avx2"


def test_a_choice_can_be_pinned(packed):
    asked = export.load(packed[0], choose="arm")
    assert (asked.chosen, asked.why) == ("arm", "arm: asked for")
    first = export.load(packed[0], seconds=0, processor="arm")
    assert (first.chosen, first.timings_ms) == ("arm", {})


def test_s8_activations_are_not_offered_where_they_overflow(packed):
    loaded = export.load(packed[0], seconds=0, processor="x86-avx2")
    assert loaded.chosen == "x86-avx2"
    assert "not for this processor: arm" in loaded.why


def test_wrong_inputs_are_named(packed):
    loaded = export.load(packed[0], seconds=0)
    with pytest.raises(ConfigError, match=r"input x is float32 \[2, 5\]; the model takes float32"):
        loaded(torch.rand(2, 5))
    with pytest.raises(ConfigError, match="input x is float64"):
        loaded(torch.rand(2, 12, dtype=torch.float64))
    with pytest.raises(ConfigError, match="got 2 inputs"):
        loaded(torch.rand(2, 12), 1)


def test_damaged_and_foreign_files(packed, tmp_path):
    with zipfile.ZipFile(packed[0]) as archive:
        archive.extractall(tmp_path / "b")
    assert export.load(tmp_path / "b", seconds=0).chosen
    for file in (tmp_path / "b").glob("*.onnx"):
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(ExportError, match="is damaged"):
        export.load(tmp_path / "b", seconds=0)
    manifest = tmp_path / "b" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(ExportError, match="has format 99"):
        export.load(tmp_path / "b")
    manifest.unlink()
    with pytest.raises(ExportError, match="no readable manifest"):
        export.load(tmp_path / "b")
    with pytest.raises(ExportError, match="does not exist"):
        export.load(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ExportError, match="neither a bundle's folder nor its zip file"):
        export.load(tmp_path / "text")
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../evil", "x")
    with pytest.raises(ExportError, match="holds the path"):
        export.load(tmp_path / "evil.zip")


def test_wrong_use_leaves_nothing(packed, tmp_path):
    _, qmodel, _ = packed
    with pytest.raises(ConfigError, match="legal: x86-vnni"):
        export.bundle(qmodel, tmp_path / "b", variants=("riscv",))
    with pytest.raises(ConfigError, match="at least one"):
        export.bundle({}, tmp_path / "b")
    with pytest.raises(ConfigError, match="the bundle has"):
        export.load(packed[0], choose="x86-vnni")
    uncalibrated = quant.prepare(models.build("mlp")[0], packed[2][0])
    with pytest.raises(Exception, match="no range yet"):
        export.bundle({"arm": uncalibrated}, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_variants_keep_what_was_calibrated(packed):
    _, qmodel, batches = packed
    truth = quant.integer_reference(qmodel)(batches[0])
    for target, bits in (("x86-vnni", {8}), ("x86-avx2", {7}), ("arm", {8}), ("edge-int4", {4})):
        made = export.variant(qmodel, target)
        assert {q.format.bits for _, q in weights(made).values()} == bits
        close = (quant.integer_reference(made)(batches[0]) - truth).abs().max() / truth.abs().max()
        assert float(close) < (0.3 if target == "edge-int4" else 0.03)
    with pytest.raises(ConfigError, match="target is 'gpu'"):
        export.variant(qmodel, "gpu")


@pytest.mark.slow
def test_int4_for_batch_one_in_a_folder(packed, tmp_path):
    _, qmodel, batches = packed
    export.bundle(qmodel, tmp_path / "b", variants=("x86-vnni", "edge-int4"))
    export.bundle(qmodel, tmp_path / "b", variants=("edge-int4",))  # replaces a bundle
    assert {p.name for p in (tmp_path / "b").iterdir()} == {"manifest.json", "edge-int4.onnx", "float.onnx"}
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    loaded = export.load(tmp_path / "b", choose="edge-int4")
    truth = quant.integer_reference(export.variant(qmodel, "edge-int4"))(batches[0])
    error = (torch.from_numpy(loaded(batches[0])[0]) - truth).abs().max() / truth.abs().max()
    assert float(error) < 0.05
    (tmp_path / "mine").mkdir()
    with pytest.raises(ExportError, match="is no bundle"):
        export.bundle(qmodel, tmp_path / "mine", variants=("arm",))
