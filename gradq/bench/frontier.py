"""The frontier of the codecs: error against bits on the wire, error of the mean over ranks, speed.

NMSE is ‖x - Q(x)‖² / ‖x‖². The error of the mean of W ranks is ‖mean Q(x_r) - mean x_r‖² / ‖mean x_r‖²: one
phase, no feedback, averaged over seeds. The floor 2**(-2 bits) is the least NMSE of any code for normal
numbers (Shannon); gradients that are no noise may lie below it. Bits are counted as they are sent, scales and
padding included.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gradq import codecs, rng
from gradq.bench.gradients import Gradients
from gradq.bench.interleaved import Call, fastest_copy, interleave, least
from gradq.codecs import Codec
from gradq.errors import ConfigError

__all__ = [
    "WORLD_SIZES",
    "Row",
    "Speed",
    "choose",
    "default_codecs",
    "error_of_mean",
    "floor",
    "measure_errors",
    "measure_speeds",
    "nmse",
    "split_specs",
    "write_csv",
]

WORLD_SIZES = (2, 8, 64)
NUM_SEEDS = 3


@dataclass(frozen=True, kw_only=True)
class Speed:
    """As a fraction of memcpy of the same buffer, at each one's best round.

    Attributes:
        encode: the time to encode, with error feedback where the codec wants it.
        decode: the time to decode one payload.
    """

    encode: float
    decode: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One codec.

    Attributes:
        codec: spec of the codec.
        bits: the bits on the wire for an element.
        errors: the NMSE by input.
        means: the error of the mean by number of ranks.
        speed: the speed of the kernels, None if not measured.
    """

    codec: str
    bits: float
    errors: dict[str, float]
    means: dict[int, float] = field(default_factory=dict)
    speed: Speed | None = None

    def cells(self) -> dict[str, str | float]:
        """The row by column, as in the CSV."""
        cells: dict[str, str | float] = {"codec": self.codec, "bits": self.bits, "floor": floor(self.bits)}
        cells |= self.errors
        cells |= {f"mean_of_{ranks}": error for ranks, error in self.means.items()}
        if self.speed is not None:
            cells |= {"encode": self.speed.encode, "decode": self.speed.decode}
        return cells


def floor(bits: float) -> float:
    """The least NMSE of any code of so many bits an element for normal numbers."""
    return float(2.0 ** (-2 * bits))


# --- which codecs --------------------------------------------------------------------------------------


def split_specs(text: str) -> list[str]:
    """Specs separated by commas or semicolons; those in parentheses belong to a spec's options.

    Example:
        >>> split_specs("rot4, int4(block_size=64,rounding=nearest)")
        ['rot4', 'int4(block_size=64,rounding=nearest)']
    """
    specs, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter in ",;" and depth == 0:
            specs.append(text[start:at])
            start = at + 1
    specs.append(text[start:])
    return [spec.strip() for spec in specs if spec.strip()]


def default_codecs() -> list[Codec]:
    """Every codec without error feedback and, where that differs, with it; of the exact ones bf16."""
    chosen: list[Codec] = []
    for name in codecs.names():
        codec = codecs.from_spec(name)
        if isinstance(codec, codecs.ExactCodec) and name != "bf16":
            continue
        for feedback in (False, True):
            decided = codec.for_feedback(feedback)
            if decided not in chosen:
                chosen.append(decided)
    return chosen


def choose(text: str) -> list[Codec]:
    """The codecs of `split_specs`, or all codecs if the text is empty.

    Raises:
        SpecError: a part of the text is not a spec.
    """
    return [codecs.from_spec(spec) for spec in split_specs(text)] or default_codecs()


# --- errors --------------------------------------------------------------------------------------------


def nmse(codec: Codec, tensors: Sequence[Tensor]) -> float:
    """‖x - Q(x)‖² / ‖x‖² over tensors, each encoded by itself.

    Raises:
        ConfigError: all of them are zeros.
    """
    error = sum(float((codec.roundtrip(x) - x).double().square().sum()) for x in tensors)
    energy = sum(float(x.double().square().sum()) for x in tensors)
    if energy == 0:
        raise ConfigError("the error of zeros is not defined; give gradients that are not all zero")
    return error / energy


def error_of_mean(codec: Codec, ranks: Gradients, *, num_seeds: int = NUM_SEEDS) -> float:
    """‖mean Q(x_r) - mean x_r‖² / ‖mean x_r‖² of all ranks given; see the module."""
    codec = codec.for_feedback(False)
    world_size, error, energy = len(ranks), 0.0, 0.0
    for seed in range(num_seeds):
        for index, name in enumerate(ranks[0]):
            tensors = [rank[name].to(codec.work_dtype) for rank in ranks]
            numel = tensors[0].numel()
            payloads = torch.empty(world_size, codec.nbytes(numel), dtype=torch.uint8)
            key = rng.dither_key(seed, 0, index, 1)
            for rank, x in enumerate(tensors):
                context = rng.EncodeContext(key=key, shift=rng.dither_shift(rank, world_size))
                codec.encode(x, payloads[rank], context=context)
            mean, out = torch.stack(tensors).mean(0), torch.empty_like(tensors[0])
            codec.decode_mean(payloads, out)
            error += float((out - mean).double().square().sum())
            energy += float(mean.double().square().sum())
    return error / energy


def measure_errors(
    codec: Codec, inputs: Mapping[str, Sequence[Tensor]], ranks: Gradients, *, num_seeds: int = NUM_SEEDS
) -> Row:
    """One row, without its speed.

    Args:
        codec: the codec to measure.
        inputs: the tensors by column; bits are those of the first column's largest tensor.
        ranks: tensors of several ranks, for the error of the mean over as many as `WORLD_SIZES` says.
        num_seeds: number of seeds to average the error over.
    """
    largest = max(x.numel() for x in next(iter(inputs.values())))
    return Row(
        codec=str(codec),
        bits=codec.wire_bits_per_element(largest),
        errors={name: nmse(codec, tensors) for name, tensors in inputs.items()},
        means={
            size: error_of_mean(codec, ranks[:size], num_seeds=num_seeds)
            for size in WORLD_SIZES
            if size <= len(ranks)
        },
    )


# --- speed ---------------------------------------------------------------------------------------------


def measure_speeds(chosen: Sequence[Codec], *, numel: int, rounds: int) -> dict[str, Speed]:
    """All codecs and memcpy in the same rounds, one thread.

    Args:
        chosen: the codecs to measure.
        numel: the number of elements of the buffer, which holds normal numbers.
        rounds: the number of samples of each.

    Returns:
        Speeds by spec.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        generator = torch.Generator().manual_seed(0)
        x, out = torch.randn(numel, generator=generator), torch.zeros(numel)
        calls: dict[str, Call] = {"memcpy": fastest_copy(x, out)[1]}
        old, new = torch.zeros(numel), torch.zeros(numel)
        for codec in chosen:
            calls |= _calls(codec, x, out, old, new)
        seconds = interleave(calls, rounds=rounds)
    finally:
        torch.set_num_threads(threads)
    return {
        str(codec): Speed(
            encode=least(seconds, f"encode {codec}", "memcpy"),
            decode=least(seconds, f"decode {codec}", "memcpy"),
        )
        for codec in chosen
    }


def _calls(codec: Codec, x: Tensor, out: Tensor, old: Tensor, new: Tensor) -> dict[str, Call]:
    payload = torch.zeros(codec.nbytes(x.numel()), dtype=torch.uint8)
    context = rng.EncodeContext(key=rng.dither_key(0, 0, 0, 1))
    residuals = {"residual": old, "new_residual": new} if codec.wants_feedback else {}
    if codec.work_dtype != torch.float32:
        x, out = x.to(codec.work_dtype), out.to(codec.work_dtype)

    def encode() -> None:
        codec.encode(x, payload, context=context, **residuals)

    def decode() -> None:
        codec.decode(payload, out)

    return {f"encode {codec}": encode, f"decode {codec}": decode}


# --- records -------------------------------------------------------------------------------------------


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line a codec; floats in full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0].cells()), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.cells() for row in rows)
