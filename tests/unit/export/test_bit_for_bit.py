"""Whole models: ONNX Runtime against the integer reference, every bit, on 450 inputs."""

import platform

import pytest
import torch
from nets import INPUTS, residual

from gradq import export, quant

SLOW = ("int8", "int7", "int4", "int3", "nf4", "codebook4")
pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="bit for bit is promised per target"
)


@pytest.mark.parametrize(
    "spec",
    [
        "mixed",
        *(
            pytest.param(s, marks=pytest.mark.slow)
            for s in ("int8", "int7", "int4", "int3", "nf4", "codebook4")
        ),
    ],
)
@torch.no_grad()
def test_onnx_runtime_equals_the_integer_reference_on_450_inputs(spec, tmp_path):
    qmodel, data = residual(spec)
    path = tmp_path / "model.onnx"
    export.onnx(qmodel, path)
    running = export.session(path)
    theirs = torch.from_numpy(running.run(None, {"x": data.numpy()})[0])
    assert len(theirs) == INPUTS
    assert torch.equal(theirs, quant.integer_reference(qmodel)(data))
    assert not torch.equal(theirs, qmodel(data))  # the simulation is close, and not the truth
    found = export.operators(path)
    assert found.counts["QLinearConv"] == 6
    assert found.counts["QLinearAdd"] == 2
    assert found.counts["QLinearGlobalAveragePool"] == 1
    assert found.counts["QGemm"] == 1
    assert not found.inexact
    assert not found.float_products
    one = torch.from_numpy(running.run(None, {"x": data[:1].numpy()})[0])
    assert torch.equal(one, theirs[:1])  # the batch is free
