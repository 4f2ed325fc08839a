"""Options: one list of what can be chosen, checked where it is made; keyword arguments are its fields."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import typing

import pytest
import torch

import gradq
from gradq.options import OptionFields, Options

FIELDS = {field.name: field for field in dataclasses.fields(Options)}


def test_keyword_arguments_are_the_fields():
    """The TypedDict, by which editors and mypy know the keyword arguments, says what the dataclass says."""
    assert typing.get_type_hints(OptionFields) == typing.get_type_hints(Options)
    assert list(OptionFields.__annotations__) == list(FIELDS)
    assert not OptionFields.__required_keys__


@pytest.mark.parametrize("call", [gradq.compress, gradq.HookState, gradq.LocalSGD, gradq.DiLoCo])
def test_every_call_takes_options_and_its_fields(call):
    parameters = inspect.signature(call).parameters
    assert parameters["options"].default is None
    assert "OptionFields" in str(parameters["overrides"].annotation)
    assert parameters["overrides"].kind is inspect.Parameter.VAR_KEYWORD
    own = {name for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert not own & FIELDS.keys()


def test_every_field_is_documented_once():
    lines = [line.strip().partition(":")[0] for line in (Options.__doc__ or "").splitlines()]
    assert [line for line in lines if line in FIELDS] == list(FIELDS)


def test_repr_shows_what_differs():
    assert repr(Options()) == "Options()"
    assert repr(Options(timeout=5, seed=3)) == "Options(seed=3, timeout=5)"
    assert repr(Options(seed=torch.tensor(3), exact=("a",))) == "Options(exact=('a',), seed=3)"


def test_patterns_are_kept_however_they_are_given():
    for exact in (["a", "b*"], ("a", "b*"), (name for name in ("a", "b*"))):
        options = Options(exact=exact)
        assert options.exact == ("a", "b*")
        assert hash(options) == hash(Options(exact=("a", "b*")))
    assert Options(exact="a").exact == ("a",)


def test_it_stays_as_it_is():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().seed = 1
    with pytest.raises(TypeError):
        Options("auto")


@pytest.mark.parametrize(
    "wrong",
    [
        {"feedback": "on"},
        {"feedback": 1.5},
        {"exact": 3},
        {"exact": None},
        {"seed": "x"},
        {"seed": 1 << 65},
        {"collective": "ring"},
        {"collective": 3},
        {"residual_dtype": "fp8"},
        {"residual_dtype": []},
        {"grad_scaler": 256.0},
        {"timeout": -1},
        {"timeout": math.nan},
        {"replicate_group": 5},
    ],
    ids=str,
)
def test_a_wrong_value_is_named_where_it_is_given(wrong):
    (name,) = wrong
    with pytest.raises(gradq.errors.ConfigError, match=f"{name}="):
        Options(**wrong)


@pytest.mark.parametrize(
    ("trainer", "given", "words"),
    [
        ("DDP", {"gather_spec": "int8"}, "gather_spec= are for FSDP2 models"),
        ("DDP", {"shard_spec": gradq.Spec.parse("int8")}, "are for FSDP2 models"),
        ("FSDP2", {"local_world_size": 2}, "FSDP2 knows its mesh"),
        ("local steps", {"local_world_size": 2}, "is for DistributedDataParallel"),
        ("DDP", {"fedback": True}, "fedback= is not an option; did you mean feedback="),
        ("DDP", {"xyz": True}, "xyz= is not an option; there are: feedback, exact, seed"),
    ],
)
def test_what_a_trainer_does_not_have_is_refused(trainer, given, words):
    with pytest.raises(gradq.errors.ConfigError, match=words):
        Options.of(trainer, None, given)


def test_keyword_arguments_replace_fields():
    base = Options(seed=3, feedback=True)
    assert Options.of("DDP", base, {"seed": 4}) == Options(seed=4, feedback=True)
    assert Options.of("DDP", base, {"gather_spec": "none"}) == base, "a default is no choice"
    with pytest.raises(gradq.errors.ConfigError, match=r"options=\{'seed': 3\}: it must be a gradq.Options"):
        Options.of("DDP", {"seed": 3}, {})


@pytest.mark.parametrize("trainer", ["DDP", "FSDP2", "local steps"])
def test_the_refusal_names_all_that_a_trainer_does_not_have(trainer):
    missing = [
        name for name, field in FIELDS.items() if trainer not in field.metadata.get("trainers", trainer)
    ]
    with pytest.raises(gradq.errors.ConfigError) as caught:
        Options.of(trainer, None, {missing[-1]: 5 if missing[-1] == "local_world_size" else "int8"})
    assert re.findall(r"\b(\w+)=", str(caught.value)) == missing
