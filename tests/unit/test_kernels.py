"""The kernels: the Numba backend equals the plain-torch reference byte for byte, over an awkward table."""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
import math
import random
import subprocess
import sys

import pytest
import torch

from gradq.codecs import from_spec
from gradq.codecs.exact import cpu as cpu_exact
from gradq.codecs.exact import reference as reference_exact
from gradq.codecs.exact.format import ExactFormat
from gradq.codecs.uniform import cpu, reference
from gradq.codecs.uniform.format import BACKENDS, UniformFormat
from gradq.errors import KernelError
from gradq.kernels.loader import backend_name
from gradq.kernels.reference_tools import fused
from gradq.rng import EncodeContext

BITS = range(2, 9)
OFTEN = (2, 3, 4, 8)  # block sizes besides 256 are in use with these
LENGTHS = (0, 1, 7, 8, 9, 63, 64, 65, 255, 256, 257, 511, 1000, 1025)
BLOCKS = (64, 72, 128, 256, 264, 1000, 1024)
SCALES = (torch.float32, torch.bfloat16, torch.float16)
CONTENTS = (
    "normal", "zeros", "minus zeros", "denormal", "tiny", "small", "huge", "largest", "nan", "inf", "half",
)  # fmt: skip
RESIDUALS = ("none", "read only", "in place", "separate", "unaligned")
LOSS_SCALES = (1.0, 65536.0, 3.0, 1 / 7)
CANARY = 0xA5


def nbytes(n: int, num_bits: int, block_size: int, scale_dtype: torch.dtype) -> int:
    lengths = [min(block_size, n - start) for start in range(0, n, block_size)]
    return sum(scale_dtype.itemsize + -(-length // 8) * num_bits for length in lengths)


def values(content: str, n: int, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(n, generator=generator)
    scaled = {
        "denormal": 1e-40,
        "tiny": 1e-37,
        "small": 1e-7,
        "huge": 3e38,
        "zeros": 0.0,
        "minus zeros": -0.0,
    }
    if content in scaled:
        x = x * scaled[content] if content != "minus zeros" else torch.full((n,), -0.0)
    if content == "largest":
        x = torch.full((n,), torch.finfo(torch.float32).max)
    if n:
        place = int(torch.randint(n, (1,), generator=generator))
        if content == "nan":
            x[place] = math.nan
        if content == "inf":
            x[place] = -math.inf
        if content == "half":
            x[n // 2 :] = 0
    return x


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def offset_copy(x: torch.Tensor, offset: int, device: str = "cpu") -> torch.Tensor:
    """A copy whose address is no multiple of a vector's size."""
    return torch.cat((torch.zeros(offset), x)).to(device)[offset:]


def encode(kernels, x, residual_kind, residual, form, context, device="cpu"):
    """The payload with canaries around it, the residual read, the one written."""
    size = nbytes(x.numel(), form.num_bits, form.block_size, form.scale_dtype)
    buffer = torch.full((size + 16,), CANARY, dtype=torch.uint8, device=device)
    x, residual = offset_copy(x, x.storage_offset() % 4, device), residual.to(device)
    old = None if residual_kind == "none" else residual.clone()
    new = {
        "none": None,
        "read only": None,
        "in place": old,
        "separate": torch.full_like(x, 7.0),
        "unaligned": offset_copy(torch.full(x.shape, 7.0), 1, device),
    }[residual_kind]
    kernels.encode(x, buffer[8 : 8 + size], form, context, old, new)
    return tuple(None if t is None else t.cpu() for t in (buffer, old, new))


def one_nan(x: torch.Tensor) -> torch.Tensor:
    """On the CPU; if it comes from a GPU, whose arithmetic has a NaN of its own, with all NaNs the same."""
    return x if x.is_cpu else torch.where(x.isnan(), math.nan, x).cpu()


def assert_same(name: str, ours: torch.Tensor | None, truth: torch.Tensor | None, case: object) -> None:
    if ours is None or truth is None:
        assert ours is truth
        return
    differ = (bits(ours) != bits(truth)).nonzero().flatten()[:5]
    assert differ.numel() == 0, f"{name} differs at {differ.tolist()} for {case}"


def check_case(
    n, num_bits, block_size, scale_dtype, content, residual_kind, stochastic, draw,
    kernels=cpu, device="cpu", alignments=(0, 1), num_rows=None,
):  # fmt: skip
    """Encode, decode and the mean against the reference, bit for bit; on a GPU all NaNs are one."""
    case = locals().copy()
    generator = torch.Generator().manual_seed(draw.getrandbits(31))
    x = offset_copy(values(content, n, generator), draw.choice([0, 1]))
    residual = values(draw.choice(["normal", "zeros", "tiny"]), n, generator)
    form = UniformFormat(num_bits, block_size, scale_dtype, stochastic)
    context = EncodeContext(
        key=draw.getrandbits(64),
        shift=draw.randrange(1 << 16),
        first_block=draw.choice([0, 5, 2**32 - 1, 2**33 + 1]),
        loss_scale=draw.choice(LOSS_SCALES),
    )
    truth = encode(reference, x, residual_kind, residual, form, context)
    ours = encode(kernels, x, residual_kind, residual, form, context, device)
    for name, a, b in zip(("payload", "old residual", "new residual"), ours, truth, strict=True):
        assert_same(name, a, b, case)

    num_rows = num_rows or draw.choice([1, 2, 3, 4, 5, 8])
    size = truth[0].numel() - 16
    scales = -(-n // block_size) * scale_dtype.itemsize
    rows = torch.full(
        (num_rows, size + 24), CANARY, dtype=torch.uint8
    )  # rows further apart than they are long
    rows[:, :size] = truth[0][8 : 8 + size]
    rows[1:, scales:size] = torch.randint(256, (num_rows - 1, size - scales), generator=generator).byte()
    rows_there = rows.to(device)
    for aligned in alignments:
        out, expected = offset_copy(torch.zeros(n), aligned, device), torch.zeros(n)
        kernels.decode(rows_there[0, :size], out, form)
        reference.decode(rows[0, :size], expected, form)
        assert_same("decoded", one_nan(out), expected, case)
        kernels.decode_mean(rows_there[:, :size], out, form)
        reference.decode_mean(rows[:, :size], expected, form)
        assert_same(f"mean of {num_rows}", one_nan(out), expected, case)


# --- uniform -------------------------------------------------------------------------------------------


def forms():
    """Number of bits, whether the rounding is the usual one, block sizes.

    Each rounding, with and without a residual, and each of the usual block sizes is a kernel of its own, and
    takes two seconds to compile. Those that no codec uses unless it is told to are in the long tests.
    """
    for num_bits in BITS:
        others = [block_size for block_size in BLOCKS if block_size != 256]
        yield pytest.param(num_bits, True, [256], id=f"{num_bits}-256")
        marks = [] if num_bits in OFTEN else [pytest.mark.slow]
        yield pytest.param(num_bits, True, others, marks=marks, id=f"{num_bits}-others")
        yield pytest.param(num_bits, False, BLOCKS, marks=pytest.mark.slow, id=f"{num_bits}-unusual")


@pytest.mark.parametrize(("num_bits", "usual_rounding", "block_sizes"), list(forms()))
def test_uniform_equals_the_reference_byte_for_byte(num_bits, usual_rounding, block_sizes):
    """Every length with every block size; the other choices drawn, the same in every run."""
    draw = random.Random(num_bits)
    for n, block_size in itertools.product(LENGTHS, block_sizes):
        residual_kind = draw.choice(RESIDUALS)
        check_case(
            n,
            num_bits,
            block_size,
            draw.choice(SCALES),
            draw.choice(CONTENTS),
            residual_kind,
            (residual_kind == "none") is usual_rounding,
            draw,
        )


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("scale_dtype", SCALES, ids=str)
def test_awkward_values_equal_the_reference(content, scale_dtype):
    draw = random.Random(content)
    choices = itertools.product((3, 4, 8), RESIDUALS, (False, True))
    for num_bits, residual_kind, stochastic in choices:
        check_case(513, num_bits, 256, scale_dtype, content, residual_kind, stochastic, draw)


@pytest.mark.parametrize("n", [4095, 4096, 5000])
@pytest.mark.parametrize("residual_kind", RESIDUALS)
def test_long_segments_written_past_the_cache(n, residual_kind):
    draw = random.Random(n)
    for num_bits, content in ((8, "normal"), (4, "nan"), (4, "normal")):
        check_case(n, num_bits, 256, torch.bfloat16, content, residual_kind, False, draw)


def test_scales_of_every_size_equal_the_reference():
    """One value a block, over all exponents: the scale's rounding, its overflow and its zero."""
    exponents = torch.arange(-149, 128, dtype=torch.float64).repeat_interleave(3)
    mantissas = torch.tensor([1.0, 1.37, 1.9999999]).repeat(277).to(torch.float64)
    magnitudes = (torch.exp2(exponents) * mantissas).to(torch.float32)
    x = torch.zeros(magnitudes.numel(), 64)
    x[:, 3] = magnitudes
    x = x.reshape(-1)
    for num_bits, scale_dtype in itertools.product((2, 8), SCALES):
        form = UniformFormat(num_bits, 64, scale_dtype, stochastic=False)
        size = nbytes(x.numel(), num_bits, 64, scale_dtype)
        ours, truth = torch.zeros(2, size, dtype=torch.uint8)
        cpu.encode(x, ours, form, EncodeContext(key=0))
        reference.encode(x, truth, form, EncodeContext(key=0))
        assert_same("payload", ours, truth, (num_bits, scale_dtype))
        out = torch.empty(2, x.numel())
        cpu.decode(ours, out[0], form)
        reference.decode(truth, out[1], form)
        assert_same("decoded", out[0], out[1], (num_bits, scale_dtype))


@pytest.mark.parametrize("kernels", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("scale_dtype", SCALES, ids=str)
def test_a_finite_gradient_never_leaves_an_infinite_residual(kernels, scale_dtype):
    """Rounded up, the scale of the largest values times qmax would be Inf, and so would what is lost."""
    x = torch.full((64,), torch.finfo(torch.float32).max)
    residual, new_residual = torch.zeros(64), torch.empty(64)
    for num_bits in BITS:
        block_size = 64 if num_bits in OFTEN else 256
        form = UniformFormat(num_bits, block_size, scale_dtype, stochastic=False)
        payload = torch.empty(nbytes(64, num_bits, block_size, scale_dtype), dtype=torch.uint8)
        kernels.encode(x, payload, form, EncodeContext(key=0), residual, new_residual)
        assert new_residual.isfinite().all()


# --- exact ---------------------------------------------------------------------------------------------

EXACT = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
]


@pytest.mark.parametrize(("dtype", "wire_dtype"), EXACT, ids=str)
@pytest.mark.parametrize("content", ["normal", "nan", "inf", "denormal", "huge"])
def test_exact_equals_the_reference(dtype, wire_dtype, content):
    generator, form, context = torch.Generator().manual_seed(0), ExactFormat(wire_dtype), EncodeContext(key=0)
    for n, num_rows in itertools.product((0, 1, 7, 1023, 1024, 1025, 5000), (1, 2, 3, 4)):
        size = n * wire_dtype.itemsize
        rows = torch.full((num_rows, -(-size // 8) * 8 + 8), CANARY, dtype=torch.uint8)
        for row in rows:
            x = values(content, n, generator).to(dtype)
            truth = torch.empty(size, dtype=torch.uint8)
            cpu_exact.encode(x, row[:size], form, context)
            reference_exact.encode(x, truth, form, context)
            assert_same("payload", row[:size], truth, n)
        for aligned in (0, 1):
            out = torch.zeros(n + 1, dtype=dtype)[aligned : n + aligned]
            expected = torch.zeros(n, dtype=dtype)
            cpu_exact.decode(rows[0, :size], out, form)
            reference_exact.decode(rows[0, :size], expected, form)
            assert_same("decoded", out, expected, n)
            cpu_exact.decode_mean(rows[:, :size], out, form)
            reference_exact.decode_mean(rows[:, :size], expected, form)
            assert_same("mean", out, expected, (n, num_rows))


# --- dispatch ------------------------------------------------------------------------------------------


def test_numba_serves_cpu_tensors(monkeypatch):
    monkeypatch.delenv("GRADQ_KERNELS", raising=False)
    assert backend_name(torch.device("cpu")) == "numba"
    assert BACKENDS.on(torch.device("cpu")) is cpu


def test_the_environment_chooses_the_backend(monkeypatch):
    monkeypatch.setenv("GRADQ_KERNELS", "reference")
    assert BACKENDS.on(torch.device("cpu")) is reference
    monkeypatch.setenv("GRADQ_KERNELS", "fast")
    with pytest.raises(KernelError, match="'fast' is not a kernel backend"):
        BACKENDS.on(torch.device("cpu"))


def test_a_second_process_loads_the_kernels_from_the_cache():
    """Ranks start together; without the cache each would compile for seconds, every time."""
    warm_up = "from gradq import codecs; [codecs.from_spec(spec).warm_up() for spec in ('int8', 'fp32')]\n"
    exec(warm_up, {})
    code = (
        warm_up + "from gradq.codecs.uniform import cpu\nfrom gradq.codecs.exact.cpu import _exact_mean\n"
        "for f in (cpu._encoder(8, True, False, 256), cpu._decoder(8, 256), _exact_mean):\n"
        "    assert f.stats.cache_hits and not f.stats.cache_misses, f.stats\n"
        "    assert len(f.signatures) == 1, f.signatures\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


@pytest.mark.parametrize("spec", ["int8", "int4", "bf16", "rot4", "rot3(levels=trellis)"])
def test_memory_that_does_not_fit_is_refused(spec):
    check_refusals(spec, "cpu")


def check_refusals(spec: str, device: str) -> None:
    """Kernels work on addresses: a wrong tensor must be an error, not a read or write beyond its end."""
    codec = from_spec(spec)
    x, context = torch.randn(1000, device=device), EncodeContext(key=1)
    payload = torch.zeros(codec.nbytes(1000), dtype=torch.uint8, device=device)
    codec.encode(x, payload, context=context)
    wrong = (KernelError, RuntimeError)
    with pytest.raises(wrong):
        codec.encode(x, payload[:-1], context=context)
    with pytest.raises(wrong):
        codec.decode(payload[: len(payload) // 2], torch.empty(1000, device=device))
    with pytest.raises(wrong):
        codec.decode_mean(payload[None, :-1], torch.empty(1000, device=device))
    if spec != "bf16":  # casts go through torch, which takes any tensor
        with pytest.raises(KernelError, match="float64"):
            codec.encode(x.double(), payload, context=context)
        with pytest.raises(KernelError, match="contiguous"):
            codec.encode(torch.randn(2000, device=device)[::2], payload, context=context)
        with pytest.raises(KernelError, match="float64"):
            codec.decode(payload, torch.empty(1000, dtype=torch.float64, device=device))


def test_fused_products_are_rounded_once():
    """As the C library's fmaf does, also where a sum in fp64 falls on a tie of fp32, and beyond its range."""
    name = ctypes.util.find_library("m")
    if name is None:
        pytest.skip("no C library to compare with")
    fmaf = ctypes.CDLL(name).fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 20_000, generator=generator)
    c[::2] *= 2.0 ** -torch.randint(0, 60, (10_000,), generator=generator)
    tie = 1.0 + 2.0**-12  # its square ends in a half of the last bit of fp32
    cases = [(tie, tie, 2.0**-80), (tie, tie, -(2.0**-80)), (tie, tie, 0.0), (-tie, tie, 2.0**-80)]
    cases += [(3e38, 10.0, -3e38), (1e-30, 1e-12, 1e-45), (0.0, -1.0, 0.0), (math.inf, 1.0, 1.0)]
    a, b, c = (
        torch.cat((x, torch.tensor(y))) for x, y in zip((a, b, c), zip(*cases, strict=True), strict=True)
    )
    expected = torch.tensor(
        [fmaf(*values) for values in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    )
    assert torch.equal(bits(fused(a, b, c)), bits(expected))
    assert not torch.equal(fused(a, b, c), a * b + c)
    assert fused(torch.tensor(math.nan), 1.0, 1.0).isnan()
