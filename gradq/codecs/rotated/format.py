"""Rotated: the parameters and sizes that its kernels share: the tile, the polynomials, the base of the signs.

A tile is 4096 consecutive elements seen as 256 rows of 16 columns. Each column is rotated by itself, so the
transform runs down the rows with whole rows as vectors, and each column of a full tile has its own scale.

Levels are those of Lloyd and Max for a standard normal, as two odd polynomials: `to_index` takes a value y to
u(y), which crosses the integer j at the j-th threshold, and `to_level` takes m = code - (2**num_bits - 1) / 2
to a level. Both are fits; `tests/unit/kernels/test_rotated.py` holds their error to that of Lloyd and Max.
Polynomials need no table look-ups, which vectors do badly.
The trellis has levels of its own, twice as many as codes, trained on normal numbers through it.

References:
    Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory, 1960. Lloyd, "Least squares quantization
    in PCM", IEEE Trans. Inf. Theory, 1982.
"""

from __future__ import annotations

from dataclasses import dataclass

from gradq.codecs.base import Kernels
from gradq.kernels.loader import Backends
from gradq.rng import EncodeContext

__all__ = [
    "BACKENDS",
    "COLUMNS",
    "GROUP",
    "HEADER_BYTES",
    "POLYNOMIALS",
    "TILE",
    "TILE_ROWS",
    "TRELLIS_POLYNOMIALS",
    "Polynomials",
    "RotatedFormat",
    "mix32",
    "rotation_base",
]

COLUMNS = 16
TILE_ROWS = 256
TILE = COLUMNS * TILE_ROWS
GROUP = 256  # elements to a scale
HEADER_BYTES = 4
_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Polynomials:
    """Levels of one width.

    Attributes:
        top: values are clamped to [-top, top] before `to_index`.
        to_index: k of u(y) = y (k0 + k1 y² + k2 y⁴ + k3 y⁶).
        to_level: a of c(m) = m (a0 + a1 m² + a2 m⁴ + a3 m⁶).
    """

    top: float
    to_index: tuple[float, float, float, float]
    to_level: tuple[float, float, float, float]


POLYNOMIALS = {
    1: Polynomials(0.5, (1, 0.0, 0.0, 0.0), (1.595769, 0.0, 0.0, 0.0)),
    2: Polynomials(1.24601, (1.018746, 0.0, 0.0, 0.0), (0.8928869, 0.0506925, 0.0, 0.0)),
    3: Polynomials(
        1.94994,
        (2.026386, -0.1152058, 0.004490254, 0.0),
        (0.4885413, 0.006562219, 9.987146e-05, 1.682357e-05),
    ),
    4: Polynomials(
        2.5667,
        (3.886966, -0.2173362, 0.01025592, -0.0003097004),
        (0.2552979, 0.001265389, -1.342369e-05, 4.501237e-07),
    ),
    5: Polynomials(
        3.11833,
        (7.582858, -0.4186139, 0.01911436, -0.0004813073),
        (0.130268, 0.0002177494, -1.062712e-06, 6.228509e-09),
    ),
    6: Polynomials(
        3.61819,
        (14.95251, -0.8154289, 0.03538857, -0.0007692396),
        (0.06588328, 3.089607e-05, -4.344383e-08, 6.03274e-11),
    ),
}

TRELLIS_POLYNOMIALS = {
    1: Polynomials(1.15673, (1.267654, 0.0, 0.0, 0.0), (0.7554519, 0.01908964, 0.0, 0.0)),
    2: Polynomials(
        1.83814,
        (2.490713, -0.2004345, -0.004657903, 0.0),
        (0.3508035, 0.0493115, -0.009059682, 0.0005120602),
    ),
    3: Polynomials(
        2.53797,
        (4.301857, -0.2634958, -0.0005647602, 0.001312122),
        (0.2301707, 0.00119968, -2.126669e-05, 6.321801e-07),
    ),
    4: Polynomials(
        3.18759,
        (7.967802, -0.4829864, 0.02007212, -0.0002822064),
        (0.1235978, 0.000227497, -1.295911e-06, 7.329146e-09),
    ),
}


@dataclass(frozen=True)
class RotatedFormat:
    """Levels of Lloyd and Max after a rotation.

    Attributes:
        num_bits: bits of a code, 1 to 6.
        trellis: whether codes are chosen by a trellis, up to 4 bits.
        unbiased: whether the scale is unbiased over rotations, or that of least squares; decoding does not
            depend on it.
    """

    num_bits: int
    trellis: bool
    unbiased: bool = True

    @property
    def polynomials(self) -> Polynomials:
        """The levels."""
        return (TRELLIS_POLYNOMIALS if self.trellis else POLYNOMIALS)[self.num_bits]

    def codes_at(self, numel: int) -> int:
        """Where the codes start: after the base and a bf16 scale for every 256 elements."""
        return HEADER_BYTES + 2 * -(-numel // GROUP)

    def nbytes(self, numel: int) -> int:
        """The base, the scales, codes of whole rows."""
        if numel == 0:
            return 0
        return HEADER_BYTES + 2 * -(-numel // GROUP) + -(-numel // COLUMNS) * COLUMNS * self.num_bits // 8


BACKENDS: Backends[Kernels[RotatedFormat]] = Backends(
    "gradq.codecs.rotated", "the rotated codecs", ("reference", "numba", "triton")
)


def rotation_base(context: EncodeContext) -> int:
    """The 32-bit number that a segment's signs are made from: tile t uses base + t.

    The shift tells ranks apart: each rotates in its own way.
    """
    key = context.key
    mixed = mix32((key & _MASK32) ^ mix32(context.shift & _MASK32))
    return (mix32((mixed + (key >> 32)) & _MASK32) + context.first_block) & _MASK32


def mix32(h: int) -> int:
    """The mixing function of `gradq.rng` on one 32-bit integer."""
    h ^= h >> 16
    h = (h * 0x7FEB352D) & _MASK32
    h ^= h >> 15
    h = (h * 0x846CA68B) & _MASK32
    return h ^ (h >> 16)
