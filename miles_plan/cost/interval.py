"""A figure with its error bars, where it comes from, and what it is the sum of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Basis = Literal["exact", "measured", "calibrated", "published", "simulated", "roofline", "no data"]

_WEAKEST_LAST: tuple[Basis, ...] = (
    "exact",
    "measured",
    "calibrated",
    "published",
    "simulated",
    "roofline",
    "no data",
)


@dataclass(frozen=True, slots=True)
class Term:
    """One named part of a figure, in the figure's unit."""

    name: str
    value: float


@dataclass(frozen=True, slots=True)
class Interval:
    """low <= mid <= high of one quantity; the interval is meant to hold nine truths in ten.

    basis: the weakest source among the parts. terms: the parts of `mid`, largest meaning first, which sum to it unless
    the figure is a maximum.
    """

    low: float
    mid: float
    high: float
    basis: Basis
    terms: tuple[Term, ...] = ()

    def __add__(self, other: Interval) -> Interval:
        """Parts that err together: bounds add, terms are kept side by side."""
        return Interval(
            self.low + other.low,
            self.mid + other.mid,
            self.high + other.high,
            weakest((self.basis, other.basis)),
            merged(self.terms + other.terms),
        )

    def scaled(self, factor: float) -> Interval:
        """Every figure times a factor that is known exactly and is not negative."""
        terms = tuple(Term(term.name, term.value * factor) for term in self.terms)
        return Interval(self.low * factor, self.mid * factor, self.high * factor, self.basis, terms)

    def named(self, name: str) -> Interval:
        """The same figure as one term."""
        return replace(self, terms=(Term(name, self.mid),))

    def term(self, name: str) -> float:
        """The value of one term, 0 where there is none of that name."""
        return sum(each.value for each in self.terms if each.name == name)

    def holds(self, truth: float) -> bool:
        """Whether the interval contains a measured value."""
        return self.low <= truth <= self.high

    @property
    def known(self) -> bool:
        """False for a figure there is no data for."""
        return self.basis != "no data"


def exact(value: float, name: str = "") -> Interval:
    """A figure that is counted, not estimated."""
    return Interval(value, value, value, "exact", (Term(name, value),) if name else ())


def around(mid: float, error: float, basis: Basis, terms: Iterable[Term] = ()) -> Interval:
    """An estimate with a relative error on both sides: mid / (1 + error) to mid x (1 + error)."""
    return Interval(mid / (1.0 + error), mid, mid * (1.0 + error), basis, tuple(terms))


def no_data(name: str = "") -> Interval:
    """The honest answer where nothing is known."""
    return Interval(math.nan, math.nan, math.nan, "no data", (Term(name, math.nan),) if name else ())


def total(parts: Iterable[Interval]) -> Interval:
    """Sum of parts that err together."""
    out = exact(0.0)
    for part in parts:
        out = out + part
    return out


def largest(parts: Iterable[Interval]) -> Interval:
    """Maximum of parts: bounds are maxima too, terms are those of the largest.

    Raises:
        ValueError: there are no parts.
    """
    every = list(parts)
    if not every:
        raise ValueError("the largest of no figures")
    top = max(every, key=lambda part: part.mid)
    low, high = max(part.low for part in every), max(part.high for part in every)
    return Interval(low, top.mid, high, weakest(part.basis for part in every), top.terms)


def weakest(bases: Iterable[Basis]) -> Basis:
    """The least trustworthy of several sources."""
    return max(bases, key=_WEAKEST_LAST.index, default="exact")


def merged(terms: Iterable[Term]) -> tuple[Term, ...]:
    """Terms of one name added together, in order of first sight."""
    sums: dict[str, float] = {}
    for term in terms:
        sums[term.name] = sums.get(term.name, 0.0) + term.value
    return tuple(Term(name, value) for name, value in sums.items())
