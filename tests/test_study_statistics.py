from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tune_easytrain.study_statistics import Difference, difference, interval, is_within, trend

stats = pytest.importorskip("scipy.stats")

VALUES = st.lists(st.floats(-100, 100).map(lambda value: round(value, 3)), min_size=2, max_size=8)


@given(VALUES, VALUES)
def test_a_difference_is_welchs(values: list[float], others: list[float]) -> None:
    assume(len(set(values)) > 1 and len(set(others)) > 1)
    expected = stats.ttest_ind(values, others, equal_var=False)
    ends = expected.confidence_interval(0.95)
    found = difference(values, others)
    assert found.p_value == pytest.approx(expected.pvalue, abs=1e-9)
    assert (found.low, found.high) == (pytest.approx(ends.low, abs=1e-6), pytest.approx(ends.high, abs=1e-6))


@given(VALUES)
def test_an_interval_is_students(values: list[float]) -> None:
    assume(len(set(values)) > 1)
    found = interval(values)
    expected = stats.t.interval(0.95, len(values) - 1, loc=sum(values) / len(values), scale=stats.sem(values))
    assert found == (pytest.approx(expected[0], abs=1e-6), pytest.approx(expected[1], abs=1e-6))


def test_of_one_value_no_spread_is_known() -> None:
    assert interval([1.0]) is None
    found = difference([2.0], [1.0, 1.5])
    assert found.mean == pytest.approx(0.75)
    assert not found.is_known
    assert not found.is_significant
    assert is_within(found, 10.0) is None
    with pytest.raises(ValueError, match="both sides"):
        difference([], [1.0])


def test_values_that_are_all_alike_leave_nothing_to_chance() -> None:
    assert difference([1.0, 1.0], [1.0, 1.0]).p_value == 1.0
    assert difference([2.0, 2.0], [1.0, 1.0]).is_significant


def test_a_loss_is_within_what_is_allowed_only_as_a_whole() -> None:
    assert is_within(Difference(0.1, 0.05, 0.15, 0.01), 0.2) is True
    assert is_within(Difference(0.1, 0.05, 0.15, 0.01), 0.1) is None
    assert is_within(Difference(0.3, 0.25, 0.35, 0.01), 0.2) is False


def test_no_trend_is_said_from_two_sizes_or_single_seeds() -> None:
    assert trend([(32, 0.1), (32, 0.2), (64, 0.3), (64, 0.4)]) is None
    assert trend([(16, 0.1), (32, 0.2), (64, 0.3), (64, 0.4)]) is None
    assert trend([]) is None


def test_a_trend_is_the_change_with_each_doubling() -> None:
    points = [(size, -0.5 * math.log2(size) + offset) for size in (16, 32, 64) for offset in (-0.01, 0.01)]
    found = trend(points)
    assert found is not None
    assert found.per_doubling == pytest.approx(-0.5)
    assert found.low < -0.5 < found.high < 0
    assert found.is_significant
    flat = trend([(size, offset) for size in (16, 32, 64) for offset in (-0.01, 0.01)])
    assert flat is not None
    assert not flat.is_significant
