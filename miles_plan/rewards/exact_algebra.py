"""Exact numbers and expressions: quotients of polynomials over the rationals, with square roots.

A term is coefficient x √radicand x symbols, the radicand being squarefree. Square roots of distinct squarefree integers are
linearly independent over the rationals (Besicovitch 1940), so a sum of terms is zero only when it has no term left, and two
quotients are equal exactly when their cross products are. Whatever is no such quotient (a sine, a cube root) becomes a symbol
named by its canonical text. Sizes are bounded: an answer may come from a model that writes 9^9^9^9.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

MAX_TERMS = 64
MAX_BITS = 4096  # of a coefficient
MAX_POWER = 32  # of a sum
MAX_RADICAND = 10**12  # a larger one is only tried as a perfect square: finding square factors would take too long

Symbols = tuple[tuple[str, int], ...]  # (name, exponent >= 1), sorted by name
Term = tuple[int, Symbols]  # squarefree radicand, symbols
Polynomial = Mapping[Term, Fraction]  # no zero coefficients

_UNIT: Term = (1, ())


class TooComplexError(ValueError):
    """An expression outgrew the bounds."""


@dataclass(frozen=True, slots=True, eq=False)
class Quotient:
    """numerator / denominator, the latter not zero. Not reduced: compare with `equals`, not with ==."""

    numerator: Polynomial
    denominator: Polynomial

    def __add__(self, other: Quotient) -> Quotient:
        """The sum."""
        if _same(self.denominator, other.denominator):
            return Quotient(_plus(self.numerator, other.numerator), self.denominator)
        crossed = _plus(_times(self.numerator, other.denominator), _times(other.numerator, self.denominator))
        return Quotient(crossed, _times(self.denominator, other.denominator))

    def __sub__(self, other: Quotient) -> Quotient:
        """The difference."""
        return self + other * number(-1)

    def __mul__(self, other: Quotient) -> Quotient:
        """The product."""
        return Quotient(_times(self.numerator, other.numerator), _times(self.denominator, other.denominator))

    def __truediv__(self, other: Quotient) -> Quotient:
        """The quotient. ZeroDivisionError when `other` is zero."""
        if not other.numerator:
            raise ZeroDivisionError("division by zero")
        return Quotient(_times(self.numerator, other.denominator), _times(self.denominator, other.numerator))

    def __str__(self) -> str:
        """Canonical text: equal texts mean equal quotients, the converse holds only for plain ones."""
        lead = next(iter(sorted(self.denominator)))
        scale = 1 / self.denominator[lead]
        top, bottom = (_text(_times(part, {_UNIT: scale})) for part in (self.numerator, self.denominator))
        return top if bottom == "1" else f"({top})/({bottom})"

    @property
    def rational(self) -> Fraction | None:
        """The value when it is a rational number."""
        if not self.numerator:
            return Fraction(0)
        terms = set(self.numerator) | set(self.denominator)
        if len(terms) != 1:
            return None
        (term,) = terms
        return self.numerator[term] / self.denominator[term]

    @property
    def symbol(self) -> str | None:
        """The name when it is a single symbol."""
        if _text(self.denominator) == "1" and len(self.numerator) == 1:
            ((term, coefficient),) = self.numerator.items()
            if coefficient == 1 and term[0] == 1 and len(term[1]) == 1 and term[1][0][1] == 1:
                return term[1][0][0]
        return None

    def equals(self, other: Quotient) -> bool:
        """Whether both have one value for all values of their symbols (where defined)."""
        return _same(_times(self.numerator, other.denominator), _times(other.numerator, self.denominator))

    def power(self, exponent: Quotient) -> Quotient:
        """This raised to an exponent: exact for whole exponents within bounds and for roots that come out, else a symbol."""
        value = exponent.rational
        if value is None:
            return opaque("power", self, exponent)
        if value.denominator == 2 and self.rational is not None:
            return square_root(self)._whole_power(value.numerator)
        if value.denominator == 1:
            return self._whole_power(value.numerator)
        root = None if self.rational is None else _exact_root(self.rational, value.denominator)
        return opaque("power", self, exponent) if root is None else number(root)._whole_power(value.numerator)

    def _whole_power(self, exponent: int) -> Quotient:
        if exponent < 0:
            return number(1) / self._whole_power(-exponent)
        rational = self.rational
        if rational is not None:
            bits = max(rational.numerator.bit_length(), rational.denominator.bit_length())
            if bits * exponent > MAX_BITS and abs(rational) not in (0, 1):
                raise TooComplexError(f"a power of about {bits * exponent} bits")
            return number(rational**exponent)
        if exponent > MAX_POWER:
            raise TooComplexError(f"the power {exponent} of an expression")
        result = number(1)
        for _ in range(exponent):
            result = result * self
        return result


def number(value: Fraction | int) -> Quotient:
    """A rational number."""
    value = Fraction(value)
    return Quotient({_UNIT: value} if value else {}, {_UNIT: Fraction(1)})


def symbol(name: str) -> Quotient:
    """An unknown, a constant such as `pi`, or the imaginary unit `i`."""
    return Quotient({(1, ((name, 1),)): Fraction(1)}, {_UNIT: Fraction(1)})


def opaque(function: str, *arguments: Quotient) -> Quotient:
    """A function we do not evaluate, as a symbol named by its arguments."""
    return symbol(f"{function}({', '.join(map(str, arguments))})")


def square_root(value: Quotient) -> Quotient:
    """The root of a rational number, exactly; of anything else a symbol."""
    rational = value.rational
    if rational is None:
        return opaque("power", value, number(Fraction(1, 2)))
    if rational < 0:
        return symbol("i") * square_root(number(-rational))
    # √(p/q) = √(pq) / q, and √(m²n) = m√n
    outside, radicand = _square_part(rational.numerator * rational.denominator)
    root = Quotient({(radicand, ()): Fraction(outside, rational.denominator)} if rational else {}, {_UNIT: Fraction(1)})
    return root


def nth_root(value: Quotient, degree: int) -> Quotient:
    """The real root of that degree, exactly where it comes out, else a symbol. ValueError for a degree below 1."""
    if degree < 1:
        raise ValueError(f"a root of degree {degree}")
    return square_root(value) if degree == 2 else value.power(number(Fraction(1, degree)))


def _square_part(value: int) -> tuple[int, int]:
    """(m, n) with value = m² n; n is squarefree for values up to MAX_RADICAND. TooComplexError beyond, if no square."""
    root = math.isqrt(value)
    if root * root == value:
        return root, 1
    if value > MAX_RADICAND:
        raise TooComplexError(f"the square root of {value.bit_length()} bits")
    outside, rest, factor = 1, value, 2
    # Past the cube root the rest has at most two prime factors left: it is a square, or squarefree.
    while factor * factor * factor <= rest:
        while rest % (factor * factor) == 0:
            outside, rest = outside * factor, rest // (factor * factor)
        if rest % factor == 0:
            # p divides once: set it aside, the rest without it is searched on.
            inner_outside, inner = _square_part(rest // factor)
            return outside * inner_outside, inner * factor
        factor += 1
    root = math.isqrt(rest)
    return (outside * root, 1) if root * root == rest else (outside, rest)


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    if value < 0:
        inner = _exact_root(-value, degree) if degree % 2 else None
        return None if inner is None else -inner
    if degree > MAX_BITS:
        return None
    top, bottom = (_whole_root(part, degree) for part in (value.numerator, value.denominator))
    return None if top is None or bottom is None else Fraction(top, bottom)


def _whole_root(value: int, degree: int) -> int | None:
    """The whole root by bisection, None when there is none."""
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
    return low if low**degree == value else None


def _plus(left: Polynomial, right: Polynomial) -> Polynomial:
    return _sum([*left.items(), *right.items()])


def _times(left: Polynomial, right: Polynomial) -> Polynomial:
    if len(left) * len(right) > MAX_TERMS * MAX_TERMS:
        raise TooComplexError("a product of many terms")
    return _sum(_term_product(a, x, b, y) for a, x in left.items() for b, y in right.items())


def _sum(terms: Iterable[tuple[Term, Fraction]]) -> Polynomial:
    total: dict[Term, Fraction] = {}
    for term, coefficient in terms:
        total[term] = total.get(term, Fraction(0)) + coefficient
    found = {term: coefficient for term, coefficient in total.items() if coefficient}
    if len(found) > MAX_TERMS:
        raise TooComplexError(f"{len(found)} terms")
    if any(max(each.numerator.bit_length(), each.denominator.bit_length()) > MAX_BITS for each in found.values()):
        raise TooComplexError(f"a number of more than {MAX_BITS} bits")
    return found


def _term_product(left: Term, x: Fraction, right: Term, y: Fraction) -> tuple[Term, Fraction]:
    shared = math.gcd(left[0], right[0])
    radicand = (left[0] // shared) * (right[0] // shared)
    if radicand.bit_length() > MAX_BITS:
        raise TooComplexError("a square root of many bits")
    exponents = dict(left[1])
    for name, exponent in right[1]:
        exponents[name] = exponents.get(name, 0) + exponent
    sign = 1
    if (imaginary := exponents.get("i", 0)) > 1:  # i² = -1
        sign = -1 if imaginary % 4 in (2, 3) else 1
        exponents["i"] = imaginary % 2
    symbols = tuple(sorted((name, exponent) for name, exponent in exponents.items() if exponent))
    return (radicand, symbols), x * y * shared * sign


def _same(left: Polynomial, right: Polynomial) -> bool:
    return dict(left) == dict(right)


def _text(polynomial: Polynomial) -> str:
    parts = []
    for (radicand, symbols), coefficient in sorted(polynomial.items()):
        factors = [name if exponent == 1 else f"{name}^{exponent}" for name, exponent in symbols]
        factors = [f"sqrt({radicand})", *factors] if radicand > 1 else factors
        parts.append("*".join([str(coefficient), *factors]) if coefficient != 1 or not factors else "*".join(factors))
    return " + ".join(parts) or "0"
