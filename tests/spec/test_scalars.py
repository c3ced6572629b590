from __future__ import annotations

import math

import pytest

from miles_plan.spec.scalars import resolve


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1e-6", 1e-6),
        ("1.0e-6", 1e-6),
        ("1E5", 1e5),
        (".5", 0.5),
        ("2.", 2.0),
        ("+3", 3),
        ("-0", 0),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        # YAML 1.1 would make something else of these
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("y", "y"),
        ("12:30:45", "12:30:45"),
        ("2001-01-01", "2001-01-01"),
        ("1_000", "1_000"),
        ("0b101", "0b101"),
        ("=", "="),
        ("<<", "<<"),
        ("1e", "1e"),
        ("e5", "e5"),
        (".", "."),
        ("0x", "0x"),
        ("-0x1F", "-0x1F"),
        ("inf", "inf"),
        ("nan", "nan"),
        ("\u0661", "\u0661"),  # an Arabic digit is no digit here
    ],
)
def test_core_schema_of_yaml_1_2(word: str, value: object) -> None:
    got = resolve(word)
    assert got == value
    assert type(got) is type(value)


def test_nan_is_a_float() -> None:
    got = resolve(".nan")
    assert isinstance(got, float)
    assert math.isnan(got)


@pytest.mark.parametrize("word", ["9" * 5000, "0x" + "f" * 5000, "-" + "9" * 400])
def test_absurdly_long_integers_become_infinite(word: str) -> None:
    got = resolve(word)
    assert isinstance(got, float)
    assert math.isinf(got)
