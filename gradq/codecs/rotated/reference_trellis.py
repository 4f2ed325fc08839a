"""Trellis-coded levels in plain torch: codes that share bits with their neighbours.

Twice as many levels as codes, numbered from the lowest; level 4 i + j is number i of subset j. A code is
2 i + b, and its subset follows from its lowest bit b and those of the two rows before it in its column,
b' and b'' (0 before the first row)::

    j = b' + 2 (b xor b'')

So every row chooses from half of the levels, in steps twice as fine as its own bits could pay for. Encoding
looks for the path of least squared error (Viterbi). The state before a row is 2 b'' + b'; it starts as 0.

In a subset the candidate is the one nearest after `Polynomials.to_index`: with v = u + 2**num_bits,
i = trunc((v + 1.5 - j) / 4), at most 2**(num_bits - 1) - 1. Costs are added up in fp32; of two equal paths
the one with b'' = 0 is taken, of equal ends the lowest state.

References:
    Marcellin and Fischer, "Trellis coded quantization of memoryless and Gauss-Markov sources", IEEE Trans.
    Communications, 1990. Ungerboeck, "Channel coding with multilevel/phase signals", IEEE Trans. Information
    Theory, 1982 (the trellis).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradq.codecs.rotated.format import TRELLIS_POLYNOMIALS

__all__ = ["encode", "levels"]


def _index(y: Tensor, num_bits: int) -> Tensor:
    p = TRELLIS_POLYNOMIALS[num_bits]
    k0, k1, k2, k3 = p.to_index
    y = y.clamp(-p.top, p.top)
    y2 = y * y
    return y * (k0 + y2 * (k1 + y2 * (k2 + y2 * k3))) + (1 << num_bits)


def _candidate(v: Tensor, subset: Tensor | int, num_bits: int) -> Tensor:
    """The number i of the candidate within a subset, fp32."""
    most = (1 << (num_bits - 1)) - 0.5
    return ((v + (1.5 - subset)) * 0.25).clamp(max=most).to(torch.int32).to(torch.float32)


def _level(i: Tensor, subset: Tensor | int, num_bits: int) -> Tensor:
    a0, a1, a2, a3 = TRELLIS_POLYNOMIALS[num_bits].to_level
    m = i * 4.0 + (subset - ((1 << num_bits) - 0.5))
    m2 = m * m
    return m * (a0 + m2 * (a1 + m2 * (a2 + m2 * a3)))


def encode(y_TRC: Tensor, num_bits: int) -> Tensor:
    """Codes of normalized values, int32 [T, R, C]."""
    v_TRC = _index(y_TRC, num_bits)
    cost_4TC = torch.full((4, *y_TRC[:, 0].shape), 1e30)
    cost_4TC[0] = 0.0
    choices = []  # [R] of [4, T, C]: b'' on the best way into each state
    for v, y in zip(v_TRC.unbind(1), y_TRC.unbind(1), strict=True):
        distance = []
        for subset in range(4):
            error = y - _level(_candidate(v, subset, num_bits), subset, num_bits)
            distance.append(error * error)
        costs, choice = [], []
        for state in range(4):
            last, bit = state >> 1, state & 1
            from_0 = cost_4TC[last] + distance[last + 2 * bit]
            from_1 = cost_4TC[last + 2] + distance[last + 2 * (bit ^ 1)]
            choice.append(from_1 < from_0)
            costs.append(torch.where(choice[-1], from_1, from_0))
        cost_4TC = torch.stack(costs)
        choices.append(torch.stack(choice).to(torch.int64))
    state_TC = cost_4TC.argmin(0)
    codes = []
    for v, chosen in zip(reversed(v_TRC.unbind(1)), reversed(choices), strict=True):
        before_TC = chosen.gather(0, state_TC[None])[0]
        last_TC, bit_TC = state_TC >> 1, state_TC & 1
        i = _candidate(v, last_TC + 2 * (bit_TC ^ before_TC), num_bits)
        codes.append(2 * i.to(torch.int32) + bit_TC.to(torch.int32))
        state_TC = last_TC + 2 * before_TC
    return torch.stack(codes[::-1], 1)


def levels(codes_TRC: Tensor, num_bits: int) -> Tensor:
    """Levels of codes, fp32 [T, R, C]."""
    bits_TRC = codes_TRC & 1
    zeros = bits_TRC.new_zeros(bits_TRC.shape[0], 2, bits_TRC.shape[2])
    padded = torch.cat((zeros, bits_TRC), 1)
    subset_TRC = padded[:, 1:-1] + 2 * (bits_TRC ^ padded[:, :-2])
    return _level((codes_TRC >> 1).to(torch.float32), subset_TRC.to(torch.float32), num_bits)
