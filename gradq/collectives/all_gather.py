"""All-gather of sharded parameters, encoded: every rank decodes all shards, its own too, from the same bytes.

The rows are those of `reduce_scatter`. The shards themselves are not touched, so the optimizer keeps exact
weights; what the model computes with is an unbiased rounding of them.

Reference:
    The quantized weight communication of ZeRO++ (Wang et al., 2023).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gradq import rng
from gradq.collectives.base import Step
from gradq.collectives.reduce_scatter import OfShards
from gradq.transport.contract import Pending

__all__ = ["AllGather"]

_MEASURED_AS = 3  # the phase of its times in `metrics.Event`: gradients have 1 and 2


class AllGather(OfShards):
    """Each rank sends its row, encoded once by the codec of phase 1."""

    def average(self, flat: Tensor, step: Step) -> Iterator[Pending]:
        """Fill every row of flat [W, n] with the decoded shards; this rank's row holds its own.

        1. Encode the own row.
        2. Send it to all peers; receive theirs.
        3. Decode all rows, the own one too.
        """
        rank, world_size = self.setting.rank, self.setting.world_size
        rows = flat.view(world_size, -1)
        sizes = [layout.nbytes1 for layout in self.layouts]
        messages = torch.split(self.scratch.take("weights", sum(sizes)), sizes)
        row = rows[rank] if flat.dtype == self.dtype else self._work(rows[rank]).copy_(rows[rank])
        with self.timed("encode_ms", step, _MEASURED_AS):
            for slot in self.layouts[rank].slots:
                name = slot.segment.name
                key = rng.dither_key(self.setting.seed, step.index, self.ids[name], rng.WEIGHT)
                context = rng.EncodeContext(key=key, first_block=slot.first_block)
                payload = messages[rank][slot.payload1]
                slot.segment.phase1.encode(row[slot.flat], payload, context=context)
        yield self.post(1, [messages[rank]] * world_size, messages, step)
        with self.timed("decode_ms", step, _MEASURED_AS):
            for layout, out, message in zip(self.layouts, rows, messages, strict=True):
                row = out if flat.dtype == self.dtype else self._work(out)
                for slot in layout.slots:
                    slot.segment.phase1.decode(message[slot.payload1], row[slot.flat])
                if row is not out:
                    out.copy_(row)

    def _work(self, row: Tensor) -> Tensor:
        """Memory for a row in the dtype that codecs work in."""
        return self.scratch.take("weights row", row.numel() * self.dtype.itemsize).view(self.dtype)
