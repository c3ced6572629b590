from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_plan.report.units import (
    GIB,
    MIB,
    bytes_text,
    change_text,
    count_text,
    estimate_text,
    number_text,
    plural,
    quantity_text,
    seconds_text,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.0004, "0.4 ms"),
        (0.9996, "1 s"),
        (1.25, "1.25 s"),
        (42.13, "42.1 s"),
        (1012.9, "1,013 s"),
        (3600, "60 min"),
        (9000, "150 min"),
        (10800, "3 h"),
        (1_012_900, "11.7 d"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(10, "10 B"), (652.4 * MIB, "652.4 MiB"), (1792 * MIB, "1.75 GiB"), (71 * GIB, "71 GiB"), (118.25 * GIB, "118.2 GiB")],
)
def test_bytes(size_bytes: float, text: str) -> None:
    assert bytes_text(size_bytes) == text


@pytest.mark.parametrize(("count", "text"), [(8192, "8,192"), (786_432, "786K"), (37.552e9, "37.6B"), (671.03e9, "671B")])
def test_counts(count: float, text: str) -> None:
    assert count_text(count) == text


def test_an_interval_shares_the_unit_of_its_upper_end() -> None:
    assert estimate_text(402, 538, 811, "s") == "538 s (402\N{EN DASH}811)"
    assert estimate_text(0.6, 0.9, 2, "s") == "0.9 s (0.6\N{EN DASH}2)"
    assert estimate_text(0.18, 0.27, 0.41, "fraction") == "27% (18\N{EN DASH}41)"
    assert estimate_text(62e3, 98.4e3, 131e3, "tokens/s") == "98.4K tok/s (62\N{EN DASH}131)"
    assert estimate_text(3, 3, 3, "s") == "3 s"


def test_units_of_estimates() -> None:
    assert quantity_text(174, "tokens/s/gpu") == "174 tok/s/GPU"
    assert quantity_text(288.1, "GPU-hours") == "288 GPU-hours"


def test_changes() -> None:
    assert [change_text(100, 112), change_text(100, 96.6), change_text(10, 21), change_text(0, 3), change_text(5, 5)] == [
        "+12%",
        "-3.4%",
        "x2.1",
        "",
        "",
    ]


def test_numbers_that_are_none() -> None:
    assert [number_text(math.nan), number_text(math.inf), number_text(-math.inf)] == ["NaN", "∞", "-∞"]
    assert (plural(1, "task"), plural(1024, "GPU")) == ("1 task", "1,024 GPUs")


@given(st.floats(min_value=1e-3, max_value=1e12))
def test_a_number_reads_back_within_half_a_percent(value: float) -> None:
    assert float(number_text(value).replace(",", "")) == pytest.approx(value, rel=0.006)
