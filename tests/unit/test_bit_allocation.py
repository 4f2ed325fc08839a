"""BitAllocation without ranks: budgets, sampling, learning, and what it refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from gradq.codecs import from_spec
from gradq.errors import CheckpointError, ConfigError, SpecError
from gradq.metrics import Event
from gradq.policy import AdaptivePolicy, BitAllocation, FixedPolicy, ParameterInfo, Spec


def info(name, *shape, index=0, **options):
    return ParameterInfo(name=name, shape=shape, dtype=torch.float32, index=index, **options)


MODEL = [info("a", 64, 64), info("b", 64, 64, index=1), info("c", 4096, index=2), info("d", 100, 64, index=3)]
INTS = [f"int{bits}" for bits in range(2, 9)]


def see(policy, energies, step=0):
    """What a rank measures where errors fall as 4**-bits."""
    for name, energy in energies.items():
        policy.observe(Event("gradient_energy", energy, step, 0, 0, name))
        for spec in policy.candidates(policy_sample(policy), name):
            policy.observe(Event("candidate_error", energy * 4.0 ** -int(spec[3]), step, 0, 0, name, spec))


def policy_sample(policy):
    return next(step for step in range(1000) if policy.candidates(step, "a"))


def make(**options):
    return BitAllocation(**{"weighting": "energy", "every": 10} | options)


def nbytes(policy):
    return sum(from_spec(policy.allocation[p.name]).nbytes(p.numel) for p in MODEL if p.name != "c")


def test_it_starts_as_its_reference():
    for spec in ("int4", "rot2", "int4(block_size=64)"):
        policy = BitAllocation(bytes_of=spec)
        assert isinstance(policy, AdaptivePolicy)
        assert policy.plan(MODEL) == FixedPolicy(spec=Spec.parse(spec)).plan(MODEL)
        assert policy.allocation == dict.fromkeys("abd", spec)


@pytest.mark.parametrize(("bits", "first"), [(2.1, "int2"), (4.0, "int3"), (4.0625, "int4"), (32, "int8")])
def test_average_bits_start_with_the_largest_codec_that_fits(bits, first):
    policy = BitAllocation(average_bits=bits)
    policy.plan(MODEL)
    assert set(policy.allocation.values()) == {first}


def test_average_bits_below_every_candidate():
    with pytest.raises(
        ConfigError, match=r"average_bits=2.0 cannot be met: the smallest .* takes 2.0625 bits"
    ):
        BitAllocation(average_bits=2.0).plan(MODEL)


@pytest.mark.parametrize(("every", "samples"), [(1, 1), (10, 1), (10, 2), (10, 3), (7, 7), (100, 2)])
def test_sampled_steps_are_spread_and_end_with_the_last(every, samples):
    policy = BitAllocation(bytes_of="int4", every=every, samples=samples)
    policy.plan(MODEL)
    for period in range(3):
        steps = [step for step in range(every) if policy.candidates(period * every + step, "a")]
        assert len(steps) == samples
        assert steps[-1] == every - 1
        assert all(b - a == every // samples for a, b in itertools.pairwise(steps))
    assert not policy.candidates(every - 1, "c"), "what travels exact has no candidates"
    assert [step for step in range(3 * every) if policy.is_due(step)] == [every, 2 * every]


def test_what_is_measured_moves_the_bits_and_keeps_the_bytes():
    policy = make(bytes_of="int5")
    policy.plan(MODEL)
    budget = nbytes(policy)
    see(policy, {"a": 1.0, "b": 256.0, "d": 1.0})
    assert len(policy.measured()) == 3 * (1 + len(INTS))
    other = [0.0] * len(policy.measured())
    policy.learn([policy.measured(), other])
    plan = policy.plan(MODEL)
    assert int(policy.allocation["b"][3]) - int(policy.allocation["a"][3]) in (3, 4, 5)
    assert str(plan["b"].phase1) == f"{policy.allocation['b']}(rounding=stochastic)"
    assert str(plan["c"]) == "fp32+fp32"
    assert nbytes(policy) <= budget
    assert not any(policy.measured()), "the next plan starts from nothing"


def test_relative_errors_do_not_see_how_loud_a_parameter_is():
    """As Adam does not. At equal NMSE all have equal bits; one that is harder to quantize has more."""
    for harder, spec in ((1.0, "int5"), (400.0, "int7")):
        policy = make(bytes_of="int5", weighting="relative")
        policy.plan(MODEL)
        see(policy, {"a": 1.0, "b": 256.0, "d": 1.0})
        for step in range(2):
            for codec in policy.candidates(9, "a"):
                policy.observe(
                    Event("candidate_error", (harder - 1) / 2 * 4.0 ** -int(codec[3]), step, 0, 0, "a", codec)
                )
        policy.learn([policy.measured()])
        assert policy.allocation["b"] in (("int5",) if harder == 1.0 else ("int3", "int4"))
        assert policy.allocation["a"] >= spec


def test_error_of_keeps_the_error_with_fewer_bytes():
    policy = make(error_of="int4")
    policy.plan(MODEL)
    budget = nbytes(policy)
    energies = {"a": 1.0, "b": 4096.0, "d": 1.0}
    see(policy, energies)
    policy.learn([policy.measured()])
    assert nbytes(policy) < 0.8 * budget
    error = sum(energies[n] * 4.0 ** -int(spec[3]) for n, spec in policy.allocation.items())
    assert error <= 4.0**-4 * sum(energies.values())


def test_all_ranks_measurements_count_and_their_sum_does_not_depend_on_who_adds():
    plans = []
    for _ in range(2):
        policy = make(bytes_of="int4")
        policy.plan(MODEL)
        see(policy, {"a": 1.0, "b": 1.0, "d": 1.0})
        quiet = policy.measured()
        loud = [1e4 * v if i < 8 else v for i, v in enumerate(quiet)]  # the first 8 are of "a"
        policy.learn([quiet, loud])
        plans.append(policy.allocation)
    assert plans[0] == plans[1]
    assert int(plans[0]["a"][3]) > int(plans[0]["b"][3])


def test_a_parameter_without_a_gradient_keeps_average_bits():
    policy = make(bytes_of="int4")
    policy.plan(MODEL)
    see(policy, {"a": 1.0, "d": 1.0})
    policy.learn([policy.measured()])
    assert policy.allocation["b"] in ("int3", "int4", "int5")


def test_without_measurements_the_plan_stays():
    policy = make(bytes_of="int4")
    before = policy.plan(MODEL)
    policy.learn([policy.measured()] * 3)
    assert policy.plan(MODEL) == before


def test_other_events_change_nothing():
    policy = BitAllocation(bytes_of="int4")
    policy.plan(MODEL)
    policy.observe(Event("error_energy", 3.0, 0, 0, 1, "a"))
    assert not any(policy.measured())


def test_state_goes_on_where_it_was():
    first, second = (make(bytes_of="int4") for _ in range(2))
    for policy in (first, second):
        policy.plan(MODEL)
    see(first, {"a": 1.0, "b": 999.0, "d": 3.0})
    first.learn([first.measured()])
    see(first, {"a": 7.0, "b": 1.0, "d": 0.2})
    second.load_state_dict(first.state_dict(), first.measured())
    assert second.allocation == first.allocation
    assert second.plan(MODEL) == first.plan(MODEL)
    for policy in (first, second):
        policy.learn([policy.measured()])
    assert second.allocation == first.allocation


@pytest.mark.parametrize("options", [{"candidates": ["int4", "int8"]}, {"exact": "d"}])
def test_state_of_other_settings_is_refused(options):
    first, second = BitAllocation(bytes_of="int4"), BitAllocation(bytes_of="int4", **options)
    for policy in (first, second):
        policy.plan(MODEL)
    with pytest.raises(CheckpointError, match="another model or of other candidates"):
        second.load_state_dict(first.state_dict(), first.measured())


def test_one_object_serves_one_model():
    policy = BitAllocation(bytes_of="int4")
    policy.plan(MODEL)
    with pytest.raises(ConfigError, match="another model"):
        policy.plan(MODEL[:2])


def test_the_label_has_every_setting():
    labels = {
        BitAllocation(**{"bytes_of": "int4"} | options).label
        for options in (
            {},
            {"every": 50},
            {"samples": 1},
            {"weighting": "relative"},
            {"candidates": ["int4", "int8"]},
            {"bytes_of": "int3"},
        )
    } | {BitAllocation(error_of="int4").label, BitAllocation(average_bits=4.5).label}
    assert len(labels) == 8
    assert "0x" not in "".join(labels)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, ConfigError, "takes one of .* not none"),
        ({"bytes_of": "int4", "average_bits": 4}, ConfigError, "not average_bits and bytes_of"),
        ({"average_bits": 0}, ConfigError, "average_bits=0: it must be positive"),
        ({"average_bits": math.nan}, ConfigError, "must be positive"),
        ({"bytes_of": "int4", "every": 0}, ConfigError, "every=0"),
        ({"bytes_of": "int4", "every": 2.5}, ConfigError, "every=2.5"),
        ({"bytes_of": "int4", "every": 4, "samples": 5}, ConfigError, "from 1 to every=4"),
        ({"bytes_of": "int4", "candidates": ["int4"]}, ConfigError, "at least two"),
        ({"bytes_of": "int4", "weighting": "numel"}, ConfigError, "weighting='numel'"),
        ({"bytes_of": "int4", "candidates": "int4"}, ConfigError, "at least two"),
        ({"bytes_of": "int4+int4"}, ConfigError, "name one such as 'int4'"),
        ({"bytes_of": "none"}, ConfigError, "chooses codecs"),
        ({"bytes_of": "int9"}, SpecError, "int9"),
        ({"bytes_of": "int4", "candidates": ["int4", "int9"]}, SpecError, "int9"),
        ({"bytes_of": "int4", "feedback": "on"}, ConfigError, "feedback='on'"),
    ],
)
def test_what_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        BitAllocation(**options)
