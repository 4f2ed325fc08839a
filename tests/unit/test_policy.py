"""FixedPolicy: which codec for which parameter, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from gradq.codecs import ExactCodec, from_spec
from gradq.errors import ConfigError
from gradq.policy import Assignment, FixedPolicy, ParameterInfo, Spec, small_or_1d


def info(name, *shape, dtype=torch.float32, index=0):
    return ParameterInfo(name=name, shape=shape, dtype=dtype, index=index)


MODEL = [
    info("embed.weight", 100, 64, index=0),
    info("blocks.0.qkv.weight", 64, 192, index=1),
    info("blocks.0.qkv.bias", 4096, index=2),  # large, but one-dimensional
    info("blocks.0.gate", 31, 33, index=3),  # 1023 elements
    info("blocks.0.mix", 32, 32, index=4),  # 1024
    info("blocks.1.qkv.weight", 64, 192, index=5),
    info("scale", index=6),  # a scalar
    info("head.weight", 100, 64, index=7),
]
SMALL = {"blocks.0.qkv.bias", "blocks.0.gate", "scale"}


def plan(spec="int4", parameters=MODEL, **options):
    return FixedPolicy(spec=Spec.parse(spec), **options).plan(parameters)


def exact(decided):
    return {name for name, entry in decided.items() if isinstance(entry.phase1, ExactCodec)}


def test_parameter_info_counts():
    assert (info("a", 3, 4, 5).numel, info("a", 3, 4, 5).ndim) == (60, 3)
    assert (info("a").numel, info("a").ndim) == (1, 0)
    assert info("a", 3, 0).numel == 0


def test_default_rule_keeps_small_and_1d_exact():
    decided = plan()
    assert list(decided) == [parameter.name for parameter in MODEL]
    assert exact(decided) == SMALL == {p.name for p in MODEL if small_or_1d(p)}


def test_exact_parameters_travel_in_their_own_dtype_without_feedback():
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
    decided = plan(parameters=[info(name, 5, dtype=dtype) for dtype, name in names.items()])
    for name, entry in decided.items():
        codec = ExactCodec(dtype=name)
        assert entry == Assignment(phase1=codec, phase2=codec, feedback1=False, feedback2=False)


def test_compressed_parameters_of_every_narrow_dtype_use_the_spec():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        entry = plan("int8", [info("w", 64, 64, dtype=dtype)])["w"]
        assert str(entry) == "int8(rounding=stochastic)+int8(rounding=stochastic)"


@pytest.mark.parametrize("spec", ["int4", "int8", "bf16", "fp32"])
def test_fp64_always_travels_exact(spec):
    entry = plan(spec, [info("w", 64, 64, dtype=torch.float64)])["w"]
    assert str(entry) == "fp64+fp64"


@pytest.mark.parametrize("spec", ["bf16", "fp16", "fp32"])
def test_a_spec_that_is_exact_itself_carries_everything(spec):
    assert {str(entry) for entry in plan(spec).values()} == {f"{spec}+{spec}"}


@pytest.mark.parametrize(
    ("rule", "more"),
    [
        ("head.weight", {"head.weight"}),
        (("head.weight", "embed.*"), {"head.weight", "embed.weight"}),
        (["*.qkv.weight"], {"blocks.0.qkv.weight", "blocks.1.qkv.weight"}),
        ("blocks.[1-9].*", {"blocks.1.qkv.weight"}),
        ((), set()),
        ("*", {parameter.name for parameter in MODEL}),
    ],
)
def test_names_and_patterns_add_to_the_default_rule(rule, more):
    assert exact(plan(exact=rule)) == SMALL | more


def test_a_predicate_replaces_the_default_rule():
    asked = []

    def rule(parameter):
        asked.append(parameter)
        return parameter.name == "head.weight"

    assert exact(plan(exact=rule)) == {"head.weight"}
    assert asked == MODEL


def test_a_pattern_without_a_match_is_an_error_with_close_names():
    with pytest.raises(ConfigError, match=r"exact='heads.weight' matches no parameter; close: head.weight"):
        plan(exact=["embed.*", "heads.weight"])
    with pytest.raises(ConfigError, match=r"exact='zzz\*' matches no parameter; the first are: embed.weight"):
        plan(exact="zzz*")
    with pytest.raises(ConfigError, match="matches no parameter"):
        plan(exact="HEAD.weight")


@pytest.mark.parametrize(
    ("spec", "feedback", "phase1", "phase2"),
    [
        ("int8", "auto", "int8(rounding=stochastic)", "int8(rounding=stochastic)"),
        ("int4", "auto", "int4(rounding=nearest) with feedback", "int8(rounding=stochastic)"),
        (
            "int4+int4",
            "auto",
            "int4(rounding=nearest) with feedback",
            "int4(rounding=nearest) with feedback",
        ),
        ("int5", "auto", "int5(rounding=stochastic)", "int8(rounding=stochastic)"),
        # its error may exceed the gradient: feedback would diverge, so "auto" leaves it off
        ("int4(rounding=stochastic)", "auto", "int4(rounding=stochastic)", "int8(rounding=stochastic)"),
        ("int4", False, "int4(rounding=stochastic)", "int8(rounding=stochastic)"),
        ("int4", True, "int4(rounding=nearest) with feedback", "int8(rounding=nearest) with feedback"),
        ("int8", True, "int8(rounding=nearest) with feedback", "int8(rounding=nearest) with feedback"),
        (
            "int8(rounding=stochastic)",
            True,
            "int8(rounding=stochastic) with feedback",
            "int8(rounding=stochastic) with feedback",
        ),
        ("int4+bf16", True, "int4(rounding=nearest) with feedback", "bf16"),
        ("bf16", True, "bf16", "bf16"),
    ],
)
def test_feedback(spec, feedback, phase1, phase2):
    entry = plan(spec, [info("w", 64, 64)], feedback=feedback)["w"]
    assert str(entry) == f"{phase1}+{phase2}"
    assert (entry.feedback1, entry.feedback2) == ("feedback" in phase1, "feedback" in phase2)


@pytest.mark.parametrize(
    "spec", ["int4(rounding=stochastic)", "int2(rounding=stochastic)", "int8+int3(rounding=stochastic)"]
)
def test_feedback_of_a_codec_that_does_not_contract_is_an_error(spec):
    with pytest.raises(ConfigError, match=r"feedback=True with int.*rounding=stochastic.*diverges; use"):
        plan(spec, feedback=True)


def test_feedback_of_stochastic_rounding_with_small_blocks_is_allowed():
    entry = plan("int4(rounding=stochastic,block_size=64)", [info("w", 64, 64)], feedback=True)["w"]
    assert entry.feedback1


@pytest.mark.parametrize("feedback", ["on", "yes", None, 2])
def test_feedback_out_of_range(feedback):
    with pytest.raises(ConfigError, match="choose 'auto', True or False"):
        FixedPolicy(spec=Spec.parse("int4"), feedback=feedback)


def test_the_plan_does_not_depend_on_the_order_of_parameters():
    forwards, backwards = plan(exact="head.*"), plan(exact="head.*", parameters=MODEL[::-1])
    assert forwards == backwards
    assert plan(parameters=[]) == {}


def test_a_quantized_phase_2_leaves_small_parameters_exact() -> None:
    plan = FixedPolicy(spec=Spec.parse("bf16+int8")).plan(
        [
            ParameterInfo(name="w", shape=(64, 64), dtype=torch.float32, index=0),
            ParameterInfo(name="b", shape=(64,), dtype=torch.float32, index=1),
        ]
    )
    assert str(plan["w"]) == "bf16+int8(rounding=stochastic)"
    assert str(plan["b"]) == "fp32+fp32"


def test_a_cast_sends_all_but_what_is_named() -> None:
    infos = [
        ParameterInfo(name=name, shape=(64, 64), dtype=torch.float32, index=i) for i, name in enumerate("wv")
    ] + [ParameterInfo(name="b", shape=(64,), dtype=torch.float32, index=2)]
    plan = FixedPolicy(spec=Spec.parse("bf16"), exact="w").plan(infos)
    assert [str(plan[name].phase1) for name in "wvb"] == ["fp32", "bf16", "bf16"]


def test_feedback_for_a_cast_is_refused() -> None:
    with pytest.raises(ConfigError, match="codec bf16 has no error feedback"):
        Assignment(phase1=from_spec("bf16"), phase2=from_spec("fp32"), feedback1=True)


# --- collectives ---------------------------------------------------------------------------------------


def test_an_assignment_may_name_its_collective_and_says_so():
    codec = from_spec("int8")
    assert str(Assignment(phase1=codec, phase2=codec)) == "int8+int8"
    assert str(Assignment(phase1=codec, phase2=codec, collective="direct")) == "int8+int8 by direct"
    with pytest.raises(ConfigError, match=r"Assignment\(collective='ring'\): choose from auto, direct, two_"):
        Assignment(phase1=codec, phase2=codec, collective="ring")


FP32, INT8, TOPK = from_spec("fp32"), from_spec("int8"), from_spec("topk")
LOW_RANK = {"phase1": FP32, "phase2": FP32, "feedback1": True, "collective": "low_rank", "low_rank": 4}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"phase1": TOPK, "phase2": TOPK}, "topk needs error feedback.*never be sent"),
        ({"phase1": INT8, "phase2": TOPK}, "topk needs error feedback"),
        (
            {"phase1": INT8, "phase2": INT8, "collective": "sparse"},
            "sparse codecs such as topk, not for int8",
        ),
        ({"phase1": FP32, "phase2": FP32, "low_rank": 4}, "low_rank=4.*at least 1"),
        (LOW_RANK | {"low_rank": 0}, "low_rank=0.*at least 1"),
        (LOW_RANK | {"low_rank": -1}, "low_rank=-1.*at least 1"),
        (LOW_RANK | {"feedback1": False}, "needs feedback1=True.*does not converge"),
        (LOW_RANK | {"feedback2": True}, "feedback2=False"),
        (LOW_RANK | {"phase1": INT8}, "factors in fp32, not in int8"),
        (LOW_RANK | {"phase2": from_spec("bf16")}, "factors in fp32, not in bf16"),
    ],
)
def test_pairs_that_cannot_work(fields, message):
    with pytest.raises(ConfigError, match=message):
        Assignment(**fields)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (info("blocks.0.norm", 4096), r"'blocks.0.norm' of shape \[4096\]: it needs a matrix"),
        (info("scale"), r"'scale' of shape \[\]"),
        (info("none", 0, 3), r"'none' of shape \[0, 3\]"),
        (info("w", 64, 64, dtype=torch.float64), "'w' is fp64; send it exact"),
    ],
)
def test_low_rank_is_for_matrices(parameter, message):
    with pytest.raises(ConfigError, match=message):
        Assignment(**LOW_RANK).check(parameter)


# --- low rank ------------------------------------------------------------------------------------------

MATRICES = [
    info("embed", 5000, 64),
    info("conv", 32, 16, 3, 3),
    info("bias", 4096),
    info("small", 31, 33),
    info("narrow", 3, 1000),
    info("half", 128, 128, dtype=torch.bfloat16),
    info("double", 128, 128, dtype=torch.float64),
]


def test_low_rank_takes_the_matrices_where_it_saves_and_leaves_the_rest_exact():
    decided = {name: str(entry) for name, entry in plan("powersgd:4", MATRICES).items()}
    assert decided == {
        "embed": "powersgd:4 with feedback",
        "conv": "powersgd:4 with feedback",
        "bias": "fp32+fp32",
        "small": "fp32+fp32",
        "narrow": "powersgd:4 with feedback",  # rank 3: 6 kB on average against 12
        "half": "powersgd:4 with feedback",
        "double": "fp64+fp64",
    }


def test_the_rest_may_have_a_codec_of_its_own():
    decided = {name: str(entry) for name, entry in plan("powersgd:4+int8", MATRICES).items()}
    int8 = "int8(rounding=stochastic)+int8(rounding=stochastic)"
    assert decided["embed"] == "powersgd:4 with feedback"
    assert decided["narrow"] == int8  # 3 kB
    assert decided["bias"] == "fp32+fp32"
    assert {n: str(e) for n, e in plan("powersgd:4+bf16", MATRICES).items()}["bias"] == "bf16+bf16"
    assert str(plan("powersgd:64", MATRICES)["half"]) == "bf16+bf16", "rank 64 of 128 in fp32 saves nothing"


def test_what_is_exact_is_no_low_rank():
    assert str(plan("powersgd:4", MATRICES, exact="conv")["conv"]) == "fp32+fp32"
    assert str(plan("powersgd:4+int8", MATRICES, exact="conv")["conv"]) == "fp32+fp32"
    decided = plan("powersgd:4", MATRICES, exact=lambda parameter: parameter.name != "small")
    assert {name for name, entry in decided.items() if entry.low_rank} == {"small"}


def test_low_rank_without_feedback_is_an_error():
    with pytest.raises(ConfigError, match=r"feedback=False with powersgd:4.*not converge"):
        FixedPolicy(spec=Spec.parse("powersgd:4"), feedback=False)


@pytest.mark.parametrize("matrix", MATRICES[:2])
def test_payload_bytes_are_the_mean_of_both_factors(matrix):
    rows, columns = matrix.matrix
    assert rows * columns == matrix.numel
    entry = plan("powersgd:4", [matrix])[matrix.name]
    assert entry.payload_bytes(matrix) == 4 * 4 * (rows + columns) / 2
