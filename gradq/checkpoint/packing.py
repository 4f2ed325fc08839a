"""Packing: many residuals as few flat tensors, because what DCP costs goes by tensors and not by bytes.

The residuals of one kind stand one after another, and are cut into *flats* of at most `FLAT_NUMEL` elements,
so that a reader never holds more than one flat of all ranks. A *piece* is the part of one residual in one
flat; a checkpoint has a digest of each.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FLAT_NUMEL", "Piece", "digest", "flats", "pack"]

FLAT_NUMEL = 1 << 22  # 16 MiB of fp32


@dataclass(frozen=True)
class Piece:
    """The part of one residual in one flat.

    Attributes:
        name: the name of the parameter.
        begin: the first element of the residual that is in this piece.
        start: the place in the flat where it begins.
        length: the number of its elements.
        number: its place among the pieces of its kind.
    """

    name: str
    begin: int
    start: int
    length: int
    number: int


def pack(numels: Mapping[str, int], most: int) -> list[list[Piece]]:
    """The pieces of each flat, for residuals of these sizes.

    Args:
        numels: the numbers of elements by parameter name, in the order in which they stand. Empty ones have
            no piece.
        most: the largest number of elements of a flat.
    """
    found: list[list[Piece]] = []
    filled, number = most, 0
    for name, numel in numels.items():
        begin = 0
        while begin < numel:
            if filled == most:
                found.append([])
                filled = 0
            length = min(numel - begin, most - filled)
            found[-1].append(Piece(name, begin, filled, length, number))
            begin, filled, number = begin + length, filled + length, number + 1
    return found


def flats(packed: Iterable[list[Piece]], values: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """The flats [n], fp32 on the CPU, one after another.

    Args:
        packed: the pieces of each flat, from `pack`.
        values: flat residuals by name. One that is missing or too short is filled up with zeros.
    """
    for pieces in packed:
        flat = torch.zeros(pieces[-1].start + pieces[-1].length)
        for piece in pieces:
            if piece.name in values:
                part = values[piece.name][piece.begin : piece.begin + piece.length]
                flat[piece.start : piece.start + part.numel()] = part
        yield flat


def digest(*tensors: Tensor) -> int:
    """CRC-32 of the bytes of tensors, one after another. It finds damage, not forgery."""
    crc = 0
    for tensor in tensors:
        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().view(-1)
            crc = zlib.crc32(flat.view(torch.uint8).numpy().data, crc)
    return crc
