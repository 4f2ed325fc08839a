"""The operators: `torch.library.opcheck` on each; they are the kernels; their fakes check shapes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gradq.codecs import from_spec
from gradq.errors import KernelError
from gradq.kernels import cpu, cpu_rotated
from gradq.kernels.library import OPERATORS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
UNIFORM = (4, 256, torch.bfloat16)


def inputs(name: str, device: str, n: int = 700):
    """Arguments of an operator, all its tensors fresh."""
    codec = from_spec("int4" if name.startswith("uniform") else "rot4")
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(device)
    payload = torch.zeros(codec.nbytes(n), dtype=torch.uint8, device=device)
    residuals = (torch.full_like(x, 1e-3), torch.zeros_like(x), 2.0)
    operator = getattr(torch.ops.gradq, name).default
    encode = getattr(torch.ops.gradq, name.split("_")[0] + "_encode").default
    how = (*UNIFORM, True, -5, 77, 3) if name.startswith("uniform") else (4, False, True, 12345)
    if name.endswith("encode"):
        return operator, (x, payload, *how, *residuals)
    encode(x, payload, *how, None, None, 1.0)
    form = UNIFORM if name.startswith("uniform") else (4, False)
    payload = torch.stack((payload, payload)) if name.endswith("mean") else payload
    return operator, (payload, torch.zeros_like(x), *form)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, device):
    operator, arguments = inputs(name, device)
    results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("name", ["uniform_encode", "rotated_encode"])
def test_without_residuals(name):
    operator, arguments = inputs(name, "cpu")
    assert set(torch.library.opcheck(operator, (*arguments[:-3], None, None, 1.0)).values()) == {"SUCCESS"}


def test_they_are_the_kernels():
    operator, (x, payload, *how, residual, new_residual, loss_scale) = inputs("uniform_encode", "cpu")
    operator(x, payload, *how, residual, new_residual, loss_scale)
    truth, truth_residual = torch.zeros_like(payload), torch.zeros_like(x)
    cpu.uniform_encode(
        x, truth, num_bits=4, block_size=256, scale_dtype=torch.bfloat16, stochastic=True, key=2**64 - 5,
        shift=77, first_block=3, residual=residual, new_residual=truth_residual, loss_scale=2.0,
    )  # fmt: skip
    assert torch.equal(payload, truth)
    assert torch.equal(new_residual, truth_residual)
    operator, (payload, out, *form) = inputs("rotated_decode", "cpu")
    operator(payload, out, *form)
    truth = torch.empty_like(out)
    cpu_rotated.rotated_decode(payload, truth, num_bits=4, trellis=False)
    assert torch.equal(out, truth)


def test_fake_tensors_are_checked():
    with FakeTensorMode():
        x, payload = torch.empty(1000), torch.empty(100, dtype=torch.uint8)
        with pytest.raises(KernelError, match="at least 508 elements"):
            torch.ops.gradq.uniform_decode(payload, x, *UNIFORM)
        with pytest.raises(KernelError, match="float32"):
            torch.ops.gradq.rotated_decode(payload, x.double(), 4, False)
        with pytest.raises(KernelError, match="only where residual"):
            torch.ops.gradq.rotated_encode(x, payload, 1, False, True, 0, None, x, 1.0)


def test_schemas_say_what_is_written():
    for name in OPERATORS:
        schema = getattr(torch.ops.gradq, name).default._schema
        written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        expected = {"payload", "new_residual"} if name.endswith("encode") else {"out"}
        assert written == expected, name
