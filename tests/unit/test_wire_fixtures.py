"""The wire format is frozen: the bytes of version 1, and what they decode to, stand in a file.

A gradq that writes other bytes cannot talk to one that is already running. If a test here fails, either the
change was not meant, or the format is new: then raise `wire.VERSION`, write a new file for it, and keep the
old one only if the old format can still be read.

The file is written by this module, and only when asked::

    GRADQ_WRITE_WIRE_FIXTURES=1 python -m pytest tests/unit/test_wire_fixtures.py

It holds, as base64: the inputs (fp32, little-endian), and for every codec the payload and the decoded values
(deflated, fp32 or fp64, every NaN the same one). A new codec adds entries; entries that exist never change.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import struct
import zlib
from pathlib import Path

import pytest
import torch

from gradq import codecs, rng, wire
from gradq.collectives import Direct, Segment, Setting, Step
from gradq.contrib.table import TABLE_NAMES
from gradq.metrics import Metrics
from gradq.sync.feedback import Feedback

FILE = Path(__file__).parent.parent / "fixtures" / f"wire_v{wire.VERSION}.json"
WRITE = os.environ.get("GRADQ_WRITE_WIRE_FIXTURES") == "1"
BACKENDS = ["reference", "numba"]

NUMEL = 299  # at block size 64: four blocks and one of 43, padded to 48
CONTEXT = rng.EncodeContext(
    key=rng.dither_key(1234, 56, rng.name_id("layer.weight"), 1), shift=21845, first_block=3
)
SPECS = [
    *("fp32", "bf16", "fp16", "fp64"),
    *(
        f"int{bits}(block_size=64,rounding={rounding},scale_dtype={scale})"
        for bits in range(2, 9)
        for rounding in ("nearest", "stochastic")
        for scale in ("bf16", "fp16", "fp32")
    ),
    *("int8(block_size=192)", "int4", "int3(block_size=1024)"),
    *(f"rot{bits}(scale={scale})" for bits in range(1, 7) for scale in ("unbiased", "mse")),
    *("rot1(levels=scalar)", "rot2(levels=scalar)"),
    *(f"trellis{bits}(scale={scale})" for bits in range(1, 5) for scale in ("unbiased", "mse")),
    *TABLE_NAMES,
    *(f"{name}(rounding=nearest)" for name in TABLE_NAMES if not name.startswith(("qsgd", "sign"))),
    *("topk", "topk(percent=10,num_bits=8,block_size=256)", "topk(percent=33,num_bits=3,block_size=256)"),
]


def inputs() -> list[float]:
    """Blocks of 64: ordinary, zeros and denormals, ordinary with one NaN, large, and a short one of 43."""
    values = []
    for i in range(NUMEL):
        word = rng._splitmix64(i)
        ordinary = (word >> 40) / (1 << 23) - 1.0
        ordinary *= 2.0 ** -((word & 0xFF) % 7)
        block, j = divmod(i, 64)
        if block == 1:
            value = 0.0 if j % 2 else ordinary * 1e-39
        elif block == 2:
            value = math.nan if j == 17 else ordinary
        elif block == 3:
            value = ordinary * 3e4
        else:
            value = ordinary
        values.append(struct.unpack("<f", struct.pack("<f", value))[0])
    return values


def to_text(data: bytes, deflate: bool = False) -> str:
    return base64.b64encode(zlib.compress(data, 9) if deflate else data).decode()


def from_text(text: str, deflate: bool = False) -> bytes:
    data = base64.b64decode(text)
    return zlib.decompress(data) if deflate else data


def raw(tensor: torch.Tensor) -> bytes:
    """Little-endian bytes, every NaN the same one."""
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, math.nan), tensor)
    return tensor.contiguous().numpy().tobytes()


def tensor_of(data: bytes, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)


def codec_of(spec: str) -> codecs.Codec:
    """The codec that a key of the file stands for: "trellis4" was another name of "rot4(levels=trellis)"."""
    return codecs.from_spec(re.sub(r"^trellis(\d)\(", r"rot\1(levels=trellis,", spec))


def encode(spec: str, x: torch.Tensor) -> bytes:
    codec = codec_of(spec)
    payload = torch.zeros(codec.nbytes(x.numel()), dtype=torch.uint8)
    codec.encode(x.to(codec.work_dtype), payload, context=CONTEXT)
    return raw(payload)


def decode(spec: str, payload: bytes) -> bytes:
    codec = codec_of(spec)
    out = torch.empty(NUMEL, dtype=codec.work_dtype)
    codec.decode(tensor_of(payload), out)
    return raw(out)


class Posted:
    """A channel that keeps what rank 1 of 3 sends."""

    def post(self, send, receive, header):
        send[0][: wire.HEADER_BYTES] = tensor_of(header.pack())
        self.message = raw(send[0])
        return self

    def wait(self):
        pass


def message(x: torch.Tensor) -> bytes:
    """Rank 1's message of phase 1 of `Direct`: a matrix in 4 bits with feedback and a bias in fp32."""
    channel, feedback = Posted(), Feedback()
    int4, int8, fp32 = (codecs.from_spec(s) for s in ("int4(rounding=nearest)", "int8", "fp32"))
    setting = Setting(
        rank=1,
        world_size=3,
        seed=7,
        channels=[channel],
        feedback=feedback,
        metrics=Metrics(),
        device=torch.device("cpu"),
    )
    segments = [
        Segment("layer.bias", 0, 9, 1, fp32, fp32, False, False),
        Segment("layer.weight", 9, 55, 0, int4, int8, True, False),
    ]
    direct = Direct(segments, torch.float32, setting)
    next(direct.average(x[:64].clone(), Step(index=300, bucket=2)))
    return channel.message


def write() -> None:
    x = torch.tensor(inputs())
    entries = {}
    for spec in SPECS:
        payload = encode(spec, x)
        entries[spec] = {"payload": to_text(payload), "values": to_text(decode(spec, payload), True)}
    fixture = {
        "version": wire.VERSION,
        "inputs": to_text(raw(x)),
        "codecs": entries,
        "direct_message": to_text(message(x)),
    }
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(fixture, indent=1) + "\n")


if WRITE:
    os.environ["GRADQ_KERNELS"] = "reference"
    write()
    del os.environ["GRADQ_KERNELS"]

FIXTURE = json.loads(FILE.read_text())


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv("GRADQ_KERNELS", request.param)
    return request.param


@pytest.fixture
def x():
    return tensor_of(from_text(FIXTURE["inputs"]), torch.float32)


def first_difference(got: bytes, expected: bytes) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b),
        min(len(got), len(expected)),
    )
    return (
        f"{len(got)} bytes, frozen are {len(expected)}; they differ from byte {at} on: "
        f"{got[at : at + 8].hex()}, frozen is {expected[at : at + 8].hex()}"
    )


@pytest.mark.parametrize("spec", SPECS)
def test_frozen_bytes(spec, backend, x):
    got, expected = encode(spec, x), from_text(FIXTURE["codecs"][spec]["payload"])
    assert got == expected, first_difference(got, expected)


@pytest.mark.parametrize("spec", SPECS)
def test_frozen_values(spec, backend):
    entry = FIXTURE["codecs"][spec]
    got, expected = decode(spec, from_text(entry["payload"])), from_text(entry["values"], True)
    assert got == expected, first_difference(got, expected)


def test_frozen_message(backend, x):
    got, expected = message(x), from_text(FIXTURE["direct_message"])
    assert got == expected, first_difference(got, expected)


def test_the_frozen_message_reads_as_the_format_says(x):
    """By hand, from the documentation of `wire` and `kernels.reference`, without the code that wrote it."""
    frozen = from_text(FIXTURE["direct_message"])
    magic, version, phase, sender, bucket, step, _ = struct.unpack("<2sBBHHII", frozen[:16])
    assert (magic, version, phase, sender, bucket, step) == (b"gq", 1, 1, 1, 2, 300)
    assert frozen[16:52] == raw(x[:9])  # the bias
    assert frozen[52:56] == bytes(4)  # aligned to 8
    weight = frozen[56:]
    assert len(weight) == 32  # scale 2, codes of 56 elements 28, aligned
    (scale,) = struct.unpack("<f", bytes(2) + weight[:2])  # bf16 is the upper half of fp32
    values = x[9:64]
    assert 1 <= scale / (values.abs().max().item() / 7) < 1 + 2**-7
    codes = [byte & 15 for byte in weight[2:30]] + [byte >> 4 for byte in weight[2:30]]
    assert codes[55:] == [7]  # padding stands for zero
    for code, value in zip(codes, values.tolist(), strict=False):
        assert abs((code - 7) * scale - value) <= scale / 2 * 1.0001
    assert weight[30:] == bytes(2)


def test_the_file_holds_just_what_is_tested_and_awkward_values():
    assert FIXTURE["version"] == wire.VERSION
    assert set(FIXTURE["codecs"]) == set(SPECS)
    assert {codec_of(spec).name for spec in SPECS} == set(codecs.names())
    x = tensor_of(from_text(FIXTURE["inputs"]), torch.float32)
    assert x.numel() == NUMEL
    assert x.isnan().sum() == 1
    assert ((x != 0) & (x.abs() < 2.0**-126)).sum() > 20
    decoded = tensor_of(from_text(FIXTURE["codecs"][SPECS[6]]["values"], True), torch.float32)
    assert decoded.isnan().sum() == 64
    assert decoded[64:128].count_nonzero() == 0


def test_the_file_is_not_written_by_accident():
    assert not WRITE, "the file was written anew; look at its diff and run again without the variable"
