"""Exported files that are cut off, damaged or foreign: an ExportError with the file and the remedy."""

from __future__ import annotations

import json
import shutil
import zipfile

import models
import pytest
import torch
from nets import prepared

from gradq import export
from gradq.errors import ExportError
from gradq.export.inspect import operators
from gradq.export.runtime import metadata_of, session


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A bundle's folder, and its zip file."""
    torch.set_num_threads(1)
    model, batches = models.build("mlp")
    qmodel = prepared(model, batches)
    folder = tmp_path_factory.mktemp("bundle")
    export.bundle(qmodel, folder / "model", variants=("x86-avx2", "arm"))
    with zipfile.ZipFile(folder / "model.zip", "w") as archive:
        for file in sorted((folder / "model").iterdir()):
            archive.write(file, file.name)
    return folder


def change(path: list, value: object):
    """A manifest with one entry replaced; None takes it away."""

    def edit(manifest: dict) -> str:
        place = manifest
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        if value is None:
            del place[path[-1]]
        return json.dumps(manifest)

    return edit


MANIFESTS = {
    "empty": (lambda manifest: "", "no readable manifest.json"),
    "cut off": (lambda manifest: json.dumps(manifest)[:40], "no readable manifest.json"),
    "deep": (lambda manifest: "[" * 100_000, "no readable manifest.json"),
    "a list": (lambda manifest: "[]", "holds a list, no table"),
    "another format": (change(["format"], 9), "has format 9; this gradq reads 1: export it again"),
    "no variants": (change(["variants"], None), "it lists no variants"),
    "empty variants": (change(["variants"], []), "it lists no variants"),
    "a variant that is text": (change(["variants", 0], "arm"), "variant 0 has no name"),
    "no file": (change(["variants", 1, "file"], None), "variant 1 has no file"),
    "no digest": (change(["variants", 1, "sha256"], 5), "variant 1 has no sha256"),
    "outside": (change(["variants", 0, "file"], "../model.zip"), "outside of the bundle"),
    "missing file": (change(["variants", 0, "file"], "gone.onnx"), "has no file gone.onnx"),
    "wrong digest": (change(["variants", 0, "sha256"], "00"), "is damaged: its checksum differs"),
    "no inputs": (change(["inputs"], None), "it lists no inputs"),
    "other inputs": (change(["inputs", 0, "name"], "tokens"), "inputs are not the model's"),
    "too few inputs": (change(["inputs"], []), "inputs are not the model's"),
    "no shape": (change(["inputs", 0, "shape"], None), "the shape of input 'x' is None"),
    "a wild shape": (change(["inputs", 0, "shape"], [-1, 12]), "the shape of input 'x'"),
    "a wild type": (change(["inputs", 0, "dtype"], "float99"), "the type of input 'x' is 'float99'"),
    "a wild range": (change(["inputs", 0, "high"], "all"), "the largest value of input 'x' is 'all'"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests(packed, tmp_path, case):
    edit, message = MANIFESTS[case]
    folder = shutil.copytree(packed / "model", tmp_path / "model")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(edit(manifest))
    with pytest.raises(ExportError, match=message) as error:
        export.load(folder, seconds=0.01, processor="x86-vnni")
    assert str(tmp_path) in str(error.value) or "the manifest's inputs" in str(error.value)


def zip_bytes(packed, change) -> bytes:
    data = (packed / "model.zip").read_bytes()
    return change(data)


ZIPS = {
    "empty": lambda data: b"",
    "text": lambda data: b"hello",
    "cut off": lambda data: data[: len(data) // 2],
    "flipped": lambda data: data[:300] + bytes(byte ^ 0xFF for byte in data[300:400]) + data[400:],
}


@pytest.mark.parametrize("case", ZIPS)
def test_zip_files(packed, tmp_path, case):
    path = tmp_path / "bad.zip"
    path.write_bytes(ZIPS[case]((packed / "model.zip").read_bytes()))
    with pytest.raises(ExportError, match=r"bad\.zip .*(damaged|checksum)"):
        export.load(path, seconds=0)


@pytest.mark.parametrize("case", ["empty", "text", "cut off", "folder", "missing", "zip"])
def test_models(packed, tmp_path, case):
    path = tmp_path / "bad.onnx"
    whole = (packed / "model" / "arm.onnx").read_bytes()
    if case == "folder":
        path.mkdir()
    elif case != "missing":
        zipped = (packed / "model.zip").read_bytes()
        path.write_bytes({"empty": b"", "text": b"hello", "cut off": whole[:500], "zip": zipped}[case])
    for load in (session, metadata_of, operators, lambda path: session(path, precise=True)):
        with pytest.raises(ExportError, match=r"bad\.onnx"):
            load(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("gradq.float_products", "many"), ("gradq.float_islands", "[1]"), ("gradq.float_islands", "{")],
)
def test_metadata_that_makes_no_sense(packed, tmp_path, key, value):
    import onnx

    proto = onnx.load(str(packed / "model" / "arm.onnx"))
    kept = {p.key: p.value for p in proto.metadata_props} | {key: value}
    onnx.helper.set_model_props(proto, kept)
    onnx.save(proto, str(tmp_path / "bad.onnx"))
    with pytest.raises(ExportError, match=r"bad\.onnx: gradq's metadata in it is damaged"):
        operators(tmp_path / "bad.onnx")


def test_a_foreign_model_needs_no_metadata(packed, tmp_path):
    import onnx

    proto = onnx.load(str(packed / "model" / "arm.onnx"))
    del proto.metadata_props[:]
    onnx.save(proto, str(tmp_path / "foreign.onnx"))
    assert operators(tmp_path / "foreign.onnx").counts
    assert metadata_of(tmp_path / "foreign.onnx") == {}
