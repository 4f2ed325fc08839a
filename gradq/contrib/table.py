"""Table: levels of any shape, for comparison: formats that are not uniform, and the classics.

At equal bits every one errs more on real gradients than `rot*` or `int*` (docs/codecs.md), so they are plain
torch on the CPU, without kernels.

Names: nf4; lloyd2 ... lloyd4 (Lloyd-Max, normal); exp3, exp4 (powers of two); power3, power4 (squares);
fp8_e4m3, fp8_e5m2; mxfp4, nvfp4 (the levels of fp4 with small blocks); ternary, sign, qsgd4, qsgd8.

mxfp4 and nvfp4 are like the formats of those names: mxfp4 rounds its e8m0 scale up where the standard clips,
nvfp4 has one byte (e6m2) for a scale where the standard has e4m3 and a second scale for the tensor.

References:
    Dettmers et al., "QLoRA", NeurIPS 2023 (nf4). Ramezani-Kebrya et al., "NUQSGD", JMLR 2021 (powers of two).
    Micikevicius et al., "FP8 formats for deep learning", 2022. Rouhani et al., "Microscaling data formats for
    deep learning", 2023. Wen et al., "TernGrad", NeurIPS 2017. Bernstein et al., "signSGD", ICML 2018, with
    the scale of Karimireddy et al., ICML 2019. Alistarh et al., "QSGD", NeurIPS 2017.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from gradq.codecs.base import Codec
from gradq.codecs.phase2 import phase2_bits
from gradq.codecs.rotated.format import POLYNOMIALS
from gradq.codecs.uniform.codec import UniformCodec
from gradq.contrib.levels import Table, decode, encode
from gradq.errors import ConfigError, KernelError
from gradq.kernels.loader import backend_name
from gradq.rng import EncodeContext

__all__ = ["TABLE_NAMES", "TableCodec"]


@dataclass(frozen=True)
class _Format:
    """One of the names; fields as in `Table`, and the rules of stochastic and of nearest rounding."""

    levels: tuple[float, ...]
    num_bits: int
    block_size: int = 256
    scale_format: str = "bf16"
    rules: tuple[str, str] = ("absmax", "mse")


def _mirrored(positive: list[float], zero: bool = True) -> tuple[float, ...]:
    return (*(-level for level in reversed(positive)), *([0.0] if zero else []), *positive)


def _normal_float() -> tuple[float, ...]:
    normal, far = NormalDist(), 0.9677083
    up = [normal.inv_cdf(0.5 + (far - 0.5) * k / 8) for k in range(1, 9)]
    down = [normal.inv_cdf(0.5 + (far - 0.5) * k / 7) for k in range(1, 8)]
    return tuple(float(np.float32(v / up[-1])) for v in (*(-v for v in reversed(down)), 0.0, *up))


def _lloyd_max(num_bits: int) -> tuple[float, ...]:
    coefficients = POLYNOMIALS[num_bits].to_level
    positive = [
        float(np.float32(sum(a * (k + 0.5) ** (2 * j + 1) for j, a in enumerate(coefficients))))
        for k in range(1 << (num_bits - 1))
    ]
    return _mirrored(positive, zero=False)


def _floats(mantissa_bits: int, last: int) -> tuple[float, ...]:
    """Floats without a bias, in units of the smallest: `last` is the greatest code, subnormals first."""
    steps = 1 << mantissa_bits
    exponents = [(max(code // steps - 1, 0), code) for code in range(1, last + 1)]
    return _mirrored([float((code - steps * e) << e) for e, code in exponents])


_FORMATS = {
    "nf4": _Format(_normal_float(), 4),
    **{f"lloyd{bits}": _Format(_lloyd_max(bits), bits) for bits in (2, 3, 4)},
    "exp3": _Format(_mirrored([2.0**-k for k in (2, 1, 0)]), 3),
    "exp4": _Format(_mirrored([2.0**-k for k in range(6, -1, -1)]), 4),
    "power3": _Format(_mirrored([float(k * k) for k in range(1, 4)]), 3),
    "power4": _Format(_mirrored([float(k * k) for k in range(1, 8)]), 4),
    "fp8_e4m3": _Format(_floats(3, 126), 8, rules=("absmax", "absmax")),
    "fp8_e5m2": _Format(_floats(2, 123), 8, rules=("absmax", "absmax")),
    "mxfp4": _Format(_floats(1, 7), 4, 32, "e8m0", ("absmax", "absmax")),
    "nvfp4": _Format(_floats(1, 7), 4, 16, "e6m2", ("absmax", "absmax")),
    "ternary": _Format((-1.0, 0.0, 1.0), 2),
    "sign": _Format((-1.0, 1.0), 1, rules=("", "l1")),
    "qsgd4": _Format(_mirrored([float(np.float32(k / 7)) for k in range(1, 8)]), 4, rules=("l2", "")),
    "qsgd8": _Format(_mirrored([float(np.float32(k / 127)) for k in range(1, 128)]), 8, rules=("l2", "")),
}
TABLE_NAMES = tuple(_FORMATS)
_ROUNDINGS = ("auto", "stochastic", "nearest")


@dataclass(frozen=True, kw_only=True)
class TableCodec(Codec):
    """Levels from a table.

    Attributes:
        format: name of the table; the docstring of the module lists them.
        rounding: "stochastic" (unbiased; scale from absmax, qsgd from the L2 norm), "nearest" (contractive;
            scale by least squares where the format permits, sign from the L1 norm), or "auto": nearest with
            error feedback, stochastic without. sign is always nearest, qsgd always stochastic.

    Example:
        >>> TableCodec(format="nf4").wire_bits_per_element(1 << 20)
        4.0625
    """

    format: str = "nf4"
    rounding: str = "auto"

    def __post_init__(self) -> None:
        if self.format not in _FORMATS:
            raise ConfigError(f"TableCodec(format={self.format!r}): choose one of {', '.join(_FORMATS)}")
        if self.rounding not in _ROUNDINGS:
            raise ConfigError(f"TableCodec(rounding={self.rounding!r}): rounding must be one of {_ROUNDINGS}")
        for rounding, rule in zip(_ROUNDINGS[1:], _FORMATS[self.format].rules, strict=True):
            if self.rounding == rounding and not rule:
                raise ConfigError(f"TableCodec(rounding={rounding!r}): {self.format} does not round so")

    @property
    def name(self) -> str:
        """The format."""
        return self.format

    @property
    def block_size(self) -> int:
        """Elements that share a scale: 256; mxfp4 32, nvfp4 16."""
        return _FORMATS[self.format].block_size

    @property
    def _stochastic(self) -> bool:
        """Stochastic unless it was decided otherwise, or the format cannot."""
        return self.rounding != "nearest" and bool(_FORMATS[self.format].rules[0])

    @property
    def unbiased(self) -> bool:
        """Stochastic rounding is; nearest is not."""
        return self._stochastic

    @property
    def contractive(self) -> bool:
        """Nearest always is: its scale is that of least squares, or zero is a level. Stochastic is not."""
        return not self._stochastic

    @property
    def wants_feedback(self) -> bool:
        """At 4 bits and below, qsgd excepted: it cannot round to the nearest."""
        return _FORMATS[self.format].num_bits <= 4 and bool(_FORMATS[self.format].rules[1])

    def for_feedback(self, feedback: bool) -> TableCodec:
        """Decide rounding="auto"."""
        if self.rounding != "auto":
            return self
        stochastic, nearest = _FORMATS[self.format].rules
        decided = "nearest" if (feedback and nearest) or not stochastic else "stochastic"
        return replace(self, rounding=decided)

    def default_phase2(self, world_size: int | None = None) -> Codec:
        """Uniform with 6 or 8 bits, but for the formats that have 8. See `gradq.codecs.phase2`."""
        num_bits = _FORMATS[self.format].num_bits
        return self if num_bits == 8 else UniformCodec(num_bits=phase2_bits(num_bits + 1, world_size))

    def nbytes(self, numel: int) -> int:
        """Scales, then codes; the last block is padded to a multiple of 8 elements."""
        return self._table(torch.device("cpu")).nbytes(numel)

    def encode(
        self,
        x: Tensor,
        payload: Tensor,
        *,
        context: EncodeContext,
        residual: Tensor | None = None,
        new_residual: Tensor | None = None,
    ) -> None:
        """See `Codec.encode`. rounding="auto" that was not decided is stochastic, where the format can."""
        encode(x, payload, self._table(x.device), context, residual, new_residual)

    def decode(self, payload: Tensor, out: Tensor) -> None:
        """See `Codec.decode`."""
        decode(payload, out, self._table(out.device))

    def _table(self, device: torch.device) -> Table:
        """The levels and how a block is scaled to them.

        Raises:
            KernelError: the tensors are on another device than the CPU.
        """
        if backend_name(device) == "triton":
            raise KernelError(
                f"the codec {self.name!r} is a baseline for comparison and takes CPU tensors only; choose "
                "one of int2 to int8 or rot3 to rot6"
            )
        return _table(self.format, self._stochastic)

    @classmethod
    def from_name(cls, name: str) -> TableCodec:
        """The codec for a format."""
        return cls(format=name)


@cache
def _table(name: str, stochastic: bool) -> Table:
    chosen = _FORMATS[name]
    rule = chosen.rules[0 if stochastic else 1]
    return Table(chosen.levels, chosen.num_bits, chosen.block_size, chosen.scale_format, rule, stochastic)
