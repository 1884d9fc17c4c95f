"""Schedules: bounds, corner points, and shape."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagekiln.errors import RecipeError
from imagekiln.optim.schedules import SCHEDULES, multiplier

shares = st.floats(0, 1)


@given(st.sampled_from(SCHEDULES), shares, shares)
def test_the_multiplier_stays_between_0_and_1(schedule, fraction, warmup_fraction):
    assert 0 <= multiplier(schedule, fraction, warmup_fraction) <= 1


@given(st.sampled_from(SCHEDULES), shares, shares, st.floats(0.01, 0.9))
def test_it_rises_during_warm_up_and_never_after(schedule, one, other, warmup_fraction):
    early, late = sorted((one, other))
    before, after = (multiplier(schedule, fraction, warmup_fraction) for fraction in (early, late))
    if late <= warmup_fraction:
        assert before <= after
    elif early >= warmup_fraction:
        assert before >= after - 1e-12


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("constant", [0, 0.5, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.5, 0]),
        ("cosine", [0, 0.5, 1, 0.5, 0]),
    ],
)
def test_corner_points(schedule, values):
    assert [multiplier(schedule, f, 0.2) for f in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx(values)


def test_cosine_is_above_the_line_first_and_below_it_later():
    assert multiplier("cosine", 0.25) > multiplier("linear", 0.25)
    assert multiplier("cosine", 0.75) < multiplier("linear", 0.75)


def test_without_warm_up_the_first_step_has_the_peak():
    assert all(multiplier(schedule, 0.0) == 1 for schedule in SCHEDULES)


def test_an_unknown_schedule_is_named_with_the_nearest_known_one():
    with pytest.raises(RecipeError, match="Did you mean 'cosine'"):
        multiplier("cosin", 0.5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_may_end_above_zero(schedule):
    ends = [multiplier(schedule, fraction, 0.1, end_ratio=0.25) for fraction in (0.05, 0.1, 1.0)]
    assert ends == pytest.approx([0.5, 1.0, 0.25])
    middle = multiplier(schedule, 0.55, 0.1, end_ratio=0.25)
    assert middle == pytest.approx(0.25 + 0.75 * multiplier(schedule, 0.55, 0.1)) == pytest.approx(0.625)
