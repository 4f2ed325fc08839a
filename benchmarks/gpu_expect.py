"""What to expect of a GPU before one is at hand: bytes and instructions of the kernels, and where codecs pay.

Two tables, from arithmetic alone. The first: the bytes a kernel has to move for every element, and how long
they take at the device's bandwidth. The second: a step of N parameters on W GPUs over links of some rates,
from `gradq.policy.cost`, with kernels at a share of that bandwidth; and the rate below which a codec beats
bf16. Nothing overlaps in that model, and NVLink's rate is that of a ring over all links.

    python benchmarks/gpu_expect.py --copy-gb-per-s 2713 --parameters 1.2e9 --ranks 8 --compute-ms 1400
"""

from __future__ import annotations

import argparse

from gradq import wire
from gradq.codecs import Codec, from_spec
from gradq.policy.cost import expected_step_ms

CODECS = ("int8", "int4", "int3", "int2", "rot4", "rot3", "rot2(levels=scalar)", "rot1(levels=scalar)")
LINKS = (
    ("NVLink 4", 3600.0), ("PCIe 5 x16", 400.0), ("PCIe 4 x16", 200.0), ("100 GbE", 100.0),
    ("25 GbE", 25.0), ("10 GbE", 10.0), ("1 GbE", 1.0),
)  # fmt: skip
# of the copy's bandwidth: what uniform kernels are held to, and what the last record has of rotated ones
UNIFORM_SHARE, ROTATED_SHARE = 0.75, 0.3


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--copy-gb-per-s", type=float, default=2713.0, help="read plus written (H100: 2713)")
    parser.add_argument("--parameters", type=float, default=1.2e9, help="of the model (default: 1.2e9)")
    parser.add_argument("--ranks", type=int, default=8, help="GPUs (default: 8)")
    parser.add_argument("--compute-ms", type=float, default=1400.0, help="of a step, on one GPU")
    return parser.parse_args()


def moved_bytes(codec: Codec, operation: str, num_rows: int = 1) -> float:
    """Bytes that an operation has to read and write, for every element."""
    n = 1 << 20
    payload = codec.nbytes(n) / n
    return {"encode": 4 + payload, "with feedback": 12 + payload, "mean": 4 + num_rows * payload}[operation]


def roofline(gb_per_s: float) -> None:
    """Bytes an element, and picoseconds an element at the copy's bandwidth."""
    columns = [("encode", 1), ("with feedback", 1), *(("mean", rows) for rows in (1, 2, 4, 8))]
    heads = [f"{op} of {rows}" if op == "mean" else op for op, rows in columns]
    print(f"Bytes moved an element, and ps an element at {gb_per_s:g} GB/s\n")
    print(f"{'':20s}" + "".join(f"{head:>18s}" for head in heads))
    for spec in CODECS:
        cells = [moved_bytes(from_spec(spec), *column) for column in columns]
        print(f"{spec:20s}" + "".join(f"{b:10.2f} {1e3 * b / gb_per_s:7.2f}" for b in cells))


def wire_and_codec(spec: str, numel: int, ranks: int, gb_per_s: float) -> tuple[float, float]:
    """Bytes that a rank sends in a step, and milliseconds of its kernels."""
    if spec in ("fp32", "bf16"):
        size = {"fp32": 4, "bf16": 2}[spec] * numel
        cast = 0.0 if spec == "fp32" else 12.0 * numel  # there and back
        return float(wire.ring_bytes(size, ranks)), cast / (gb_per_s * 1e6)
    codec, shard = from_spec(spec), numel / ranks
    sent = 2 * (ranks - 1) * codec.nbytes(int(shard))  # a shard to each peer, then its mean to each peer
    work = moved_bytes(codec, "encode") * numel + moved_bytes(codec, "mean", ranks) * shard
    work += moved_bytes(codec, "encode") * shard + moved_bytes(codec, "mean") * numel
    share = ROTATED_SHARE if spec.startswith("rot") else UNIFORM_SHARE
    return float(sent), work / (share * gb_per_s * 1e6)


def steps(arguments: argparse.Namespace) -> None:
    """Milliseconds of a step by link, and below which rate a codec is faster than bf16."""
    numel, specs = int(arguments.parameters), ("fp32", "bf16", "int8", "int4", "int2", "rot4")
    parts = {s: wire_and_codec(s, numel, arguments.ranks, arguments.copy_gb_per_s) for s in specs}
    print(
        f"\nMilliseconds of a step: {numel / 1e9:g} B parameters, {arguments.ranks} GPUs, computing "
        f"{arguments.compute_ms:g} ms, means in the gradients' codec\n"
    )
    print(f"{'':20s}" + "".join(f"{spec:>10s}" for spec in specs))
    for name, gbps in LINKS:
        times = [expected_step_ms(arguments.compute_ms, parts[s][1], parts[s][0], gbps) for s in specs]
        print(f"{name:12s}{gbps:6g} Gb" + "".join(f"{ms:9.0f} " for ms in times)[1:])
    bf16_bytes, bf16_ms = parts["bf16"]
    for spec in specs[2:]:
        sent, codec_ms = parts[spec]
        rate = 8e-6 * (bf16_bytes - sent) / max(codec_ms - bf16_ms, 1e-9)
        print(
            f"{spec} beats bf16 below {rate:,.0f} Gbit/s: {codec_ms:.1f} ms of kernels against {bf16_ms:.1f}"
        )


def main() -> None:
    """Print both tables."""
    arguments = parse_arguments()
    roofline(arguments.copy_gb_per_s)
    steps(arguments)


if __name__ == "__main__":
    main()
