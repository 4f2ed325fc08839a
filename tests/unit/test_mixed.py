"""MixedPolicy: which rule decides, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradq.errors import ConfigError, SpecError
from gradq.policy import FixedPolicy, MixedPolicy, ParameterInfo, Spec, roles


def info(name, *shape, index=0, role="", dtype=torch.float32):
    return ParameterInfo(name=name, shape=shape, dtype=dtype, index=index, role=role)


MODEL = [
    info("wte.weight", 256, 64, index=0, role="embedding"),
    info("wpe.weight", 64, 64, index=1, role="embedding"),
    info("blocks.0.norm.weight", 4096, index=2, role="norm"),
    info("blocks.0.up.weight", 64, 256, index=3, role="matmul"),
    info("blocks.0.up.bias", 256, index=4, role="bias"),
    info("head[0].weight", 64, 256, index=5, role="matmul"),
]
SMALL = {"blocks.0.norm.weight", "blocks.0.up.bias"}


def plan(rules, parameters=MODEL, **options):
    decided = MixedPolicy(rules=rules, **options).plan(parameters)
    assert list(decided) == [p.name for p in parameters]
    return {name: str(entry.phase1).partition("(")[0] for name, entry in decided.items()}


@pytest.mark.parametrize(
    ("rules", "options", "expected"),
    [
        ({"wte*": "int8", "*": "int4"}, {}, ["int8", "int4", "fp32", "int4", "fp32", "int4"]),
        ([("wte*", "int8")], {"default": "int4"}, ["int8", "int4", "fp32", "int4", "fp32", "int4"]),
        ({"role:embedding": "int6", "*": "rot2"}, {}, ["int6", "int6", "fp32", "rot2", "fp32", "rot2"]),
        ({"head[0].weight": "int5"}, {"default": "int3"}, ["int3"] * 2 + ["fp32", "int3", "fp32", "int5"]),
        ([(lambda p: p.numel > 5000, "int4"), ("*", "int8")], {}, ["int4", "int8", "fp32"] + ["int4"] * 0),
        ({"*.up.*": "bf16", "*": "int4"}, {}, ["int4", "int4", "fp32", "bf16", "bf16", "int4"]),
        ({"wte*": "int8"}, {"default": "int4", "exact": "head*"}, ["int8", "int4", "fp32", "int4", "fp32"]),
        ([], {"default": "int4"}, ["int4", "int4", "fp32", "int4", "fp32", "int4"]),
    ],
)
def test_the_first_rule_that_selects_decides(rules, options, expected):
    assert list(plan(rules, **options).values())[: len(expected)] == expected


def test_one_rule_for_all_is_the_fixed_policy():
    for spec in ("int4", "int4+int4", "bf16", "rot2"):
        fixed = FixedPolicy(spec=Spec.parse(spec), feedback="auto").plan(MODEL)
        assert MixedPolicy(rules={"*": spec}).plan(MODEL) == fixed


def test_what_no_rule_selects_must_be_exact_anyway():
    assert plan({"w*": "int4", "*.up.weight": "int4", "role:matmul": "int4"})["blocks.0.up.bias"] == "fp32"
    with pytest.raises(ConfigError, match=r"no rule selects the parameter 'head\[0\].weight'.*\(64, 256\)"):
        plan({"w*": "int4", "blocks*": "int4"})
    with pytest.raises(ConfigError, match=r"no rule selects the parameter 'wte.weight'"):
        plan({"head*": "bf16"})  # a first rule that casts makes nothing else exact


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"wteX.weight": "int8", "*": "int4"}, ["'wteX.weight'", "close: wte.weight"]),
        ({"zzz*": "int8", "*": "int4"}, ["'zzz*'", "the first are: wte.weight"]),
        ({"role:other": "int8", "*": "int4"}, ["role:other", "there are: bias, embedding, matmul, norm"]),
        ([(lambda p: False, "int8"), ("*", "int4")], ["<lambda>", "selects no parameter"]),
        ({"*": "int4", "wte*": "int8"}, ["'wte*' never applies", "'wte.weight' goes to '*'", "before"]),
        ({"w*": "int4", "wte*": "int8", "*": "int4"}, ["'wte*' never applies", "goes to 'w*'"]),
    ],
)
def test_a_rule_without_effect_is_an_error(rules, words):
    with pytest.raises(ConfigError) as caught:
        plan(rules)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("rules", "error", "words"),
    [
        ([], ConfigError, "needs rules"),
        ({"role:embeding": "int4"}, ConfigError, "the roles are embedding, norm"),
        ([(3, "int4")], ConfigError, "not int"),
        ({"*": "none"}, ConfigError, 'say "fp32"'),
        ({"*": "int9"}, SpecError, "int9"),
    ],
)
def test_what_cannot_be_a_rule(rules, error, words):
    with pytest.raises(error, match=words):
        MixedPolicy(rules=rules)


def test_options_reach_every_rule():
    decided = MixedPolicy(rules={"wte*": "int8", "*": "int4"}, feedback=True).plan(MODEL)
    assert decided["wte.weight"].feedback1
    assert decided["wpe.weight"].feedback1
    with pytest.raises(ConfigError, match="exact='wieght' matches no parameter"):
        MixedPolicy(rules={"*": "int4"}, exact="wieght").plan(MODEL)


def test_roles_of_a_model():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(4))

    model = nn.ModuleDict(
        {
            "tokens": nn.Embedding(8, 4),
            "norm": nn.LayerNorm(4),
            "batch": nn.BatchNorm1d(4),
            "conv": nn.Conv1d(4, 4, 3),
            "attention": nn.MultiheadAttention(4, 2),
            "own": Own(),
            "head": nn.Linear(4, 8),
        }
    )
    model["head"].weight = model["tokens"].weight  # tied: the first name counts
    found = roles(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert found["tokens.weight"] == "embedding"
    assert {found[f"{n}.{p}"] for n in ("norm", "batch") for p in ("weight", "bias")} == {"norm"}
    assert (found["conv.weight"], found["conv.bias"], found["head.bias"]) == ("matmul", "bias", "bias")
    assert (found["attention.in_proj_weight"], found["attention.in_proj_bias"]) == ("matmul", "bias")
    assert found["own.scale"] == "other"
