"""The wire: offsets, headers and shards."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradq import wire
from gradq.errors import WireError

HEADER = wire.Header(phase=2, sender=3, bucket=4, step=5, layout=0xDEADBEEF)

partitions = given(
    numel=st.integers(0, 20_000),
    grain=st.sampled_from([1, 64, 192, 256, 1024]),
    world_size=st.integers(1, 9),
    rotation=st.integers(0, 1000),
)


# --- offsets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nbytes", "aligned"), [(0, 0), (1, 8), (7, 8), (8, 8), (9, 16), (16, 16)])
def test_align(nbytes, aligned):
    assert wire.align(nbytes) == aligned


def test_message_offsets():
    assert wire.message_offsets([]) == ([], 16)
    assert wire.message_offsets([5, 8, 0, 9]) == ([16, 24, 32, 32], 48)


@given(st.lists(st.integers(0, 5000), max_size=20))
def test_segments_are_aligned_and_disjoint(sizes):
    offsets, total = wire.message_offsets(sizes)
    assert len(offsets) == len(sizes)
    end = wire.HEADER_BYTES
    for offset, size in zip(offsets, sizes, strict=True):
        assert offset % 8 == 0
        assert end <= offset < end + 8
        end = offset + size
    assert end <= total < end + 8
    assert total % 8 == 0


@pytest.mark.parametrize(("world_size", "sent"), [(1, 0), (2, 1000), (4, 1500), (8, 1750)])
def test_ring_bytes(world_size, sent):
    assert wire.ring_bytes(1000, world_size) == sent


# --- header --------------------------------------------------------------------------------------------


def test_the_bytes_of_a_header():
    # magic "gq", version 1, phase, sender, bucket, step, layout; little-endian
    assert HEADER.pack().hex() == "6771" + "01" + "02" + "0300" + "0400" + "05000000" + "efbeadde"
    assert len(HEADER.pack()) == wire.HEADER_BYTES


def test_what_was_sent_is_accepted():
    HEADER.check(HEADER.pack())


def test_large_numbers_wrap_and_are_still_accepted():
    large = wire.Header(phase=1, sender=70_000, bucket=70_000, step=1 << 33, layout=1)
    large.check(large.pack())
    assert len(large.pack()) == wire.HEADER_BYTES


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("phase", 1, "its phase is 1, expected 2"),
        ("sender", 0, "its sender is 0, expected 3"),
        ("bucket", 7, "its bucket is 7, expected 4"),
        ("step", 6, "its step is 6, expected 5"),
        ("layout", 17, f"its layout digest is 17, expected {0xDEADBEEF}"),
    ],
)
def test_a_difference_names_the_field_and_the_rank(field, value, message):
    other = dataclasses.replace(HEADER, **{field: value})
    with pytest.raises(WireError, match=f"message from rank 3, bucket 4, phase 2, step 5: {message}"):
        HEADER.check(other.pack())


def test_another_version_is_named():
    received = bytearray(HEADER.pack())
    received[2] = 9
    with pytest.raises(WireError, match=r"from rank 3.*wire format 9, this gradq speaks 1"):
        HEADER.check(bytes(received))


def test_something_else_is_no_message():
    with pytest.raises(WireError, match=r"from rank 3.*not a gradq message \(it starts with 00000000\)"):
        HEADER.check(bytes(16))


@given(st.integers(0, 15), st.integers(1, 255))
def test_no_flipped_byte_goes_unseen(position, flip):
    received = bytearray(HEADER.pack())
    received[position] ^= flip
    with pytest.raises(WireError, match="rank 3"):
        HEADER.check(bytes(received))


def test_layout_digest_is_frozen():
    assert wire.layout_digest("Direct []") == 0xC70A77BE


# --- shards --------------------------------------------------------------------------------------------


@partitions
def test_pieces_are_disjoint_cover_all_and_start_at_blocks(numel, grain, world_size, rotation):
    pieces = sorted(wire.shard(numel, grain, world_size, owner, rotation) for owner in range(world_size))
    position = 0
    for start, stop in pieces:
        assert start <= stop
        if start < stop:
            assert start == position
            assert start % grain == 0
            position = stop
    assert position == numel


@partitions
def test_pieces_are_balanced_within_one_grain(numel, grain, world_size, rotation):
    pieces = [wire.shard(numel, grain, world_size, owner, rotation) for owner in range(world_size)]
    blocks = [-(-(stop - start) // grain) for start, stop in pieces]
    assert max(blocks) - min(blocks) <= 1


@partitions
def test_rotation_permutes_the_owners(numel, grain, world_size, rotation):
    still = [wire.shard(numel, grain, world_size, owner, 0) for owner in range(world_size)]
    turned = [wire.shard(numel, grain, world_size, owner, rotation) for owner in range(world_size)]
    by = rotation % world_size
    assert turned == still[by:] + still[:by]


def test_small_parameters_spread_over_the_ranks():
    owners = [
        owner
        for rotation in range(8)
        for owner in range(4)
        if wire.shard(100, 256, 4, owner, rotation) == (0, 100)
    ]
    assert sorted(owners) == [0, 0, 1, 1, 2, 2, 3, 3]
