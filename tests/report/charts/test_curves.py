from __future__ import annotations

import json
import re
from math import fsum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_plan.report.charts.curves import MOST_POINTS, curve_chart, thinned
from miles_plan.report.metrics import Metric, Series


def curve(values: tuple[float, ...], unit: str = "") -> Series:
    return Series(Metric("x", "figure", unit), "rl", tuple(range(len(values))), values, ())


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=1500))
def test_thinning_keeps_the_mean_and_the_extremes(values: list[float]) -> None:
    points = thinned(range(len(values)), values)
    assert len(points) == min(len(values), MOST_POINTS)
    assert max(point.high for point in points) == max(values)
    assert min(point.low for point in points) == min(values)
    if len(values) <= MOST_POINTS:
        assert [point.mean for point in points] == values
    else:
        assert fsum(point.mean for point in points) / len(points) == pytest.approx(fsum(values) / len(values), abs=1e5, rel=0.2)


@given(st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=50), st.booleans())
def test_any_finite_values_make_a_chart_inside_its_frame(values: list[float], log: bool) -> None:
    drawn = str(curve_chart(curve(tuple(values)), log=log))
    height = float(re.search(r'viewBox="0 0 \d+ (\d+)"', drawn)[1])  # type: ignore[index]
    for points in re.findall(r'points="([^"]+)"', drawn):
        assert all(0 <= float(pair.split(",")[1]) <= height for pair in points.split())


def test_exact_zeros_of_a_log_axis_lie_on_a_line_of_their_own() -> None:
    drawn = str(curve_chart(curve((0.0, 1e-7, 0.0, 3e-4)), log=True))
    assert ">exactly 0<" in drawn
    points = json.loads(drawn.split('data-curve="')[1].split('"')[0].replace("&#34;", '"'))
    zero, small, again, large = (height for _, height, _ in points)
    assert zero == again > small > large
    assert points[0][2] == "iteration 0: 0"


def test_a_single_value_and_a_flat_line_are_drawn() -> None:
    assert "<circle" in str(curve_chart(curve((1.0,))))
    assert "<polyline" in str(curve_chart(curve((2.0, 2.0, 2.0))))


def test_the_band_is_as_wide_as_what_it_is_given() -> None:
    assert 'class="band"' in str(curve_chart(curve((1.0, 2.0)), [0.1, 0.1]))
    assert 'class="band"' not in str(curve_chart(curve((1.0, 2.0))))
