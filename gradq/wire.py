"""Where each byte of a payload stands: headers, offsets, shards. Computes sizes, moves nothing.

One message goes from one rank to another in one phase of one chunk of a bucket::

    header                  16 bytes: magic, version, phase, sender, bucket, step, layout digest
    payload of segment 0    starts at a multiple of 8
    payload of segment 1    ...

A segment is one parameter of the chunk, or some of one; a shard is what one rank owns of it. Every parameter
is cut by itself, at multiples of its block size, so ownership, residuals and random bits do not depend on
DDP's buckets.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from gradq.errors import WireError

__all__ = [
    "ALIGNMENT",
    "HEADER_BYTES",
    "VERSION",
    "Header",
    "align",
    "layout_digest",
    "message_offsets",
    "ring_bytes",
    "shard",
]

VERSION = 1
HEADER_BYTES = 16
ALIGNMENT = 8
_MAGIC = b"gq"
_FORMAT = struct.Struct("<2sBBHHII")


@dataclass(frozen=True)
class Header:
    """What a message says of itself; equal on both ends or the message is refused.

    Attributes:
        phase: 1 for gradients, 2 for means.
        sender: rank of the sender in the group.
        bucket: index of the bucket (modulo 2**16).
        step: optimizer step (modulo 2**32).
        layout: digest of the parameters, their codecs and sizes in this chunk.
    """

    phase: int
    sender: int
    bucket: int
    step: int
    layout: int

    def pack(self) -> bytes:
        """The 16 bytes that start the message."""
        return _FORMAT.pack(_MAGIC, VERSION, *self._fields())

    def _fields(self) -> tuple[int, ...]:
        return self.phase, self.sender & 0xFFFF, self.bucket & 0xFFFF, self.step & 0xFFFFFFFF, self.layout

    def check(self, received: bytes) -> None:
        """Compare what arrived with what must arrive.

        Raises:
            WireError: naming the sender and the first field that differs.
        """
        if received == self.pack():
            return
        where = f"message from rank {self.sender}, bucket {self.bucket}, phase {self.phase}, step {self.step}"
        if len(received) < HEADER_BYTES:
            raise WireError(f"{where}: {len(received)} bytes are too few for a header")
        magic, version, *fields = _FORMAT.unpack(received)
        if magic != _MAGIC:
            raise WireError(f"{where}: not a gradq message (it starts with {received[:4].hex()})")
        if version != VERSION:
            raise WireError(f"{where}: wire format {version}, this gradq speaks {VERSION}; use one version")
        names = ("phase", "sender", "bucket", "step", "layout digest")
        for name, got, want in zip(names, fields, self._fields(), strict=True):
            if got != want:
                raise WireError(f"{where}: its {name} is {got}, expected {want}; the ranks are out of step")


def layout_digest(description: str) -> int:
    """A 32-bit digest of a chunk's layout."""
    return zlib.crc32(description.encode())


def align(nbytes: int) -> int:
    """The next multiple of 8."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def message_offsets(payload_bytes: Sequence[int]) -> tuple[list[int], int]:
    """Where each payload of a message starts, and the size of the message in bytes."""
    offsets, position = [], HEADER_BYTES
    for nbytes in payload_bytes:
        offsets.append(position)
        position += align(nbytes)
    return offsets, position


def shard(numel: int, block_size: int, world_size: int, owner: int, rotation: int) -> tuple[int, int]:
    """The elements [start, stop) of a parameter that a rank owns.

    Args:
        numel: elements of the parameter.
        block_size: shards start at multiples of it.
        world_size: number of ranks.
        owner: the rank.
        rotation: shifts which rank gets which shard, so that small parameters spread over the ranks.
    """
    num_blocks = -(-numel // block_size)
    position = (owner + rotation) % world_size
    start = position * num_blocks // world_size * block_size
    stop = (position + 1) * num_blocks // world_size * block_size
    return start, min(stop, numel)


def ring_bytes(nbytes: int, world_size: int) -> int:
    """Bytes one rank sends in a ring all-reduce of nbytes: 2 (W - 1) / W of them."""
    return 2 * (world_size - 1) * nbytes // world_size
