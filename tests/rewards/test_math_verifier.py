r"""Pairs of final answers that a grader must call equal, and pairs that it must not."""

import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plan.rewards.math_verifier import math, same_answer

HERE = Path(__file__).parent


def pairs(name):
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("\t")) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize(("left", "right"), pairs("equal_answers.tsv"))
def test_equal_answers(left, right):
    assert same_answer(left, right)
    assert same_answer(right, left)


@pytest.mark.parametrize(("left", "right"), pairs("different_answers.tsv"))
def test_different_answers(left, right):
    assert not same_answer(left, right)
    assert not same_answer(right, left)


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        (r"So the answer is $\boxed{\frac{1}{2}}$.", "0.5", 1.0),
        (r"First \boxed{3}, no: \boxed{4}", "4", 1.0),
        (r"First \boxed{3}, no: \boxed{4}", "3", 0.0),
        (r"\boxed{\{1, 2\}}", r"\{2,1\}", 1.0),
        (r"\boxed{\boxed{7}}", "7", 1.0),
        (r"\boxed 7", "7", 1.0),
        (r"\fbox{7}", "7", 1.0),
        (r"\boxed{3} and then \boxed{4", "3", 1.0),  # the last one never closes
        ("16 - 3 - 4 = 9\n9 * 2 = 18\n#### 18", "16 - 3 - 4 = 9\n#### 18", 1.0),
        ("#### 18\n", "#### 19", 0.0),
        ("The answer is 42.", "42", 1.0),
        ("**Final answer:** 42", "42", 1.0),
        ("Answer: $x = 3.5$", "7/2", 1.0),
        ("the answer is (A)", r"\boxed{A}", 1.0),
        ("We have 3 apples and 4 pears, so 7 in all", "7", 1.0),
        ("It costs $1,234.50", "1234.5", 1.0),
        ("between 1 and 1/2", "0.5", 1.0),
        ("no number at all", "0", 0.0),
        ("", "", 0.0),
        ("", "0", 0.0),
        (r"\boxed{}", "0", 0.0),
        (r"\boxed{" + "9" * 5000 + "}", "9" * 5000, 0.0),
        ("12", "12", 1.0),
        ("-12", "-12", 1.0),
    ],
)
def test_the_final_answer_is_found_and_scored(response, answer, reward):
    assert math("", response, answer, {}) == reward


HOSTILE = [
    "9^{9^{9^{9}}}",
    "9^9^9^9",
    "(" * 500 + "1" + ")" * 500,
    "{" * 900,
    r"\frac" * 200,
    r"\sqrt{" * 150 + "2" + "}" * 150,
    "1" * 900,
    "200!!",
    "(200!)!",
    "(a+b+c+d+e+f+g+h)^{32}",
    r"\sqrt{" + "9" * 300 + "}",
    r"\sqrt{999999999989}",
    "1e999",
    "1/(1-1)",
    "-" * 900,
    "x" * 900,
    "x^" * 300 + "x",
    r"\pm" * 300,
    "(1+" * 200 + "1" + ")" * 200,
    "[" * 300 + "1,2" + "]" * 300,
    r"\binom{500}{250}^{99}",
    "1," * 400 + "1",
    "\\" * 900,
    "_" * 900,
    "%" * 900,
    "|" * 901,
    r"2^{1000000000000}",
    "(x+y)^{32}(x-y)^{32}(x+z)^{32}",
    r"\sqrt[100]{" + "7" * 400 + "}",
    "((((1,2),3),4),5)" * 40,
    r"\text{" * 100,
    "\x01\x02" * 300,
    "0.\\overline{" + "1" * 900 + "}",
    "²" * 500,
    r"\begin{array}" * 40,
    r"\{" * 400,
    "(-1)^{" + "9" * 900 + "}",
    r"\frac{1}{" * 30 + "x+1" + "}" * 30,
    "x^{32}" * 100,
]


@pytest.mark.parametrize("answer", HOSTILE)
def test_no_answer_keeps_the_verifier_busy(answer):
    start = time.process_time()
    for other in (answer, answer + "+0", "2"):
        same_answer(answer, other)
        math("", rf"\boxed{{{answer}}}", other, {})
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    "response",
    [
        "\\boxed{" * 100_000,
        "answer is " * 100_000,
        "1," * 300_000,
        "1/" * 300_000,
        "{" * 10**6,
        "####" * 200_000,
        "\\boxed" * 10**5,
        "answer" + " " * 10**6,
    ],
)
def test_no_response_keeps_the_search_busy(response):
    start = time.process_time()
    math("", response, "7", {})
    assert time.process_time() - start < 1.0


def spellings(value: Fraction):
    top, bottom = value.numerator, value.denominator
    forms = [
        f"{top}/{bottom}",
        rf"\frac{{{top}}}{{{bottom}}}",
        rf"\dfrac{{{3 * top}}}{{{3 * bottom}}}",
        f"x={top}/{bottom}",
        f"({2 * top})/({2 * bottom})",
    ]
    forms += [
        rf"\boxed{{{top}/{bottom}}}"[7:-1],
        f"{top} \\div {bottom}",
        rf"{top}\cdot \frac{{1}}{{{bottom}}}",
        f"{top}*{bottom}^{{-1}}",
    ]
    if all(bottom % prime or prime in (2, 5) for prime in range(2, bottom + 1)) and bottom <= 1000:
        digits = 12
        scaled = value * 10**digits
        if scaled.denominator == 1:
            whole, part = divmod(abs(scaled.numerator), 10**digits)
            forms.append(f"{'-' if value < 0 else ''}{whole}.{part:012d}")
    return forms


rationals = st.fractions(min_value=-1000, max_value=1000, max_denominator=200)


@settings(deadline=None)
@given(rationals, st.data())
def test_every_spelling_of_a_rational_is_equal(value, data):
    left, right = (data.draw(st.sampled_from(spellings(value))) for _ in range(2))
    assert same_answer(left, right)


@settings(deadline=None)
@given(rationals, rationals, st.data())
def test_no_spelling_of_another_rational_is(value, other, data):
    left, right = data.draw(st.sampled_from(spellings(value))), data.draw(st.sampled_from(spellings(other)))
    assert same_answer(left, right) == (value == other)


@settings(deadline=None)
@given(st.text(max_size=80) | st.text(r"\{}[]()^_,;:|&%$!0123456789.+-*/=<>xyzfracsqtpimbo ", max_size=80))
def test_any_text_is_equal_to_itself_and_never_raises(text):
    same_answer(text, "1")
    assert math("", text, text, {}) in (0.0, 1.0)
    if text.strip() and same_answer(text, "7"):
        assert same_answer("7", text)
