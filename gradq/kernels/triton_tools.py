"""What the Triton kernels share: compilation, checks, the hash, planes of bits, numbers at odd addresses.

Rounding. The reference rounds after every operation, so kernels are compiled without contraction to fused
multiply-adds (`launch`), divide with `quotient` and take roots with `root`: Triton's `/` and `sqrt` are
approximations for fp32, and its `div_rn` and `sqrt_rn` flush denormals before Triton 3.6. Sums have an
order that is written out. Then fp32 arithmetic is IEEE on the GPU as on the CPU, denormals included, and
results are equal bit for bit. One thing is not: a NaN that a GPU computes has bits of its own. Those of
scales are written as integers and are equal on the wire; a decoded NaN is a NaN, whatever its bits.

On a CPU the kernels run in Triton's interpreter only, for tests: TRITON_INTERPRET=1 must be set before triton
is first imported. Run on an H100 with torch 2.11 and Triton 3.6: `pytest -m gpu tests/gpu`; what has changed
since and was not run there says so. `quotient` and `root` are such: then they were Triton's own; as
instructions they were compiled with Triton 3.4 to 3.9 and not run on a GPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradq.errors import KernelError

__all__ = [
    "aligned",
    "as_bits",
    "as_float",
    "check",
    "check_rows",
    "fused",
    "interpreted",
    "jit",
    "launch",
    "load_number",
    "mix32",
    "move",
    "quotient",
    "root",
    "signed32",
    "store_number",
]


def jit(function: Callable[..., Any], *, inline: bool = True) -> Any:
    """Compile with Triton on first use: one form a set of constants, whatever the values and addresses.

    Args:
        function: a kernel, or what a kernel calls.
        inline: False for a function whose code is to stand apart from its callers'.
    """
    parameters = inspect.signature(function).parameters.values()
    changing = [p.name for p in parameters if "constexpr" not in str(p.annotation)]
    return triton.jit(function, do_not_specialize=changing, noinline=not inline)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)


def launch(kernel: Any, programs: int, tensor: Tensor, *args: Any, num_warps: int = 4, **how: Any) -> None:
    """Enqueue a kernel on the current stream of a tensor's device; returns at once."""
    here: AbstractContextManager[object] = nullcontext()
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        here = torch.cuda.device(tensor.device)
    with here:
        kernel[(programs,)](*args, num_warps=num_warps, enable_fp_fusion=False, **how)


def check(tensor: Tensor, dtype: torch.dtype, numel: int, device: torch.device) -> Tensor:
    """A tensor that a kernel may read or write for numel elements.

    Raises:
        KernelError: it is too small, of another dtype, not contiguous or on another device; or on a CPU and
            not in Triton's interpreter.
    """
    if tensor.is_cpu and not interpreted():
        raise KernelError(
            "the Triton kernels take CUDA tensors; on CPU tensors they run only in Triton's interpreter: set "
            "TRITON_INTERPRET=1 before triton is imported, or unset GRADQ_KERNELS for the CPU's own kernels"
        )
    wrong_place = tensor.device != device
    if tensor.dtype is not dtype or tensor.numel() < numel or not tensor.is_contiguous() or wrong_place:
        raise KernelError(
            f"a kernel needs a contiguous tensor of {numel} elements in {dtype} on {device}, got "
            f"{tensor.dtype} of shape {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
        )
    return tensor


def aligned(*tensors: Tensor) -> bool:
    """Whether all start at multiples of 16 bytes, so that kernels may move 16 bytes at a time."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def check_rows(payloads: Tensor, nbytes: int, device: torch.device) -> tuple[int, int]:
    """W and the bytes from row to row, of W rows of contiguous bytes.

    Raises:
        KernelError: they are not; or as `check`.
    """
    if payloads.dim() != 2 or payloads.shape[0] < 1:
        raise KernelError(f"payloads must be [W, nbytes] with W >= 1, got shape {tuple(payloads.shape)}")
    check(payloads[0], torch.uint8, nbytes, device)
    return payloads.shape[0], payloads.stride(0)


def signed32(value: int) -> int:
    """The low 32 bits as a signed number: an argument's type must not depend on its value."""
    low = value & 0xFFFFFFFF
    return low - (1 << 32) if low >> 31 else low


@jit
def move(pointer: tl.tensor, offset: tl.tensor, MULTIPLE: tl.constexpr) -> tl.tensor:
    """The pointer moved by an offset to an address that is a multiple of so many bytes."""
    return tl.multiple_of(pointer + offset, MULTIPLE)


@jit
def as_bits(value: tl.tensor) -> tl.tensor:
    """The bits of fp32 numbers, uint32."""
    return value.to(tl.uint32, bitcast=True)


@jit
def as_float(bits: tl.tensor) -> tl.tensor:
    """The fp32 numbers with these bits."""
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


_INTERPRETED = tl.constexpr(interpreted())


@jit
def fused(a: tl.tensor, b: tl.tensor, c: tl.tensor) -> tl.tensor:
    """A b + c of fp32 numbers, rounded once. The interpreter's own rounds twice; through fp64 it is once."""
    if _INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    return tl.fma(a, b, c)


@jit
def quotient(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """A / b of fp32 numbers, rounded to the nearest, denormals included."""
    if _INTERPRETED:
        return tl.div_rn(a, b)
    return tl.inline_asm_elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1)


@jit
def root(a: tl.tensor) -> tl.tensor:
    """Square roots of fp32 numbers, rounded to the nearest, denormals included."""
    if _INTERPRETED:
        return tl.sqrt_rn(a)
    return tl.inline_asm_elementwise("sqrt.rn.f32 $0, $1;", "=f,f", [a], tl.float32, True, 1)


@jit
def mix32(h: tl.tensor) -> tl.tensor:
    """The mixing function of `gradq.rng` on uint32."""
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D).to(tl.uint32)
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B).to(tl.uint32)
    return h ^ (h >> 16)


@jit
def load_number(at: tl.tensor, mask: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """Little-endian unsigned integers of SIZE bytes at any address, uint32; a mask, or None."""
    value = tl.load(at, mask=mask).to(tl.uint32)
    for k in tl.static_range(1, SIZE):
        value = value | (tl.load(at + k, mask=mask).to(tl.uint32) << (8 * k))
    return value


@jit
def store_number(at: tl.tensor, value: tl.tensor, mask: tl.tensor, SIZE: tl.constexpr) -> None:
    """Unsigned integers to SIZE bytes each at any address."""
    for k in tl.static_range(SIZE):
        tl.store(at + k, ((value >> (8 * k)) & 0xFF).to(tl.uint8), mask=mask)
