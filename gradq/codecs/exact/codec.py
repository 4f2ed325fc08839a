"""Exact: the numbers themselves, in a float dtype of choice. "Exact" up to that dtype's rounding.

Carries small and one-dimensional parameters in the same payload as the quantized ones, and is the whole
codec of the specs "fp32", "bf16" and "fp16".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradq.codecs.base import KernelCodec, Kernels
from gradq.codecs.exact.format import BACKENDS, ExactFormat
from gradq.errors import ConfigError
from gradq.kernels.loader import Backends
from gradq.rng import EncodeContext

__all__ = ["ExactCodec"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class ExactCodec(KernelCodec):
    """Cast to a dtype, round to nearest even.

    Attributes:
        dtype: "fp32", "bf16", "fp16" or "fp64". fp16 overflows above 65504 to Inf, as a cast does.
    """

    backends: ClassVar[Backends[Kernels[Any]]] = BACKENDS

    dtype: str = "fp32"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ConfigError(f"ExactCodec(dtype={self.dtype!r}): dtype must be one of {', '.join(_DTYPES)}")

    @property
    def name(self) -> str:
        """The dtype's short name."""
        return self.dtype

    @property
    def block_size(self) -> int:
        """256 elements: only a grain for cutting parameters, nothing is shared inside a block."""
        return 256

    @property
    def unbiased(self) -> bool:
        """Whether the wire holds fp32 or more; rounding to nearest is biased by less than half an ulp."""
        return self.dtype in ("fp32", "fp64")

    @property
    def contractive(self) -> bool:
        """True: rounding to nearest loses at most 2**-8 of each element (fp16: inside its range)."""
        return True

    @property
    def work_dtype(self) -> torch.dtype:
        """fp64 for fp64, else fp32."""
        return torch.float64 if self.dtype == "fp64" else torch.float32

    @property
    def wire_dtype(self) -> torch.dtype:
        """The dtype on the wire."""
        return _DTYPES[self.dtype]

    @property
    def element_bytes(self) -> int:
        """The size of the dtype on the wire."""
        return self.wire_dtype.itemsize

    @cached_property
    def form(self) -> ExactFormat:
        """See `KernelCodec.form`."""
        return ExactFormat(self.wire_dtype)

    def encode(
        self,
        x: Tensor,
        payload: Tensor,
        *,
        context: EncodeContext,
        residual: Tensor | None = None,
        new_residual: Tensor | None = None,
    ) -> None:
        """See `Codec.encode`; there is no residual.

        Raises:
            ConfigError: a residual was given.
        """
        if residual is not None or new_residual is not None:
            raise ConfigError(
                f"codec {self.name!r} has no error feedback; it loses nothing worth feeding back"
            )
        super().encode(x, payload, context=context)

    @classmethod
    def from_name(cls, name: str) -> ExactCodec:
        """The codec for "fp32", "bf16", "fp16" or "fp64"."""
        return cls(dtype=name)
