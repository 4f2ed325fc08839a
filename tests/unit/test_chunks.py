"""Chunks of a bucket: everything in order, once, at the grain; and what may not be cut stays whole."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradq import rng
from gradq.codecs import from_spec
from gradq.collectives import Direct, Hierarchical, LowRank, Segment, TwoPhase
from gradq.sync.layout import chunks_of

CODEC = from_spec("int4(block_size=64)")


def segment(name: str, numel: int, *, feedback2: bool = False) -> Segment:
    return Segment(
        name=name,
        start=0,
        numel=numel,
        rotation=0,
        phase1=CODEC,
        phase2=CODEC,
        feedback1=True,
        feedback2=feedback2,
    )


@given(
    numels=st.lists(st.integers(0, 2000), min_size=1, max_size=6),
    kinds=st.lists(st.sampled_from([Direct, TwoPhase, Hierarchical, LowRank]), min_size=6, max_size=6),
    feedback2=st.booleans(),
    most=st.integers(1, 1500),
)
def test_chunks_hold_the_bucket(numels, kinds, feedback2, most):
    bucket = [
        (kind, segment(f"p{i}", numel, feedback2=feedback2))
        for i, (kind, numel) in enumerate(zip(kinds, numels, strict=False))
    ]
    chunks = list(chunks_of(bucket, most))
    assert all(chunks)
    seen = {found.name: [] for _, found in bucket}
    order = []
    kind_of = {whole.name: kind for kind, whole in bucket}
    for chunk in chunks:
        at = 0
        for kind, found in chunk:
            assert found.start == at
            at += found.numel
            seen[found.name].append(found)
            order.append(found.name)
            assert kind is kind_of[found.name]
        room = max(most, -(-most // 64) * 64)
        assert at <= room or len(chunk) == 1
    assert order == sorted(order)
    for kind, whole in bucket:
        cut = seen[whole.name]
        if not kind.cuts_segments or feedback2 or whole.numel <= most:
            assert [replace(found, start=0) for found in cut] == [whole]
            continue
        at = 0
        for found in cut:
            assert (found.offset, found.whole) == (at, whole.numel)
            assert found.offset % whole.grain == 0
            assert 0 < found.numel <= max(2 * most, 64)
            at += found.numel
        assert at == whole.numel


@pytest.mark.parametrize(("numel", "most", "want"), [(640, 320, [320, 320]), (641, 320, [192, 256, 193])])
def test_cuts_are_nearly_equal(numel, most, want):
    assert [s.numel for chunk in chunks_of([(Direct, segment("p", numel))], most) for _, s in chunk] == want


@settings(deadline=None)  # the first call compiles
@given(numel=st.integers(1, 700), ranks=st.integers(1, 4), at=st.integers(0, 10**6), bad=st.booleans())
@pytest.mark.parametrize("spec", ["int4", "int8(scale_dtype=fp16)", "int2(scale_dtype=fp32)", "nf4", "fp32"])
def test_a_value_that_is_not_finite_reaches_the_mean(spec, numel, ranks, at, bad):
    codec = from_spec(spec)
    messages = torch.zeros(ranks, -(-codec.nbytes(numel) // 8) * 8, dtype=torch.uint8)
    payloads = messages[:, : codec.nbytes(numel)]
    for rank, payload in enumerate(payloads):
        x = torch.randn(numel, generator=torch.Generator().manual_seed(at + rank))
        if bad and rank == at % ranks:
            x[at % numel] = (math.nan, math.inf)[at % 2]
        codec.encode(x, payload, context=rng.EncodeContext(key=at))
    mean = torch.empty(numel)
    codec.decode_mean(payloads, mean)
    assert bool(mean.isfinite().all()) is not bad
