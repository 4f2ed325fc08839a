"""Residuals: two buffers, committed or discarded whole."""

from __future__ import annotations

import pytest
import torch

from gradq.errors import ConfigError
from gradq.sync.feedback import Feedback, Residuals


def write(residuals, name, value, numel=4, start=0, stop=None):
    """One step's piece: returns what was read."""
    with residuals.update(name, numel, start, numel if stop is None else stop) as (old, new):
        read = old.clone()
        new.fill_(value)
    return read


def read(residuals, name, numel=4):
    with residuals.update(name, numel, 0, numel) as (old, _):
        seen = old.tolist()
    residuals.discard()
    return seen


def test_a_residual_starts_as_zeros():
    residuals = Residuals()
    assert "w" not in residuals
    assert write(residuals, "w", 1.0).tolist() == [0.0] * 4
    assert "w" in residuals
    assert residuals.names() == ["w"]


def test_what_was_written_is_read_after_commit_and_not_before():
    residuals = Residuals()
    write(residuals, "w", 1.0)
    assert residuals.current("w").tolist() == [0.0] * 4
    residuals.commit()
    assert residuals.current("w").tolist() == [1.0] * 4
    assert write(residuals, "w", 2.0).tolist() == [1.0] * 4
    residuals.commit()
    assert read(residuals, "w") == [2.0] * 4


def test_discard_leaves_everything_bit_for_bit():
    residuals = Residuals()
    write(residuals, "w", 0.1)
    residuals.commit()
    before = residuals.current("w").clone()
    write(residuals, "w", float("nan"))
    residuals.discard()
    residuals.commit()  # nothing was written since
    assert torch.equal(residuals.current("w"), before)
    assert read(residuals, "w") == before.tolist()


def test_a_parameter_that_was_not_in_the_step_keeps_its_residual():
    residuals = Residuals()
    for name in ("a", "b"):
        write(residuals, name, 1.0)
    residuals.commit()
    write(residuals, "a", 2.0)
    residuals.commit()
    assert (read(residuals, "a"), read(residuals, "b")) == ([2.0] * 4, [1.0] * 4)


def test_pieces_are_parts_of_one_residual():
    residuals = Residuals()
    write(residuals, "w", 1.0, start=0, stop=3)
    write(residuals, "w", 2.0, start=3, stop=4)
    residuals.commit()
    assert residuals.current("w").tolist() == [1.0, 1.0, 1.0, 2.0]
    assert write(residuals, "w", 9.0, start=2, stop=4).tolist() == [1.0, 2.0]


def test_fp32_pieces_are_views_and_nothing_is_allocated_again():
    residuals = Residuals()
    addresses = []
    for _ in range(4):
        with residuals.update("w", 4, 0, 4) as (old, new):
            assert old.data_ptr() != new.data_ptr()
            addresses.append((old.data_ptr(), new.data_ptr()))
        residuals.commit()
    assert addresses[0] == addresses[2] == addresses[1][::-1] == addresses[3][::-1]


def test_bf16_residuals_are_handed_out_in_fp32_and_rounded_once():
    residuals = Residuals("bf16")
    with residuals.update("w", 3, 0, 3) as (old, new):
        assert old.dtype == new.dtype == torch.float32
        new.copy_(torch.tensor([1.0, 1.00390625, 3e-39]))  # the second lies between two bf16 numbers
    residuals.commit()
    assert residuals.current("w").dtype == torch.bfloat16
    assert read(residuals, "w", 3) == torch.tensor([1.0, 1.00390625, 3e-39]).bfloat16().tolist()


def test_bf16_scratch_serves_pieces_of_all_sizes():
    residuals = Residuals("bf16")
    for size in (2, 8, 3):
        assert write(residuals, f"w{size}", 1.0, numel=size).shape == (size,)
    residuals.commit()
    for size in (8, 2, 3):
        assert read(residuals, f"w{size}", size) == [1.0] * size


def test_other_dtypes_are_refused():
    with pytest.raises(ConfigError, match="'fp16': choose from fp32, bf16"):
        Residuals("fp16")
    with pytest.raises(ConfigError, match="'int8'"):
        Feedback("int8")


def test_replace_copies_and_drops_what_the_step_wrote():
    residuals = Residuals()
    write(residuals, "w", 5.0)
    value = torch.arange(4.0).reshape(2, 2)
    residuals.replace("w", value)
    value.fill_(9.0)
    residuals.commit()
    assert read(residuals, "w") == [0.0, 1.0, 2.0, 3.0]
    half = Residuals("bf16")
    half.replace("w", torch.ones(4, dtype=torch.float64))
    assert half.current("w").dtype == torch.bfloat16


def test_keep_drops_the_others_and_says_which():
    residuals = Residuals()
    for name in ("c", "a", "b"):
        write(residuals, name, 1.0)
    assert residuals.names() == ["a", "b", "c"]
    assert residuals.keep({"b", "never seen"}) == ["a", "c"]
    assert residuals.names() == ["b"]
    assert residuals.keep({"b"}) == []
    residuals.clear()
    assert residuals.names() == []


def test_nbytes_counts_both_buffers():
    residuals, half = Residuals(), Residuals("bf16")
    assert residuals.nbytes() == 0
    for kind in (residuals, half):
        write(kind, "a", 1.0, numel=100)
        write(kind, "b", 1.0, numel=28)
    assert (residuals.nbytes(), half.nbytes()) == (2 * 4 * 128, 2 * 2 * 128)


@pytest.mark.parametrize(("finite", "expected"), [(True, 1.0), (False, 0.0)])
def test_a_step_ends_for_both_kinds_at_once(finite, expected):
    feedback = Feedback()
    write(feedback.local, "w", 1.0)
    write(feedback.shard, "w", 1.0)
    feedback.finish(finite)
    for residuals in (feedback.local, feedback.shard):
        assert read(residuals, "w") == [expected] * 4


def test_local_and_shard_residuals_are_apart():
    feedback = Feedback("bf16")
    write(feedback.local, "w", 1.0, numel=8)
    write(feedback.shard, "w", 2.0, numel=2)
    feedback.finish(True)
    assert (feedback.local.current("w").numel(), feedback.shard.current("w").tolist()) == (8, [2.0, 2.0])


def test_a_commit_is_taken_back_once_and_only_until_the_next_step():
    residuals = Residuals()
    for value in (1.0, 2.0):
        write(residuals, "a", value)
        write(residuals, "b", value)
        residuals.commit()
    residuals.revert(["a", "never seen"])
    assert (residuals.current("a").tolist(), residuals.current("b").tolist()) == ([1.0] * 4, [2.0] * 4)
    residuals.revert()
    residuals.revert()
    assert residuals.current("b").tolist() == [1.0] * 4
    write(residuals, "a", 5.0)
    residuals.commit()  # without b
    residuals.revert()
    assert (residuals.current("a").tolist(), residuals.current("b").tolist()) == ([1.0] * 4, [1.0] * 4)


def test_there_is_nothing_to_take_back_of_a_step_that_was_discarded():
    residuals = Residuals()
    for value in (1.0, 2.0):
        write(residuals, "a", value)
        residuals.commit()
    write(residuals, "a", float("nan"))
    residuals.discard()
    residuals.revert()
    assert residuals.current("a").tolist() == [2.0] * 4


def test_the_device_decides_what_is_taken_back():
    for unused in (True, False):
        feedback = Feedback()
        for kind in (feedback.local, feedback.shard, feedback.bases):
            for value in (1.0, 2.0):
                write(kind, "a", value)
                kind.commit()
        feedback.revert_unused({"a": torch.tensor(unused), "b": True, "c": False})
        for kind in (feedback.local, feedback.shard, feedback.bases):
            assert kind.current("a").tolist() == [1.0 if unused else 2.0] * 4


def test_what_is_frozen_can_be_read_and_takes_half_the_memory():
    feedback = Feedback()
    for value in (1.0, 2.0):
        write(feedback.local, "a", value)
        feedback.finish(True)
    feedback.freeze()
    assert feedback.local.current("a").tolist() == [2.0] * 4
    feedback.revert()
    assert feedback.local.current("a").tolist() == [2.0] * 4
