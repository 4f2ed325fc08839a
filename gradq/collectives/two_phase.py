"""Two phases: a compressed reduce-scatter, then a compressed all-gather.

Sends (W - 1) / W n of phase 1 and as much of phase 2, like a ring all-reduce. The errors of phase 1 are
averaged over ranks; that of phase 2 is not, so it deserves more bits.

Reference:
    The scheme of 1-bit Adam's compressed all-reduce (Tang et al., ICML 2021) and of ZeRO++'s qgZ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradq import wire
from gradq.collectives.base import Collective, Segment, Setting, Step
from gradq.collectives.runs import Place, Run, runs_of
from gradq.transport.contract import Pending

__all__ = ["TwoPhase"]


class _Piece:
    """One rank's part of one segment: where it stands in the bucket, the scratch and the messages."""

    def __init__(self, segment: Segment, world_size: int, owner: int) -> None:
        self.segment = segment
        self.start, self.stop = segment.piece(world_size, owner)
        self.numel = self.stop - self.start
        self.flat = slice(segment.start + self.start, segment.start + self.stop)
        self.nbytes1 = segment.phase1.nbytes(self.numel)
        self.nbytes2 = segment.phase2.nbytes(self.numel)
        self.at1 = self.at2 = 0  # offsets in the owner's messages

    @property
    def place(self) -> Place:
        """Where it stands, for `runs_of`."""
        return Place(self.segment, self.flat.start, self.numel, (self.at1, self.at2))


class TwoPhase(Collective):
    """Each rank averages the pieces it owns and hands them back to all."""

    num_channels = 2
    cuts_segments = True

    def __init__(self, segments: Sequence[Segment], dtype: torch.dtype, setting: Setting) -> None:
        super().__init__(segments, dtype, setting)
        rank, world_size = setting.rank, setting.world_size
        self._pieces: list[list[_Piece]] = []  # by owner
        nbytes1, nbytes2 = [], []
        for owner in range(world_size):
            pieces = [_Piece(segment, world_size, owner) for segment in self.segments]
            pieces = [piece for piece in pieces if piece.numel]
            offsets1, total1 = wire.message_offsets([piece.nbytes1 for piece in pieces])
            offsets2, total2 = wire.message_offsets([piece.nbytes2 for piece in pieces])
            for piece, at1, at2 in zip(pieces, offsets1, offsets2, strict=True):
                piece.at1, piece.at2 = at1, at2
            self._pieces.append(pieces)
            nbytes1.append(total1)
            nbytes2.append(total2)

        def buffer(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.uint8, device=setting.device)

        self._gathered_WN = buffer(world_size, nbytes1[rank])  # phase 1, what this rank receives
        self._scattered = [
            self._gathered_WN[rank] if owner == rank else buffer(nbytes1[owner])
            for owner in range(world_size)
        ]  # phase 1, what it sends
        self._means = [buffer(nbytes) for nbytes in nbytes2]  # phase 2, by owner
        self._runs: list[list[Run]] = []  # by owner: small exact pieces that travel as one
        self._alone: list[list[_Piece]] = []  # by owner: the others
        for pieces in self._pieces:
            runs, alone = runs_of([piece.place for piece in pieces], dtype, setting.device, world_size)
            starts = {place.start for place in alone}
            self._runs.append(runs)
            self._alone.append([piece for piece in pieces if piece.flat.start in starts])
        self._no_runs: list[list[Run]] = [[] for _ in range(world_size)]
        largest = max((piece.numel for piece in self._pieces[rank]), default=0)
        self._mean = torch.zeros(largest, dtype=dtype, device=setting.device)

    def average(self, flat: Tensor, step: Step) -> Iterator[Pending]:
        """See `Collective.average`.

        1. Encode every piece into the message for its owner; one's own stays here, encoded all the same.
        2. Exchange (phase 1).
        3. Of the pieces this rank owns: decode W payloads in rank order, sum in fp32, divide once, encode.
        4. Exchange (phase 2): the same message to every peer.
        5. Everyone, the owner too, decodes the same bytes into the bucket.
        """
        rank, world_size = self.setting.rank, self.setting.world_size
        # an error is sampled by parameter
        runs, alone = (self._no_runs, self._pieces) if step.sample else (self._runs, self._alone)
        with self.timed("encode_ms", step, 1):
            for owner, message in enumerate(self._scattered):
                for piece in alone[owner]:
                    payload = message[piece.at1 : piece.at1 + piece.nbytes1]
                    self.encode1(piece.segment, piece.start, piece.stop, flat[piece.flat], payload, step)
                for run in runs[owner]:
                    run.encode(flat, message)
        yield self.post(1, self._scattered, list(self._gathered_WN), step)
        own = self._means[rank]
        for piece in alone[rank]:
            mean = self._mean[: piece.numel]
            with self.timed("decode_ms", step, 1):
                payloads_WN = self._gathered_WN[:, piece.at1 : piece.at1 + piece.nbytes1]
                piece.segment.phase1.decode_mean(payloads_WN, mean)
            with self.timed("encode_ms", step, 2):
                payload = own[piece.at2 : piece.at2 + piece.nbytes2]
                self.encode2(piece.segment, piece.start, piece.stop, mean, payload, step)
        with self.timed("decode_ms", step, 1):
            for run in runs[rank]:
                run.average(self._gathered_WN, own)
        yield self.post(2, [own] * world_size, self._means, step)
        with self.timed("decode_ms", step, 2):
            for owner, message in enumerate(self._means):
                for piece in alone[owner]:
                    payload = message[piece.at2 : piece.at2 + piece.nbytes2]
                    piece.segment.phase2.decode(payload, flat[piece.flat])
                for run in runs[owner]:
                    run.decode(message, flat)
