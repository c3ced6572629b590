r"""Reward 1 when a solution's final answer equals the reference, compared as exact mathematics.

Decided exactly: rationals in any spelling (fractions, decimals, repeating decimals, powers of ten), square roots, polynomials
and their quotients, points, intervals, sets, lists, unions, matrices, ratios, equations. Conventions where graders differ:

- a decimal equals a fraction only when it is exact: 0.33 is not 1/3;
- a percent sign on one side only is read both ways: 50% equals 0.5 and 50;
- units, degrees and currency are dropped and not compared: 5 cm equals 5;
- `x = 5` equals `5`; a list is compared without regard to order, a point or interval with its brackets and order;
- text that is no formula is equal when it is the same but for case, white space and layout.

There is no eval and no computer algebra behind this, and every step is bounded, so it runs inside the calling process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from miles_plan.rewards.answer_text import plain_text
from miles_plan.rewards.exact_algebra import Quotient, number
from miles_plan.rewards.final_answer import LONGEST_ANSWER, final_answer, marked_answer
from miles_plan.rewards.math_answer import Group, Meaning, Percent, Relation, Words, meaning_of

MAX_ITEMS = 64  # of a set or list; matching is quadratic


def math(prompt: str, response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    r"""1.0 when the response's final answer is right, else 0.0. The reference may be bare or marked by \boxed{} or ####."""
    found = final_answer(response)
    if found is None:
        return 0.0
    marked = marked_answer(answer)
    return float(same_answer(found, answer if marked is None else marked))


def same_answer(left: str, right: str) -> bool:
    """Whether two final answers mean the same."""
    if max(len(left), len(right)) > LONGEST_ANSWER:
        return False
    if left.strip() == right.strip():
        return bool(left.strip())
    one, other = _meaning(left), _meaning(right)
    if one is None or other is None:
        return bool(plain := plain_text(left)) and plain == plain_text(right)
    try:
        return _equal(one, other)
    except (ValueError, ArithmeticError, RecursionError):
        return False


def _meaning(answer: str) -> Meaning | None:
    try:
        return meaning_of(answer)
    except (ValueError, ArithmeticError, RecursionError):
        return None


def _equal(one: Meaning, other: Meaning) -> bool:
    match one, other:
        case Relation(), Relation():
            return _equal_relations(one, other)
        case (Relation(sign="=", right=value) as relation, _) | (_, Relation(sign="=", right=value) as relation):
            return _is_name(relation.left) and _equal(value, other if relation is one else one)
        case Relation(sign="in", left=name, right=value), _:
            return _is_name(name) and _equal(value, other)
        case _, Relation(sign="in", left=name, right=value):
            return _is_name(name) and _equal(one, value)
        case Quotient(), Quotient():
            return one.equals(other)
        case Percent(value=value), Percent(value=other_value):
            return value.equals(other_value)
        case (Percent(value=value), Quotient() as plain) | (Quotient() as plain, Percent(value=value)):
            return value.equals(plain) or value.equals(plain * number(100))
        case Group(), Group():
            return _equal_groups(one, other)
        case Words(text=text), Words(text=other_text):
            return text == other_text
        case _:
            return False


def _is_name(meaning: Meaning) -> bool:
    """Whether the left side of `name = value` only names the value: a symbol, or a function such as f(x)."""
    if isinstance(meaning, Words):
        return True
    return isinstance(meaning, Quotient) and (meaning.symbol is not None or _is_call(meaning))


def _is_call(value: Quotient) -> bool:
    """`f(x)` is parsed as f times x."""
    if len(value.numerator) != 1:
        return False
    (((radicand, symbols), coefficient),) = value.numerator.items()
    return coefficient == 1 and radicand == 1 and len(symbols) == 2 and symbols[0][0] in ("f", "g", "h", "P", "Q")


def _equal_relations(one: Relation, other: Relation) -> bool:
    if one.sign in ("<", "<=", ">", ">=") and other.sign == _mirrored(one.sign) and one.sign != other.sign:
        other = Relation(one.sign, other.right, other.left)
    if one.sign != other.sign:
        return False
    if _equal(one.left, other.left) and _equal(one.right, other.right):
        return True
    return one.sign == "=" and _proportional(one, other)


def _mirrored(sign: str) -> str:
    return sign.translate(str.maketrans("<>", "><"))


def _proportional(one: Relation, other: Relation) -> bool:
    """Whether left - right of two equations differ by a number only: `x + y = 2` and `2y = 4 - 2x`."""
    sides = (one.left, one.right, other.left, other.right)
    if not all(isinstance(side, Quotient) for side in sides):
        return False
    a, b, c, d = (side for side in sides if isinstance(side, Quotient))
    difference, other_difference = a - b, c - d
    if not difference.numerator or not other_difference.numerator:
        return not difference.numerator and not other_difference.numerator
    ratio: Fraction | None = (difference / other_difference).rational if len(difference.numerator) == 1 else None
    if ratio is None:
        term = next(iter(difference.numerator))
        if term not in other_difference.numerator:
            return False
        scale = difference.numerator[term] / other_difference.numerator[term]
        return difference.equals(other_difference * number(scale))
    return True


def _equal_groups(one: Group, other: Group) -> bool:
    if len(one.items) != len(other.items) or len(one.items) > MAX_ITEMS or not _same_kind(one, other):
        return False
    if one.ordered:
        return all(_equal(left, right) for left, right in zip(one.items, other.items, strict=True))
    return _same_items(one.items, other.items)


def _same_kind(one: Group, other: Group) -> bool:
    """A set without its braces is a list; all else keeps its kind and brackets."""
    return one.brackets == other.brackets if one.kind == other.kind else {one.kind, other.kind} == {"set", "list"}


def _same_items(items: Sequence[Meaning], others: Sequence[Meaning]) -> bool:
    """Equality is transitive, so taking the first match that is left never leads astray."""
    left = list(others)
    for item in items:
        place = next((index for index, each in enumerate(left) if _equal(item, each)), None)
        if place is None:
            return False
        del left[place]
    return True
