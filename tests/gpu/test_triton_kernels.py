"""The Triton kernels equal the plain-torch reference byte for byte.

On a machine with a GPU: `pytest -m gpu tests/gpu`. Elsewhere they run in Triton's interpreter, which
tests/unit/test_triton.py starts: TRITON_INTERPRET=1 must be set before triton is imported. The interpreter
takes a tenth of a second a launch, so it sees fewer cases.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
from pathlib import Path

import pytest
import torch

from gradq import codecs, rng
from gradq.codecs.exact import reference as reference_exact
from gradq.codecs.exact.format import ExactFormat
from gradq.codecs.rotated.format import RotatedFormat
from gradq.contrib.table import TABLE_NAMES
from gradq.errors import KernelError
from gradq.rng import EncodeContext

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import test_kernels as table
import test_rotated as rotated_table

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

if INTERPRETED or torch.cuda.is_available():
    from gradq.codecs.exact import cuda as cuda_exact
    from gradq.codecs.rotated import cuda as cuda_rotated
    from gradq.codecs.uniform import cuda
elif "-m" in sys.argv and "gpu" in sys.argv:
    pytest.skip("no CUDA device", allow_module_level=True)


def check(n, num_bits, block_size, draw, content=None, residual_kind=None, stochastic=None, num_rows=None):
    table.check_case(
        n,
        num_bits,
        block_size,
        draw.choice(table.SCALES),
        content or draw.choice(table.CONTENTS),
        residual_kind or draw.choice(table.RESIDUALS),
        draw.random() < 0.5 if stochastic is None else stochastic,
        draw,
        kernels=cuda,
        device=DEVICE,
        alignments=(draw.choice([0, 1]),) if INTERPRETED else (0, 1),
        num_rows=num_rows,
    )


# --- uniform -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bits", table.BITS)
def test_uniform_equals_the_reference(num_bits):
    draw = random.Random(num_bits)
    if INTERPRETED:
        n, block_size = (257, 256) if num_bits % 2 else (1025, 64)
        check(n, num_bits, block_size, draw, "normal", "separate", num_bits % 4 < 2)
        return
    for n, block_size in itertools.product(table.LENGTHS, table.BLOCKS):
        check(n, num_bits, block_size, draw)


@pytest.mark.parametrize("content", table.CONTENTS[1::2] if INTERPRETED else table.CONTENTS)
def test_awkward_values_equal_the_reference(content):
    draw = random.Random(content)
    if INTERPRETED:
        check(300, draw.choice((3, 4, 8)), 264, draw, content, draw.choice(table.RESIDUALS[2:]), num_rows=1)
        return
    for num_bits, kind, stochastic in itertools.product((3, 4, 8), table.RESIDUALS, (False, True)):
        check(513, num_bits, 256, draw, content, kind, stochastic)


def test_several_programs_and_offsets():
    """More blocks than one program takes; blocks that are no power of two."""
    draw = random.Random(5)
    check(4096 + 77, 4, 256, draw, "normal", "in place", True, num_rows=3)
    check(2003, 5, 1000, draw, "nan", "unaligned", False, num_rows=2)


@pytest.mark.skipif(INTERPRETED, reason="needs 20 GB of device memory")
def test_more_elements_than_32_bits_count():
    """Offsets are 64 bits wide: the end of a long segment is as right as its start."""
    n = 2**31 + 5000
    if torch.cuda.mem_get_info()[1] < 40e9:
        pytest.skip("needs 40 GB of device memory")
    for spec in ("int8", "int2", "rot3"):
        codec = codecs.from_spec(spec)
        x = torch.zeros(n, device=DEVICE)
        grain = codec.block_size
        start = n // grain * grain - grain
        x[start:] = torch.randn(n - start, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        payload = torch.zeros(1, codec.nbytes(n), dtype=torch.uint8, device=DEVICE)
        codec.encode(x, payload[0], context=EncodeContext(key=9))
        out = torch.ones(n, device=DEVICE)
        codec.decode_mean(payload, out)
        tail, alone = x[start:].clone(), torch.empty(n - start, device=DEVICE)
        small = torch.zeros(codec.nbytes(n - start), dtype=torch.uint8, device=DEVICE)
        codec.encode(tail, small, context=EncodeContext(key=9, first_block=start // grain))
        codec.decode(small, alone)
        assert torch.equal(out[start:], alone), spec
        assert not bool(out[:start].any()), spec


# --- rotated -------------------------------------------------------------------------------------------

KINDS = ("ordinary", "wide", "tiny", "huge", "inf", "sparse")


@pytest.mark.parametrize("num_bits", range(1, 7))
def test_rotated_equals_the_reference(num_bits):
    """Full tiles and last ones of a power of two of rows and of others."""
    cases = list(itertools.product(KINDS, rotated_table.SIZES, (True, False)))
    if INTERPRETED:
        sizes = (17, 1000, 4096 + 300, 4095, 255, 4096 + 128)
        cases = [(KINDS[num_bits - 1], sizes[num_bits - 1], True), ("ordinary", 4096, False)]
    for kind, n, unbiased in cases:
        truth, ours = rotated_table.both(n, kind, num_bits, False, unbiased, cuda_rotated, DEVICE)
        for name, a, b in zip(("payload", "residual", "decoded"), truth, ours, strict=True):
            same = (table.bits(a) == table.bits(b)) | (a.isnan() & b.isnan())
            assert bool(same.all()), (kind, n, unbiased, name, (~same).nonzero().flatten()[:5].tolist())


@pytest.mark.parametrize("num_rows", [2, 3])
def test_the_mean_of_rotated_payloads(num_rows, monkeypatch):
    """Rows further apart than they are long, one of them NaN in its first tile."""
    monkeypatch.setenv("GRADQ_KERNELS", "reference")
    n, codec = 4096 + 500, codecs.from_spec("rot4")
    rows = torch.full((num_rows, codec.nbytes(n) + 13), 0xA5, dtype=torch.uint8)
    expected = None
    for rank, row in enumerate(rows):
        x = torch.randn(n, generator=torch.Generator().manual_seed(rank))
        if rank == 1:
            x[7] = torch.nan
        codec.encode(x, row[: codec.nbytes(n)], context=EncodeContext(key=rank))
        out = torch.empty(n)
        codec.decode(row[: codec.nbytes(n)], out)
        expected = out if expected is None else expected + out
    out = torch.empty(n, device=DEVICE)
    cuda_rotated.decode_mean(rows.to(DEVICE)[:, : codec.nbytes(n)], out, RotatedFormat(4, trellis=False))
    assert bool(out[:4096].isnan().all())
    assert torch.equal(out[4096:].cpu(), (expected / num_rows)[4096:])


# --- exact ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "wire_dtype"), table.EXACT, ids=str)
def test_exact_equals_the_reference(dtype, wire_dtype):
    """The mean of three is a quotient, not a product with a third."""
    n, num_rows, form, context = 1500, 3, ExactFormat(wire_dtype), EncodeContext(key=0)
    size = n * wire_dtype.itemsize
    rows = torch.zeros(num_rows, size + 8, dtype=torch.uint8, device=DEVICE)
    x = torch.randn(num_rows, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1, 5], x[2, 7] = torch.inf, torch.nan
    for row, value in zip(rows, x, strict=True):
        truth = torch.empty(size, dtype=torch.uint8)
        cuda_exact.encode(value.to(DEVICE), row[:size], form, context)
        reference_exact.encode(value, truth, form, context)
        same = torch.equal(row[:size].cpu(), truth)
        assert same or DEVICE == "cuda", "bytes differ"  # there a NaN may have other bits
        assert torch.allclose(row[:size].cpu().view(wire_dtype), truth.view(wire_dtype), 0, 0, equal_nan=True)
    out, expected = torch.empty(n, dtype=dtype, device=DEVICE), torch.empty(n, dtype=dtype)
    for shown in (rows[:, :size], rows[:1, :size]):
        cuda_exact.decode_mean(shown, out, form)
        reference_exact.decode_mean(shown.cpu(), expected, form)
        assert torch.allclose(out.cpu(), expected, 0, 0, equal_nan=True)


# --- refusals ------------------------------------------------------------------------------------------


@pytest.fixture
def on_the_device(monkeypatch):
    monkeypatch.setenv("GRADQ_KERNELS", "triton")


@pytest.mark.parametrize("spec", [*TABLE_NAMES, "rot1", "rot2", "rot3(levels=trellis)"])
def test_codecs_without_kernels_are_refused_by_name(spec, on_the_device):
    codec = codecs.from_spec(spec)
    x, payload = torch.randn(64, device=DEVICE), torch.zeros(999, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(KernelError, match=spec if spec in TABLE_NAMES else r"rot\d\(levels=scalar\)"):
        codec.encode(x, payload, context=EncodeContext(key=1))
    with pytest.raises(KernelError):
        codec.decode(payload, x)


@pytest.mark.parametrize("spec", ["int8", "int3", "rot4"])
def test_memory_that_does_not_fit_is_refused(spec, on_the_device):
    table.check_refusals(spec, DEVICE)


@pytest.mark.parametrize("spec", ["int4", "rot2(levels=scalar)", "bf16"])
def test_warming_up_and_the_codec_contract(spec, on_the_device, monkeypatch):
    """Through the codec, as the collectives call it; the same bytes as the CPU's."""
    codec = codecs.from_spec(spec)
    codec.warm_up(torch.device(DEVICE), 3)
    x = torch.randn(4096 + 5 if "rot" in spec else 300, generator=torch.Generator().manual_seed(0))
    context = EncodeContext(key=rng.dither_key(1, 2, 3, 1), shift=rng.dither_shift(1, 3), first_block=2)
    payload = torch.zeros(codec.nbytes(len(x)), dtype=torch.uint8, device=DEVICE)
    codec.encode(x.to(DEVICE), payload, context=context)
    monkeypatch.setenv("GRADQ_KERNELS", "reference")
    truth = torch.zeros(codec.nbytes(len(x)), dtype=torch.uint8)
    codec.encode(x, truth, context=context)
    assert torch.equal(payload.cpu(), truth)
