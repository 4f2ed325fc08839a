"""`.pt2` files: plain torch loads them and computes what was simulated; errors leave nothing behind."""

import json
import subprocess
import sys
import zipfile

import models
import pytest
import torch
from nets import prepared
from torch import nn

import gradq
from gradq import export, quant
from gradq.errors import CalibrationError, ConfigError, ExportError, NonFiniteError

LOAD = """
import sys, torch
program = torch.export.load(sys.argv[1])
torch.save([program.module()(x) for x in torch.load(sys.argv[2])], sys.argv[3])
assert "gradq" not in sys.modules
"""


def outputs(result):
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]


@torch.no_grad()
def test_a_fresh_process_without_gradq_computes_the_simulation(tmp_path):
    model, batches = models.build("cnn")
    qmodel = prepared(model, batches)
    report = export.pt2(qmodel, tmp_path / "m.pt2", accuracy=97.5, metadata={"note": "hello"})
    assert report.size_bytes == (tmp_path / "m.pt2").stat().st_size
    assert report.forms == {"int8": 7}
    assert "7 int8" in str(report)
    inputs = [batches[0], batches[0][:1], batches[0][:3]]  # the batch is free
    torch.save(inputs, tmp_path / "x.pt")
    command = [sys.executable, "-W", "error", "-c", LOAD, "m.pt2", "x.pt", "y.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for x, y in zip(inputs, torch.load(tmp_path / "y.pt"), strict=True):
        assert torch.equal(y, qmodel(x))
    facts = {"gradq.json": ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=facts)
    assert json.loads(facts["gradq.json"]) == report.metadata
    assert report.metadata["gradq.version"] == gradq.__version__
    assert report.metadata["gradq.accuracy"] == "97.5"
    assert report.metadata["note"] == "hello"
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
        held = b"".join(archive.read(name) for name in archive.namelist())
    assert b"site-packages" not in held
    assert b".py" not in held


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("mlp", {"weights": "int4"}),
        ("mlp", {"weights": "codebook4", "activations": "int8-sym"}),
        ("mlp", {"weights": "int4-g32", "activations": "int8-token"}),
        ("gpt", {"activations": "int8-batch"}),
        ("recurrent", {}),
        ("volume", {"weights": "int3"}),
    ],
)
@torch.no_grad()
def test_every_format_is_the_simulation_bit_for_bit(name, config):
    model, batches = models.build(name)
    qmodel = prepared(model, batches, **config)
    inputs = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
    program = export.exported_program(qmodel).module()
    for ours, theirs in zip(outputs(program(*inputs)), outputs(qmodel(*inputs)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
@torch.no_grad()
def test_attention_too():
    model, batches = models.build("transformer")
    qmodel = prepared(model, batches)
    assert torch.equal(export.exported_program(qmodel).module()(batches[0]), qmodel(batches[0]))


@pytest.mark.slow
def test_files_are_as_small_as_their_codes(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)), torch.randn(8, 256)
    elements = 2 * 256 * 512
    for spec, width in (("int8", 1.0), ("int4", 0.5), ("codebook4", 0.5)):
        report = export.pt2(prepared(model, [x], weights=spec), tmp_path / "m.pt2")
        assert width * elements < report.size_bytes < width * elements + 90_000  # the graph


@pytest.mark.parametrize("activations", ["int8", "int8-sym", "int8-token", "int8-batch"])
@torch.no_grad()
def test_int_mm_multiplies_codes(activations):
    model, batches = models.build("mlp")
    qmodel = prepared(model, batches, activations=activations)
    program = export.exported_program(qmodel, operators="int_mm")
    called = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert called.count(torch.ops.aten._int_mm.default) == 3
    assert torch.ops.aten.linear.default not in called
    for x in (batches[0], batches[0][:1]):
        expected = quant.integer_reference(qmodel)(x)
        error = (program.module()(x) - expected).abs().max() / expected.abs().max()
        assert float(error) < 1e-5


@torch.no_grad()
def test_int_mm_leaves_convolutions_in_float_and_says_so(tmp_path):
    model, batches = models.build("cnn")
    report = export.pt2(prepared(model, batches), tmp_path / "m.pt2", operators="int_mm")
    assert report.forms == {"int8": 6, "int_mm": 1}
    assert len(report.float_islands) == 6
    assert "this is a QuantConv2d" in str(report)


@torch.no_grad()
def test_tied_weights_stay_one_tensor_and_int_mm_reads_it():
    model, batches = models.build("gpt")
    qmodel = prepared(model, batches)
    program = export.exported_program(qmodel, operators="int_mm")
    expected = qmodel(*batches[0]) if isinstance(batches[0], tuple) else qmodel(batches[0])
    inputs = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
    got, expected = outputs(program.module()(*inputs))[0], outputs(expected)[0]
    assert torch.allclose(got, expected, atol=1e-4)
    tables = [t for t in program.state_dict.values() if t.dtype == torch.int8 and t.shape == (11, 16)]
    assert len({t.data_ptr() for t in tables}) == 1


@torch.no_grad()
def test_pt2e_writes_the_operators_of_torchao_with_our_ranges():
    model, batches = models.build("cnn")
    qmodel = prepared(model, batches)
    program = export.exported_program(qmodel, operators="pt2e")
    names = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert sum("dequantize_per_channel" in n for n in names) == 7
    assert any("quantize_per_tensor" in n for n in names)
    assert torch.equal(program.module()(batches[0]), qmodel(batches[0]))


# --- errors leave nothing behind ----------------------------------------------------------------------------


def refused(tmp_path, error, match, model, **options):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"before")
    with pytest.raises(error, match=match):
        export.pt2(model, path, **options)
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]


class Branching(nn.Module):
    """torch.fx traces it, but the branch depends on a value."""

    def __init__(self):
        super().__init__()
        self.linear = quant.QuantLinear(3, 3, activations="int8-batch")

    def forward(self, x):
        y = self.linear(x)
        return y if y.sum() > 0 else -y


def test_a_model_that_cannot_be_traced(tmp_path):
    refused(
        tmp_path, ExportError, "torch.export cannot trace Branching", Branching(),
        example_inputs=torch.rand(2, 3),
    )  # fmt: skip


def test_a_missing_calibration(tmp_path):
    model, batches = models.build("mlp")
    refused(tmp_path, CalibrationError, "has no range yet", quant.prepare(model, batches[0]))


def test_a_weight_with_nan(tmp_path):
    model, batches = models.build("mlp")
    qmodel = prepared(model, batches)
    qmodel.get_submodule("layers.2").weight.data[0, 0] = float("nan")
    refused(tmp_path, NonFiniteError, r"layers\.2\.weight", qmodel)


def test_arguments_that_do_not_fit(tmp_path):
    model, batches = models.build("mlp")
    qmodel = prepared(model, batches)
    refused(tmp_path, ConfigError, "operators is 'cuda'; legal: aten, int_mm, pt2e", qmodel, operators="cuda")
    refused(tmp_path, ExportError, "does not run on inputs", qmodel, example_inputs=torch.rand(2, 5))
    refused(tmp_path, ExportError, "no quantized layer", nn.ReLU(), example_inputs=batches[0])
    grouped = prepared(model, batches, weights="int4-g32")
    refused(tmp_path, ExportError, r"layers\.0\.weight has the format", grouped, operators="pt2e")
    dynamic = prepared(model, batches, activations="int8-token")
    refused(tmp_path, ExportError, "has the dynamic format", dynamic, operators="pt2e")


def test_paths_that_cannot_be_written(tmp_path):
    model, batches = models.build("mlp")
    qmodel = prepared(model, batches)
    with pytest.raises(ConfigError, match=r"end with \.pt2"):
        export.pt2(qmodel, tmp_path / "model.pt")
    with pytest.raises(ExportError, match="cannot write"):
        export.pt2(qmodel, tmp_path / "missing" / "model.pt2")
    assert list(tmp_path.iterdir()) == []
