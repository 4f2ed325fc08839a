"""The contract of a codec: local encode and decode of one segment; no communication in here.

A codec is a frozen dataclass: its fields are its whole configuration, it keeps no state, and `str(codec)` is
the spec that makes it again. Residuals are handed in and out by the caller.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from gradq import rng
from gradq.errors import ConfigError
from gradq.kernels.loader import Backends
from gradq.kernels.reference_tools import mean_of_rows
from gradq.kernels.turns import in_turns
from gradq.rng import EncodeContext

__all__ = ["Codec", "Format", "KernelCodec", "Kernels"]

_F = TypeVar("_F", contravariant=True)


class Codec(ABC):
    """Turns n elements into bytes and back."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The spec without options, such as "int4"."""

    @property
    @abstractmethod
    def block_size(self) -> int:
        """A parameter may be cut at multiples of this many elements."""

    @property
    @abstractmethod
    def unbiased(self) -> bool:
        """Whether E[decode(encode(x))] = x."""

    @property
    @abstractmethod
    def contractive(self) -> bool:
        """Whether ‖x - Q(x)‖² <= (1 - δ) ‖x‖² for some δ > 0 and every x: what error feedback needs."""

    @property
    def work_dtype(self) -> torch.dtype:
        """The dtype of x and out: fp32, or fp64 for the codec that carries fp64."""
        return torch.float32

    @property
    def wants_feedback(self) -> bool:
        """Whether feedback="auto" turns error feedback on for this codec."""
        return False

    @property
    def needs_feedback(self) -> bool:
        """Whether training does not converge without error feedback, so that leaving it out is an error."""
        return False

    @property
    def collective(self) -> str:
        """The collective for parameters in this codec, where none was asked for; "auto" for the model's."""
        return "auto"

    @property
    def element_bytes(self) -> int:
        """Bytes of an element if a payload is just the elements, each by itself, in order; else 0."""
        return 0

    def for_feedback(self, feedback: bool) -> Codec:
        """This codec with every "auto" option decided, for use with or without error feedback."""
        return self

    def default_phase2(self, world_size: int | None = None) -> Codec:
        """The codec for the means of world_size ranks (None: unknown) when a spec names only one.

        It needs more bits: the error of the means is not averaged down.
        """
        return self

    @abstractmethod
    def nbytes(self, numel: int) -> int:
        """Payload bytes of a segment of numel elements, scales included."""

    @abstractmethod
    def encode(
        self,
        x: Tensor,
        payload: Tensor,
        *,
        context: EncodeContext,
        residual: Tensor | None = None,
        new_residual: Tensor | None = None,
    ) -> None:
        """Encode x (+ residual).

        Args:
            x: [n] in `work_dtype`, contiguous.
            payload: uint8 [nbytes(n)], written.
            context: where in the run this encoding stands; see `EncodeContext`.
            residual: fp32 [n] or None.
            new_residual: fp32 [n], written with x + residual - decoded; given if and only if residual is.
        """

    @abstractmethod
    def decode(self, payload: Tensor, out: Tensor) -> None:
        """Decode payload, uint8 [nbytes(n)], into out [n]."""

    def decode_mean(self, payloads: Tensor, out: Tensor) -> None:
        """Decode payloads, uint8 [W, nbytes(n)], and write their mean to out [n]: summed in row order."""
        mean_of_rows(self.decode, payloads, out)

    def warm_up(
        self, device: torch.device | None = None, num_rows: int = 1, feedback: bool | None = None
    ) -> None:
        """Run every kernel once: they are compiled on first use, which must not happen in a training step.

        Args:
            device: device of the gradients; the CPU by default.
            num_rows: number of payloads that `decode_mean` will get.
            feedback: whether `encode` will get residuals; None for what the codec wants.

        Raises:
            KernelError: the codec has no kernels for the device.
        """
        in_turns(self.warm_up_calls(device, num_rows, feedback))

    def warm_up_calls(
        self, device: torch.device | None = None, num_rows: int = 1, feedback: bool | None = None
    ) -> list[Callable[[], None]]:
        """The parts of `warm_up`: for `gradq.kernels.turns.in_turns`, which shares them among ranks."""
        device = device or torch.device("cpu")
        wanted = self.wants_feedback if feedback is None else feedback
        on_cpu = device.type == "cpu"
        numel = 1 if on_cpu else self.block_size + 1  # Triton: one form a case, see below
        x = torch.zeros(numel + 4, dtype=self.work_dtype, device=device)
        payloads = torch.zeros(num_rows, self.nbytes(numel), dtype=torch.uint8, device=device)
        calls: list[Callable[[], None]] = []
        for start in (0,) if on_cpu else (0, 1):  # aligned or not
            part = x[start : start + numel]
            for with_residual in (wanted,) if on_cpu else (False, wanted):
                calls.append(
                    partial(self.for_feedback(with_residual)._run_once, part, payloads[0], with_residual)
                )
            calls.append(partial(self.decode, payloads[0], part))
            calls.append(partial(self.decode_mean, payloads, part))
        return calls

    def _run_once(self, x: Tensor, payload: Tensor, feedback: bool) -> None:
        residual = torch.zeros_like(x) if feedback else None
        self.encode(x, payload, context=EncodeContext(key=0), residual=residual, new_residual=residual)

    def wire_bits_per_element(self, numel: int) -> float:
        """Bits on the wire for each of numel elements, scales and padding included."""
        return 8 * self.nbytes(numel) / numel if numel else 0.0

    def roundtrip(self, x: Tensor, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> Tensor:
        """What the other ranks see of x.

        Args:
            x: any floating tensor.
            seed: seed of the dither.
            rank: this rank; it shifts the dither by rank / world_size.
            world_size: number of ranks.

        Returns:
            A tensor of x's shape and dtype.

        Raises:
            ConfigError: x is not floating.
        """
        if not x.is_floating_point():
            raise ConfigError(f"a codec takes floating tensors, got {x.dtype}")
        codec = self.for_feedback(False)
        flat = x.detach().reshape(-1).to(codec.work_dtype).contiguous()
        payload = torch.empty(codec.nbytes(flat.numel()), dtype=torch.uint8, device=flat.device)
        context = EncodeContext(key=rng.dither_key(seed, 0, 0, 1), shift=rng.dither_shift(rank, world_size))
        codec.encode(flat, payload, context=context)
        out = torch.empty_like(flat)
        codec.decode(payload, out)
        return out.to(x.dtype).reshape(x.shape)

    def __str__(self) -> str:
        """The spec that makes this codec: its name and the options that differ from its defaults."""
        assert dataclasses.is_dataclass(self)
        default = type(self).from_name(self.name)
        options = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(default, field.name)
        ]
        return f"{self.name}({','.join(options)})" if options else self.name

    @classmethod
    @abstractmethod
    def from_name(cls, name: str) -> Codec:
        """The codec with default options for one of its names."""


class Format(Protocol):
    """The parameters of one algorithm, a frozen dataclass: what its kernels must know beside the tensors."""

    def nbytes(self, numel: int) -> int:
        """Payload bytes of a segment of numel elements."""


class Kernels(Protocol[_F]):
    """The functions of a backend's module; tensors and meanings as in `Codec`, whose methods they serve."""

    def encode(
        self,
        x: Tensor,
        payload: Tensor,
        form: _F,
        context: EncodeContext,
        residual: Tensor | None = None,
        new_residual: Tensor | None = None,
    ) -> None:
        """Encode x + loss_scale * residual; what is lost, / loss_scale, goes to new_residual."""

    def decode(self, payload: Tensor, out: Tensor, form: _F) -> None:
        """Decode one payload."""

    def decode_mean(self, payloads: Tensor, out: Tensor, form: _F) -> None:
        """The mean over rows, added in row order, divided once."""


class KernelCodec(Codec):
    """A codec whose arithmetic is in kernels, with a backend for every kind of device."""

    backends: ClassVar[Backends[Kernels[Any]]]

    @property
    @abstractmethod
    def form(self) -> Format:
        """What the kernels must know; a `functools.cached_property`, for it is read in every call."""

    def nbytes(self, numel: int) -> int:
        """See `Codec.nbytes`; the format has the one definition."""
        return self.form.nbytes(numel)

    def encode(
        self,
        x: Tensor,
        payload: Tensor,
        *,
        context: EncodeContext,
        residual: Tensor | None = None,
        new_residual: Tensor | None = None,
    ) -> None:
        """See `Codec.encode`."""
        self.backends.on(x.device).encode(x, payload, self.form, context, residual, new_residual)

    def decode(self, payload: Tensor, out: Tensor) -> None:
        """See `Codec.decode`."""
        self.backends.on(out.device).decode(payload, out, self.form)

    def decode_mean(self, payloads: Tensor, out: Tensor) -> None:
        """See `Codec.decode_mean`."""
        self.backends.on(out.device).decode_mean(payloads, out, self.form)
