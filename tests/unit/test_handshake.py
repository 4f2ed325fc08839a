"""The handshake's verdict, without ranks: what all of them said is handed in."""

from __future__ import annotations

import pytest

from gradq.errors import MismatchError
from gradq.transport import handshake


@pytest.fixture
def agree(monkeypatch):
    """agree(notes of rank 0, notes of rank 1, ...), as every rank would see it."""

    def run(*everyone):
        class Group:
            def size(self):
                return len(everyone)

        def gather(into, mine, group):
            assert mine == everyone[0]
            assert len(into) == group.size()
            into[:] = everyone

        monkeypatch.setattr(handshake.dist, "all_gather_object", gather)
        handshake.agree(everyone[0], Group())

    return run


def test_equal_notes_agree(agree):
    notes = {"spec": "int4", "seed": 0, "parameters": {"w": ((3, 4), "float32", "int4")}}
    agree(notes)
    agree(notes, dict(notes), dict(notes))


def test_the_first_rank_and_field_that_differ_are_named(agree):
    with pytest.raises(MismatchError, match=r"spec is 'int4' on rank 0 and 'int8' on rank 2\."):
        agree({"spec": "int4"}, {"spec": "int4"}, {"spec": "int8"}, {"spec": "int2"})


def test_a_field_that_only_one_rank_has(agree):
    with pytest.raises(MismatchError, match=r"seed is None on rank 0 and 1 on rank 1"):
        agree({"spec": "int4"}, {"spec": "int4", "seed": 1})
    with pytest.raises(MismatchError, match=r"seed is 1 on rank 0 and None on rank 1"):
        agree({"spec": "int4", "seed": 1}, {"spec": "int4"})


def test_a_parameter_that_differs_is_named(agree):
    with pytest.raises(
        MismatchError, match=r"parameters\['b'\] is \(3, 4\) on rank 0 and \(4, 3\) on rank 1"
    ):
        agree({"parameters": {"a": 1, "b": (3, 4)}}, {"parameters": {"a": 1, "b": (4, 3)}})


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, "'a' on rank 0 and 'b' on rank 1"),
        ({"a": 1, "b": 2}, {"a": 1, "c": 2}, "'b' on rank 0 and 'c' on rank 1"),
        ({"a": 1, "b": 2}, {"a": 1}, r"'b' on rank 0 and '\(nothing\)' on rank 1"),
        ({"a": 1}, {"a": 1, "b": 2}, r"'\(nothing\)' on rank 0 and 'b' on rank 1"),
        ({}, {"a": 1}, r"'\(nothing\)' on rank 0 and 'a' on rank 1"),
    ],
)
def test_parameter_names_and_their_order_must_agree(agree, ours, theirs, message):
    with pytest.raises(MismatchError, match=rf"parameters \(the names\) is {message}"):
        agree({"parameters": ours}, {"parameters": theirs})


def test_a_mapping_is_no_number(agree):
    with pytest.raises(MismatchError, match=r"parameters is \{'a': 1\} on rank 0 and 3 on rank 1"):
        agree({"parameters": {"a": 1}}, {"parameters": 3})


def test_a_rank_that_cannot_start_says_why_to_all(agree):
    notes = {"spec": "int4", "seed": 0}
    with pytest.raises(MismatchError, match=r"^rank 1 cannot start: no codec is called 'int44'$"):
        agree(notes, {"error": "no codec is called 'int44'"}, {"spec": "int8"})


def test_the_second_group_hears_what_the_first_was_told(monkeypatch):
    """Rank 1 of the first group fails; this rank is told, and tells the ranks of the second."""
    heard = []

    class Group:
        def size(self):
            return 2

    rows, columns = Group(), Group()

    def gather(into, mine, group):
        heard.append((group, mine))
        into[:] = [mine, {"error": "the disk is full", "verb": "save"} if group is rows else mine]

    monkeypatch.setattr(handshake.dist, "all_gather_object", gather)
    with (
        pytest.raises(MismatchError, match="rank 1 cannot save: the disk is full"),
        handshake.meeting([rows, columns], "save") as notes,
    ):
        notes["step"] = 3
    assert heard[0] == (rows, {"step": 3})
    assert heard[1][0] is columns
    assert heard[1][1]["error"] == "rank 1 cannot save: the disk is full"
    assert len(heard) == 2
