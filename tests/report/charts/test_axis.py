from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from miles_plan.report.charts.axis import Axis, byte_ticks, linear_ticks, log_ticks, padded_range, tick_texts, time_ticks
from miles_plan.report.units import Scale

FINITE = st.floats(min_value=-1e9, max_value=1e9)


def test_ticks_are_round() -> None:
    assert linear_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert time_ticks(1412, 7) == [0, 300, 600, 900, 1200]
    assert time_ticks(0.25) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.25])
    assert [tick / 2**30 for tick in byte_ticks(133 * 2**30)] == [0, 25, 50, 75, 100, 125]
    assert log_ticks(0.001, 1) == pytest.approx([0.001, 0.01, 0.1, 1])
    assert log_ticks(3, 30) == pytest.approx([5, 10, 20])


@given(FINITE, st.floats(min_value=1e-6, max_value=1e9), st.integers(2, 10))
@example(low=536870912.0, span=0.75, count=8)
def test_linear_ticks_lie_in_the_range_evenly(low: float, span: float, count: int) -> None:
    high = low + span
    assume(high - low > abs(low) * 1e-9)
    ticks = linear_ticks(low, high, count)
    assert len(ticks) <= count + 1
    assert all(low - span * 1e-6 <= tick <= high + span * 1e-6 for tick in ticks)
    gaps = [after - before for before, after in pairwise(ticks)]
    rounding = 4 * math.ulp(max(abs(low), abs(high)))  # of the ticks themselves, which a small gap shows
    assert gaps == pytest.approx([gaps[0]] * len(gaps), abs=rounding) if gaps else True


@given(st.floats(min_value=1e-9, max_value=1e6), st.floats(min_value=1.01, max_value=1e6))
def test_log_ticks_lie_in_the_range(low: float, factor: float) -> None:
    assert all(low * 0.998 <= tick <= low * factor * 1.002 for tick in log_ticks(low, low * factor))


@given(st.floats(min_value=1e-6, max_value=1e7), st.integers(3, 9))
def test_time_ticks_begin_at_zero_and_stay_few(high_s: float, count: int) -> None:
    ticks = time_ticks(high_s, count)
    assert ticks[0] == 0
    assert ticks[-1] <= high_s * (1 + 1e-6)
    assert len(ticks) <= 2 * count + 2 or high_s > 86400 * count


@given(FINITE, FINITE)
def test_a_padded_range_holds_both_ends_and_is_never_empty(one: float, other: float) -> None:
    low, high = padded_range(min(one, other), max(one, other))
    assert low <= min(one, other)
    assert high >= max(one, other)
    assert low < high


@given(st.booleans(), st.lists(st.floats(min_value=0.001, max_value=1000), min_size=2, max_size=5))
def test_pixels_keep_the_order_of_values_and_stay_on_the_axis(log: bool, values: list[float]) -> None:
    axis = Axis(0.01, 100.0, 300.0, 20.0, log=log)
    places = [axis.at(value) for value in sorted(values)]
    assert places == sorted(places, reverse=True)
    assert all(20.0 <= place <= 300.0 for place in places)


@given(FINITE, st.floats(min_value=1e-3, max_value=1e6))
def test_labels_of_ticks_tell_them_apart(low: float, span: float) -> None:
    assume(span > abs(low) * 1e-5)
    ticks = linear_ticks(low, low + span)
    labels = tick_texts(ticks, Scale(1.0, ""))
    assert len(labels) == len(set(labels)) == len(ticks)


def test_labels_take_no_more_figures_than_they_need() -> None:
    assert tick_texts([2.7305, 2.731, 2.7315], Scale(1.0, "")) == ["2.7305", "2.731", "2.7315"]
    assert tick_texts([0.5, 1.0], Scale(1.0, "")) == ["0.5", "1"]
