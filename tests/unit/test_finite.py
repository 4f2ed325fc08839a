"""Which steps may enter the residuals: finite ones, and no outliers."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from gradq.sync.finite import LIMIT, WINDOW, StepCheck

CPU = torch.device("cpu")


def judge(check, *parts, loss_scale=1.0, narrow=torch.float32):
    check.begin()
    for part in parts:
        check.add(torch.as_tensor(part), narrow)
    return check.verdict(loss_scale, 7)


def steps(check, norms):
    return [judge(check, torch.tensor([norm])) for norm in norms]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_with_nan_or_inf_in_any_part_is_bad(dtype, bad):
    check = StepCheck(CPU)
    good = torch.ones(9, dtype=dtype)
    assert judge(check, good, good) is True
    assert judge(check, good, torch.tensor([1.0, bad], dtype=dtype)) is False
    assert judge(check, torch.tensor([bad], dtype=dtype), good) is False
    assert judge(check, good) is True


def test_what_overflows_the_bucket_is_not_finite():
    assert judge(StepCheck(CPU), torch.tensor([65504.0, 3.0]), narrow=torch.float16) is True
    assert judge(StepCheck(CPU), torch.tensor([65600.0, 3.0]), narrow=torch.float16) is False
    assert judge(StepCheck(CPU), torch.tensor([65600.0, 3.0])) is True
    assert judge(StepCheck(CPU), torch.full((1000,), 60000.0), narrow=torch.float16) is True


def test_a_large_finite_gradient_is_finite_though_its_square_is_not():
    check = StepCheck(CPU)
    assert steps(check, [1e30, 2e30, 1e33]) == [True, True, False]


def test_the_first_step_has_nothing_to_compare_with_and_zeros_say_nothing():
    assert steps(StepCheck(CPU), [1e9]) == [True]
    assert steps(StepCheck(CPU), [0.0, 0.0, 1e9, 0.0, 1.0, 1e9]) == [True] * 6


def test_an_outlier_is_one_beyond_the_limit_times_the_largest_of_the_window(caplog):
    check = StepCheck(CPU)
    assert steps(check, [1.0, 3.0, 1.0]) == [True] * 3
    with caplog.at_level(logging.WARNING, "gradq"):
        assert steps(check, [2.9 * LIMIT, 3.1 * LIMIT]) == [
            True,
            True,
        ]  # the first is the measure of the second
        assert not caplog.records
        assert steps(check, [4 * LIMIT**2]) == [False]
    assert "step 7: the norm of the mean gradient" in caplog.text


def test_one_rank_speaks_for_all(caplog):
    check = StepCheck(CPU, logs=False)
    with caplog.at_level(logging.WARNING, "gradq"):
        assert steps(check, [1.0, 1.0, 1e9]) == [True, True, False]
    assert not caplog.records


def test_every_spike_is_caught_however_many_there_are():
    check = StepCheck(CPU)
    for _ in range(5):
        assert steps(check, [1.0, 1.2, 1e6, 0.9]) == [True, True, False, True]


def test_a_new_level_is_accepted_after_few_steps():
    check = StepCheck(CPU)
    assert all(steps(check, [1e-6] * WINDOW))
    verdicts = steps(check, [1.0] * 10)
    assert verdicts == [False] * verdicts.index(True) + [True] * (10 - verdicts.index(True))
    assert verdicts.index(True) <= 4


def test_old_steps_are_forgotten():
    check = StepCheck(CPU)
    assert steps(check, [1e6]) == [True]
    assert all(steps(check, [1.0] * (WINDOW - 1)))
    assert steps(check, [1e6]) == [True]
    check = StepCheck(CPU)
    assert all(steps(check, [1e6] + [1.0] * WINDOW))
    assert steps(check, [1e6]) == [False]


def test_norms_are_unscaled_and_a_step_is_the_sum_of_its_parts():
    check = StepCheck(CPU)
    assert judge(check, torch.tensor([3.0 * 1024]), torch.tensor([4.0 * 1024]), loss_scale=1024.0) is True
    assert check.state[-2] == pytest.approx(5.0)
    assert judge(check, torch.tensor([5.0 * 65536]), loss_scale=65536.0) is True


def test_a_step_that_is_taken_back_leaves_no_trace():
    check = StepCheck(CPU)
    steps(check, [1.0, 1.0])
    before = check.state.clone()
    steps(check, [50.0])
    check.revert()
    check.revert()
    assert torch.equal(check.state, before)
    assert steps(check, [100.0]) == [False]


def test_the_log_is_not_filled_by_losses_that_take_turns(caplog):
    check = StepCheck(CPU)
    with caplog.at_level(logging.WARNING, "gradq"):
        verdicts = steps(check, [1.0, 200.0] * 20)
    assert verdicts == [True, False] * 20
    assert [record.getMessage().count("take turns") for record in caplog.records] == [0, 1, 1, 1, 1]


def test_a_resumed_check_knows_what_the_saved_one_knew():
    check, resumed = StepCheck(CPU), StepCheck(CPU)
    steps(check, [1.0, 1e6])
    resumed.start(check.state)
    assert steps(resumed, [100.0, 1e7]) == steps(check, [100.0, 1e7]) == [True, False]
    resumed.start(None)
    assert steps(resumed, [1e7]) == [True]
