"""Specs: what a user writes, and that its text makes it again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradq.codecs import ExactCodec, UniformCodec
from gradq.errors import ConfigError, SpecError
from gradq.policy import Spec

codec = st.one_of(
    st.builds(ExactCodec, dtype=st.sampled_from(["fp32", "bf16", "fp16", "fp64"])),
    st.builds(
        UniformCodec,
        num_bits=st.integers(2, 8),
        block_size=st.sampled_from(range(64, 1025, 64)),
        rounding=st.sampled_from(["auto", "stochastic", "nearest"]),
        scale_dtype=st.sampled_from(["bf16", "fp16", "fp32"]),
    ),
)


@given(st.builds(Spec, codec, st.none() | codec, st.integers(0, 99)))
def test_text_makes_the_spec_again(spec):
    assert Spec.parse(str(spec)) == spec
    assert hash(Spec.parse(str(spec))) == hash(spec)


@given(codec)
def test_a_codec_is_a_spec(codec):
    assert Spec.parse(codec) == Spec(codec) == Spec.parse(str(codec))


def test_a_spec_is_a_spec():
    spec = Spec.parse("int4")
    assert Spec.parse(spec) is spec


@pytest.mark.parametrize("text", ["none", " none "])
def test_none(text):
    spec = Spec.parse(text)
    assert spec.is_none
    assert str(spec) == "none"
    with pytest.raises(SpecError, match='"none" has no codecs'):
        spec.codecs()


@pytest.mark.parametrize(
    ("text", "phase1", "phase2"),
    [
        ("int4", "int4", "int8"),
        ("int8", "int8", "int8"),
        ("int2(block_size=64,scale_dtype=fp32)", None, "int8(block_size=64,scale_dtype=fp32)"),
        ("int4+int4", "int4", "int4"),
        (" int4(block_size=64) + bf16 ", "int4(block_size=64)", "bf16"),
        ("bf16", "bf16", "bf16"),
        ("fp32", "fp32", "fp32"),
    ],
)
def test_codecs_of_both_phases(text, phase1, phase2):
    spec = Spec.parse(text)
    assert not spec.is_none
    assert [str(codec) for codec in spec.codecs()] == [phase1 or text, phase2]


def test_naming_the_default_of_phase_2_is_another_spec_with_the_same_codecs():
    implied, named = Spec.parse("int4"), Spec.parse("int4+int8")
    assert implied != named
    assert implied.codecs() == named.codecs()
    assert (str(implied), str(named)) == ("int4", "int4+int8")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("int4+int4+int8", r"'int4\+int4\+int8': a spec names one codec, or two as 'phase1\+phase2'"),
        ("int4+", "'' is not a codec spec"),
        ("+int4", "'' is not a codec spec"),
        ("", "'' is not a codec spec"),
        ("none+int8", "no codec is called 'none'"),
        ("int8+none", "no codec is called 'none'"),
        (
            "powersgd",
            "'powersgd': powersgd needs the rank of its approximation, 1 or more, as in 'powersgd:4'",
        ),
        ("powersgd:", "needs the rank"),
        ("powersgd:0", "needs the rank"),
        ("powersgd:-4", "needs the rank"),
        ("powersgd:4.0", "needs the rank"),
        ("powersgd:⁴", "needs the rank"),
        ("int4+powersgd:4", "powersgd is not a codec and cannot carry means; write it first"),
        ("powersgd:4+powersgd:2", "cannot carry means"),
        ("powersgd:4+int4+int8+int8", "a spec names one codec, or two"),
        ("powersgd:4+int9", "no codec is called 'int9'"),
        ("powersgd:4+", "'' is not a codec spec"),
        ("int4+in8", r"did you mean 'int8'\?"),
        (4, "a spec is a string such as 'int4', a codec or a Spec, not int"),
        (None, "not NoneType"),
    ],
)
def test_wrong_specs(spec, message):
    with pytest.raises(SpecError, match=message):
        Spec.parse(spec)


def test_phase_2_alone_is_no_spec():
    with pytest.raises(SpecError, match="needs one for phase 1"):
        Spec(None, ExactCodec())


def test_low_rank():
    spec = Spec.parse(" powersgd:4 ")
    assert spec == Spec(None, low_rank=4)
    assert not spec.is_none
    assert str(spec) == "powersgd:4"
    assert str(Spec.parse("powersgd:04 + int4+ int8")) == "powersgd:4+int4+int8"
    assert [str(codec) for codec in Spec.parse("powersgd:2+int4").codecs()] == ["int4", "int8"]
    with pytest.raises(SpecError, match='"powersgd:4" has no codecs'):
        spec.codecs()


@pytest.mark.parametrize("rank", [-1, 4.0, True, "4"])
def test_low_rank_out_of_range(rank):
    with pytest.raises(ConfigError, match=r"low_rank=.*an integer"):
        Spec(None, low_rank=rank)
