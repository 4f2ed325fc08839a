"""gradq's codecs beside other people's, on the same buffers, in the same interleaved run.

    pip install bitsandbytes torchao
    python benchmarks/codecs_vs_peers.py --record

Each row: NMSE on normal numbers and on gradients of the example's GPT (see benchmarks/codecs.py), bits on the
wire with everything a decoder needs, and the speed of encoding and decoding 26 MB on one thread as a fraction
of memcpy, each at its best round (CPU time). gradq's rows come with and without error feedback; no peer here
has any, so a peer's encoding does less. PowerSGD is torch's arithmetic on a square matrix, one iteration from
a random Q, without its two all-reduces, which are what it waits for. A peer that is not installed is listed
with the command that installs it; a peer that fails says how.

The numbers are of the machine, and of CPU code that some of these packages do not tune: bitsandbytes and
torchao are made for GPUs.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradq import rng
from gradq.bench.gradients import from_function, synthetic
from gradq.bench.interleaved import Call, fastest_copy, interleave, least
from gradq.bench.records import environment, write_record
from gradq.codecs import Codec, from_spec
from gradq.errors import ConfigError

HERE = Path(__file__).resolve().parent
SIDE = 2560  # the buffer is a matrix for PowerSGD: 2560 x 2560, 26 MB
OURS = ("int8", "int4", "rot4", "rot4(levels=trellis)", "rot2", "fp8_e4m3", "nf4", "bf16")

Encoded = Any


@dataclass(frozen=True)
class Peer:
    """How someone encodes a matrix [rows, columns] of fp32.

    Attributes:
        name: what is measured.
        package: as pip calls it.
        encode: matrix -> whatever the decoder needs.
        decode: that and the matrix's shape -> fp32, of as many elements.
        nbytes: of what was encoded, as it would be sent.
    """

    name: str
    package: str
    encode: Callable[[Tensor], Encoded]
    decode: Callable[[Encoded, torch.Size], Tensor]
    nbytes: Callable[[Encoded], int]


def bytes_of(*tensors: Tensor) -> int:
    """Of tensors as they are."""
    return sum(t.numel() * t.element_size() for t in tensors)


def in_rows(x: Tensor, length: int) -> Tensor:
    """[n / length, length], padded with zeros."""
    flat = x.reshape(-1)
    if flat.numel() % length:
        flat = torch.nn.functional.pad(flat, (0, length - flat.numel() % length))
    return flat.view(-1, length)


def cut(x: Tensor, shape: torch.Size) -> Tensor:
    """Without the padding."""
    return x.reshape(-1)[: shape.numel()].view(shape)


# --- torch ---------------------------------------------------------------------------------------------


def casts() -> list[Peer]:
    """What torch's bf16 and fp16 hooks send."""
    return [
        Peer(
            f"cast to {str(dtype).removeprefix('torch.')}",
            "torch",
            lambda x, dtype=dtype: x.to(dtype),
            lambda e, _: e.to(torch.float32),
            bytes_of,
        )
        for dtype in (torch.bfloat16, torch.float16)
    ]


def torch_hooks() -> list[Peer]:
    """The uint8 hooks of DDP: their observers and their arithmetic (they loop over channels of 512)."""
    from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver
    from torch.distributed.algorithms.ddp_comm_hooks import quantization_hooks as hooks

    def per_tensor(x: Tensor) -> Encoded:
        observer = MinMaxObserver()
        observer(x)
        scale, zero_point = observer.calculate_qparams()
        return hooks._quantize_per_tensor_backend(x, scale, zero_point), scale, zero_point

    def per_channel(x: Tensor) -> Encoded:
        rows = in_rows(x, 512)
        observer = PerChannelMinMaxObserver(ch_axis=0)
        observer(rows)
        scale, zero_point = observer.calculate_qparams()
        return hooks._quantize_per_channel_backend(rows, scale, zero_point), scale, zero_point

    def size(e: Encoded) -> int:
        return bytes_of(e[0]) + 8 * e[1].numel()  # the hooks send scale and zero point as fp32

    return [
        Peer(
            "hook, uint8 per tensor",
            "torch",
            per_tensor,
            lambda e, shape: cut(hooks._dequantize_per_tensor_backend(*e), shape),
            size,
        ),
        Peer(
            "hook, uint8 per channel of 512",
            "torch",
            per_channel,
            lambda e, shape: cut(hooks._dequantize_per_channel_backend(*e), shape),
            size,
        ),
    ]


def power_sgd() -> list[Peer]:
    """PowerSGD's arithmetic: P = orthogonal(M Q), Q = M' P, and M is about P Q'."""
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import _orthogonalize

    def encode(x: Tensor, rank: int) -> Encoded:
        generator = torch.Generator().manual_seed(0)
        rank = min(rank, *x.shape)
        q = torch.randn(x.shape[1], rank, generator=generator)
        _orthogonalize(q[None])
        p = x @ q
        _orthogonalize(p[None])
        return p, x.t() @ p

    return [
        Peer(
            f"PowerSGD, rank {rank}",
            "torch",
            lambda x, rank=rank: encode(x, rank),
            lambda e, _: e[0] @ e[1].t(),
            lambda e: bytes_of(*e),
        )
        for rank in (1, 4)
    ]


def fbgemm() -> list[Peer]:
    """The row-wise operators that torch has from FBGEMM: rows of 256, scale and least value in each."""
    ops = torch.ops.quantized
    pairs = {
        "8 bits": (ops.embedding_bag_byte_prepack, ops.embedding_bag_byte_unpack),
        "4 bits": (ops.embedding_bag_4bit_prepack, ops.embedding_bag_4bit_unpack),
        "2 bits": (ops.embedding_bag_2bit_prepack, ops.embedding_bag_2bit_unpack),
    }
    return [
        Peer(
            f"fbgemm row-wise, {name}, block 256",
            "torch",
            lambda x, pack=pack: pack(in_rows(x, 256)),
            lambda e, shape, unpack=unpack: cut(unpack(e), shape),
            bytes_of,
        )
        for name, (pack, unpack) in pairs.items()
    ]


# --- others --------------------------------------------------------------------------------------------


def bitsandbytes() -> list[Peer]:
    """Block-wise with its dynamic map of 8 bits, and nf4 and fp4."""
    import bitsandbytes.functional as bnb

    def size(e: Encoded) -> int:
        return bytes_of(e[0], e[1].absmax)

    return [
        Peer(
            "bitsandbytes 8 bits, block 256",
            "bitsandbytes",
            lambda x: bnb.quantize_blockwise(x, blocksize=256),
            lambda e, shape: cut(bnb.dequantize_blockwise(e[0], e[1]).float(), shape),
            size,
        ),
        *(
            Peer(
                f"bitsandbytes {kind}, block {block}",
                "bitsandbytes",
                lambda x, kind=kind, block=block: bnb.quantize_4bit(x, blocksize=block, quant_type=kind),
                lambda e, shape: cut(bnb.dequantize_4bit(e[0], e[1]).float(), shape),
                size,
            )
            for kind, block in (("nf4", 64), ("nf4", 256), ("fp4", 64))
        ),
    ]


def torchao() -> list[Peer]:
    """Affine int8 and int4 by block, float8 by block, nf4 with scales of scales."""
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    def affine(x: Tensor, low: int, high: int) -> Encoded:
        rows, block = in_rows(x, 256), (1, 256)
        scale, zero_point = choose_qparams_affine(
            rows, MappingType.SYMMETRIC, block, torch.int8, low, high, eps=1e-30
        )
        return quantize_affine(rows, block, scale, zero_point, torch.int8, low, high), scale, zero_point

    def undo(e: Encoded, shape: torch.Size, low: int, high: int) -> Tensor:
        values = dequantize_affine(e[0], (1, 256), e[1], e[2], torch.int8, low, high)
        return cut(values.float(), shape)

    def float8(x: Tensor) -> Encoded:
        from torchao.float8.float8_utils import tensor_to_scale

        scale = tensor_to_scale(x, torch.float8_e4m3fn)
        return (x * scale).to(torch.float8_e4m3fn), scale

    peers = [
        Peer(
            f"torchao affine int{bits}, block 256",
            "torchao",
            lambda x, limit=limit: affine(x, -limit - 1, limit),
            lambda e, shape, limit=limit: undo(e, shape, -limit - 1, limit),
            lambda e, bits=bits: e[0].numel() * bits // 8 + 4 * e[1].numel(),
        )
        for bits, limit in ((8, 127), (4, 7))
    ]
    peers.append(
        Peer(
            "torchao float8 e4m3, per tensor",
            "torchao",
            float8,
            lambda e, shape: cut(e[0].float() / e[1], shape),
            lambda e: bytes_of(e[0]) + 4,
        )
    )
    return peers


GROUPS: dict[str, tuple[str, Callable[[], list[Peer]]]] = {
    "torch, casts": ("torch", casts),
    "torch, uint8 hooks": ("torch", torch_hooks),
    "torch, PowerSGD": ("torch", power_sgd),
    "torch, fbgemm operators": ("torch", fbgemm),
    "bitsandbytes": ("bitsandbytes", bitsandbytes),
    "torchao": ("torchao", torchao),
}


def torchao_nf4() -> list[Peer]:
    """QLoRA's format in torchao: nf4 in blocks of 64, its scales in 8 bits."""
    try:
        from torchao.dtypes.nf4tensor import to_nf4
    except ImportError:
        from torchao.prototype.dtypes.nf4tensor import to_nf4

    def size(e: Encoded) -> int:
        parts = (e.quantized_data, e.quantized_scalers, e.quantization_factor, e.scaler_mean)
        return bytes_of(*parts)

    return [
        Peer(
            "torchao nf4, block 64",
            "torchao",
            lambda x: to_nf4(in_rows(x, 64 * 256), 64, 256),
            lambda e, shape: cut(e.get_original_weight().float(), shape),
            size,
        )
    ]


GROUPS["torchao, nf4"] = ("torchao", torchao_nf4)


# --- ours ----------------------------------------------------------------------------------------------


def ours(codec: Codec, feedback: bool, numel: int) -> Peer:
    """A codec of gradq as a peer, its buffers kept as training keeps them."""
    payload, out = torch.zeros(codec.nbytes(numel), dtype=torch.uint8), torch.zeros(numel)
    context = rng.EncodeContext(key=rng.dither_key(0, 0, 0, 1))
    residuals = {"residual": torch.zeros(numel), "new_residual": torch.zeros(numel)} if feedback else {}

    def encode(x: Tensor) -> Encoded:
        n = x.numel()
        part = payload[: codec.nbytes(n)]
        codec.encode(x.view(-1), part, context=context, **{name: r[:n] for name, r in residuals.items()})
        return part

    def decode(e: Encoded, shape: torch.Size) -> Tensor:
        codec.decode(e, out[: shape.numel()])
        return out[: shape.numel()].view(shape)

    name = f"gradq {codec}" + (", feedback" if feedback else "")
    return Peer(name, "gradq", encode, decode, bytes_of)


def our_rows(numel: int) -> list[Peer]:
    """Every codec of `OURS` without error feedback, and with where it wants it."""
    peers = []
    for spec in OURS:
        for feedback in (False, True):
            codec = from_spec(spec).for_feedback(feedback)
            if not feedback or codec.wants_feedback:
                peers.append(ours(codec, feedback, numel))
    return peers


# --- measuring -----------------------------------------------------------------------------------------


def nmse(peer: Peer, matrices: list[Tensor]) -> float:
    """Over matrices, each encoded by itself, without what an earlier one left as a residual."""
    error = sum(float((peer.decode(peer.encode(x), x.shape) - x).double().square().sum()) for x in matrices)
    return error / sum(float(x.double().square().sum()) for x in matrices)


def collect(numel: int) -> tuple[list[Peer], list[dict[str, object]]]:
    """The peers that are here, and a line for each group that is not."""
    peers, missing = our_rows(numel), []
    for group, (package, make) in GROUPS.items():
        try:
            peers += make()
        except ImportError as error:
            missing.append({"name": group, "missing": f"pip install {package}", "why": str(error)})
    return peers, missing


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=SIDE, help="of the square buffer (default: 2560, 26 MB)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-gradients", action="store_true", help="normal numbers only")
    parser.add_argument("--out", type=Path, help="OUT.csv")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results/")
    args = parser.parse_args()
    if args.side < 64:
        raise SystemExit(f"--side {args.side}: at least 64")
    # of packages that are not ours; what goes wrong raises
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(1)
    x = synthetic(args.side * args.side)["gaussian"].view(args.side, args.side)
    real = []
    if not args.no_gradients:
        loaded = from_function(f"{HERE / 'codecs.py'}:gradients", 1)[0]
        real = [g.view(-1, 128) if g.numel() % 128 == 0 else g.view(1, -1) for g in loaded.values()]
    peers, missing = collect(max([x.numel(), *(g.numel() for g in real)]))

    rows, calls = [], {"memcpy": fastest_copy(x, torch.zeros_like(x))[1]}
    for peer in peers:
        row: dict[str, object] = {"name": peer.name, "package": peer.package}
        rows.append(row)
        try:
            encoded = peer.encode(x)
            row["bits"] = 8 * peer.nbytes(encoded) / x.numel()
            row["gaussian"] = nmse(peer, [x]) if "feedback" not in peer.name else None
            row["gradients"] = nmse(peer, real) if real and "feedback" not in peer.name else None
        except Exception as error:  # of a package that is not ours; the row says so
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        calls[f"encode {peer.name}"] = bind(peer.encode, x)
        calls[f"decode {peer.name}"] = bind(peer.decode, peer.encode(x), x.shape)
    seconds = interleave(calls, rounds=args.rounds)
    for row in rows:
        if "failed" not in row:
            for what in ("encode", "decode"):
                row[what] = least(seconds, f"{what} {row['name']}", "memcpy")
    show(rows, missing)
    if args.out or args.record:
        save(rows + missing, args)


def bind(function: Callable[..., object], *arguments: object) -> Call:
    """A call without arguments."""
    return lambda: function(*arguments)


def show(rows: list[dict[str, object]], missing: list[dict[str, object]]) -> None:
    """The table."""
    columns = ("bits", "gaussian", "gradients", "encode", "decode")
    print(f"{'':44s}" + "".join(f"{name:>11s}" for name in columns))
    for row in rows:
        cells = [row.get(name) for name in columns]
        text = "".join(f"{cell:11.3g}" if isinstance(cell, float) else f"{'':11s}" for cell in cells)
        print(f"{row['name']!s:44s}" + text, f"failed: {row['failed']}" if "failed" in row else "")
    for row in missing:
        print(f"{row['name']!s:44s} not installed: {row['missing']}")


def save(rows: list[dict[str, object]], args: argparse.Namespace) -> None:
    """CSV, and with --record the record beside it."""
    versions = {}
    for package in ("bitsandbytes", "torchao"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    results = HERE / "results"
    out = args.out or results / "codecs_vs_peers.csv"
    if out.suffix != ".csv":
        raise ConfigError(f"--out {out}: a name that ends in .csv")
    fields = ["name", "package", "bits", "gaussian", "gradients", "encode", "decode", "failed", "missing"]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {out}")
    if args.record:
        settings = {"side": args.side, "rounds": args.rounds, "clock": "thread", "packages": versions}
        path = write_record(
            results, "codecs_vs_peers", environment=environment(), settings=settings, rows=rows
        )
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
