"""The Triton kernels without a GPU: in Triton's interpreter, and compiled to PTX, which is read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradq.codecs.uniform.format import BACKENDS, UniformFormat
from gradq.errors import KernelError
from gradq.kernels.loader import backend_name

pytest.importorskip("triton", reason="Triton is for Linux")
CASES = Path(__file__).parents[1] / "gpu" / "test_triton_kernels.py"
SCALARS = {"loss_scale": "fp32", "inverse_loss_scale": "fp32", "reciprocal": "fp32", "factor": "fp32"}
POINTERS = {"payload": "*u8", "payloads": "*u8"}
POINTERS |= dict.fromkeys(("x", "residual", "new_residual", "out"), "*fp32")


@pytest.mark.timeout(320)
def test_the_interpreter_equals_the_reference():
    """All of tests/gpu/test_triton_kernels.py; the interpreter must be chosen before triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment.pop("GRADQ_KERNELS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)]
    command += ["-W", "ignore::RuntimeWarning"]  # numpy's, for arithmetic with Inf and NaN
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 40


def ptx(kernel, capability: int, num_warps: int = 4, **constants: object) -> str:
    """What a kernel compiles to for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        name: "constexpr" if name in constants else POINTERS.get(name) or SCALARS.get(name, "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(compiled.asm["cubin"]) > 0
    return compiled.asm["ptx"]


def assert_rounds_as_ieee(text: str, *, num_fused: int = 0) -> None:
    """Fused products where written, no flush of denormals, no approximate division or root."""
    assert len(re.findall(r"\bfma\.rn\.f32", text)) == len(re.findall(r"\bfma\.", text)) == num_fused
    assert ".ftz" not in text
    assert not re.search(r"(div|sqrt|rcp)\.(approx|full)", text)


UNIFORM = {"N": 16, "M": 32, "BLOCK": 256, "BITS": 4, "KIND": 1, "ALIGNED": 4}
# fused products of a thread with 32 elements: of whole blocks and a shorter one, of the last row and others
SUMS = 2 * 2 * 32


def test_the_uniform_decoder_compiles_and_rounds_as_the_reference():
    from gradq.codecs.uniform.cuda_decode import decode_program

    text = ptx(decode_program, 80, **UNIFORM, EXACT_RECIPROCAL=False)
    assert_rounds_as_ieee(text, num_fused=SUMS)
    assert "div.rn.f32" in text
    assert "st.global.v4" in text, "results are not written 16 bytes at a time"


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_and_rounds_as_the_reference(capability):
    from gradq.codecs.exact import cuda
    from gradq.codecs.rotated import cuda_decode as rotated_decode
    from gradq.codecs.rotated import cuda_encode as rotated_encode
    from gradq.codecs.rotated.cuda_rotation import constants
    from gradq.codecs.uniform.cuda_decode import decode_program
    from gradq.codecs.uniform.cuda_encode import encode_program

    feedback = {"READ": True, "WRITE": True}
    for num_bits, kind, stochastic in ((2, 0, False), (7, 2, True), (8, 1, True)):
        form = UNIFORM | {"BITS": num_bits, "KIND": kind}
        text = ptx(encode_program, capability, **form, STOCHASTIC=stochastic, **feedback)
        assert_rounds_as_ieee(text)
        assert "ld.global.v4" in text
        text = ptx(decode_program, capability, **form, EXACT_RECIPROCAL=True)
        assert_rounds_as_ieee(text, num_fused=SUMS if kind else 0)
    level, total = 3 * 16, 4 * 3  # fused products of a thread with 16 elements
    for num_bits, unbiased, last in ((4, True, 0), (4, False, 1), (3, True, 2)):
        form = {"BITS": num_bits, "LEVELS": constants(num_bits), "ALIGNED": True, "LAST": last}
        index, tiles = num_bits * 16, 2 if last == 1 else 1  # the last coefficient of three bits is 0
        encode = feedback | {"UNBIASED": unbiased}
        text = ptx(rotated_encode.encode_program, capability, 8, **form, **encode)
        fused = tiles * (index + 2 * level + (3 if unbiased else 4) * total)
        assert_rounds_as_ieee(text, num_fused=fused + (index + 3 * level if last == 2 else 0))
        assert "sqrt.rn.f32" in text
        decode = {"EXACT_RECIPROCAL": unbiased, "SINGLE": not unbiased}
        text = ptx(rotated_decode.decode_program, capability, 8, **form, **decode)
        assert_rounds_as_ieee(text, num_fused=3 * level if last == 2 else level)
    POINTERS["payloads"] = "*fp32"
    assert_rounds_as_ieee(ptx(cuda._exact_mean, capability, ELEMENTS=1024, DOUBLE=False))
    POINTERS["payloads"] = "*u8"


# --- dispatch ------------------------------------------------------------------------------------------


def test_triton_serves_cuda_tensors(monkeypatch):
    monkeypatch.delenv("GRADQ_KERNELS", raising=False)
    assert backend_name(torch.device("cuda", 1)) == "triton"
    monkeypatch.setenv("GRADQ_KERNELS", "numba")
    with pytest.raises(KernelError, match=r"serves CPU tensors, and this one is on cuda:0; unset it"):
        backend_name(torch.device("cuda", 0))
    with pytest.raises(KernelError, match="no kernels for mps tensors"):
        backend_name(torch.device("mps"))


def test_on_the_cpu_triton_needs_its_interpreter(monkeypatch):
    monkeypatch.setenv("GRADQ_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelError, match="TRITON_INTERPRET=1"):
        BACKENDS.on(torch.device("cpu"))
    from gradq.codecs.uniform import cuda

    payload = torch.zeros(64, dtype=torch.uint8)
    with pytest.raises(KernelError, match="take CUDA tensors"):
        cuda.decode(payload, torch.zeros(8), UniformFormat(8, 64, torch.float32))


def test_a_missing_triton_names_its_install_command(monkeypatch):
    monkeypatch.delenv("GRADQ_KERNELS", raising=False)
    for name in [name for name in sys.modules if name.startswith("gradq.codecs.uniform.cuda")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(KernelError, match=r"pip install 'gradq\[gpu\]'"):
        BACKENDS.on(torch.device("cuda"))
