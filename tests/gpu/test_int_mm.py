"""`.pt2` programs on `torch._int_mm` equal the integer reference on a GPU: `pytest -m gpu tests/gpu`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.export.passes import move_to_device_pass

from gradq import export, quant

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "export"))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "quant"))

import models
from nets import prepared

pytestmark = pytest.mark.gpu


ACTIVATIONS = ("int8", "int8-sym", "int8-token", "int8-batch")
TOLERANCE = 1e-5


@torch.no_grad()
def errors(activations: str, device: str) -> dict[int, float]:
    """The largest error by the number of rows; 1 is fewer than CUDA's own limit of 17."""
    model, batches = models.build("mlp")
    qmodel = prepared(model, batches, activations=activations)
    program = move_to_device_pass(export.exported_program(qmodel, operators="int_mm"), device).module()
    found = {}
    for x in (batches[0], batches[0][:1]):
        expected = quant.integer_reference(qmodel)(x)
        error = (program(x.to(device)).cpu() - expected).abs().max() / expected.abs().max()
        found[len(x)] = float(error)
    return found


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_int_mm_equals_the_integer_reference(activations):
    assert max(errors(activations, "cuda").values()) < TOLERANCE
