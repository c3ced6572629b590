r"""Expressions of final answers: numbers in any spelling, fractions, roots, powers, letters, functions.

A recursive-descent parser over the tokens of `answer_text`; each method reads what it is named after and leaves `position`
behind it. It decides by looking ahead and parses nothing twice; depth and sizes are bounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from miles_plan.rewards.answer_spellings import FUNCTIONS, NO_FACTOR, UNIT_LETTERS, UNITS
from miles_plan.rewards.answer_text import Token
from miles_plan.rewards.exact_algebra import Quotient, nth_root, number, opaque, symbol

MAX_DEPTH = 40
MAX_DIGITS = 1_000

_END = Token("sign", "")


class UnreadableError(ValueError):
    """The text is no mathematics that this parser knows."""


class ExpressionParser:
    """One pass over the tokens."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0

    def peek(self, ahead: int = 0) -> Token:
        place = self.position + ahead
        return self.tokens[place] if place < len(self.tokens) else _END

    def at_end(self) -> bool:
        return self.position >= len(self.tokens)

    def next(self) -> Token:
        token = self.peek()
        self.position += 1
        return token

    def sees(self, text: str, kind: str = "sign") -> bool:
        token = self.peek()
        return token.kind == kind and token.text == text and not self.at_end()

    def accept(self, text: str, kind: str = "sign") -> bool:
        found = self.sees(text, kind)
        self.position += found
        return found

    def expect(self, text: str, kind: str = "sign") -> None:
        if not self.accept(text, kind):
            raise UnreadableError(f"expected {text!r}, found {self.peek().text!r}")

    def is_unit(self) -> bool:
        token = self.peek()
        if self.at_end() or token.text in ("and", "or"):
            return False
        if token.kind == "prose":
            return True
        if token.kind == "word":
            return token.text.lower() in UNITS or (token.spaced and len(token.text) > 2)
        return token.kind == "letter" and self.is_unit_letter(token)

    def is_unit_letter(self, token: Token) -> bool:
        """Whether a letter is a unit and no unknown: `5 m`, `4 m^2`, `3 m/s` at the very end; `3 s + 1` is an expression."""
        behind_number = token.spaced and self.position > 0 and self.tokens[self.position - 1].kind == "number"
        rest = [each.text for each in self.tokens[self.position + 1 :]]
        ends = not rest or (rest[0] == "^" and len(rest) == 2) or (rest[0] == "/" and len(rest) < 5)
        return behind_number and ends and token.text in UNIT_LETTERS

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError("nested too deeply")

    def sum(self) -> Quotient:
        self.deeper()
        total = self.product()
        while self.sees("+") or self.sees("-"):
            sign = self.next().text
            term = self.product()
            total = total + term if sign == "+" else total - term
        self.depth -= 1
        return total

    def product(self) -> Quotient:
        if self.sees("-") or self.sees("+"):
            sign = self.next().text
            value = self.product()
            return number(0) - value if sign == "-" else value
        value = self.power()
        while True:
            if self.accept("*"):
                value = value * self.signed_power()
            elif self.accept("/"):
                value = value / self.signed_power()
            elif self.begins_factor():
                value = value * self.power()
            else:
                return value

    def signed_power(self) -> Quotient:
        if self.accept("-"):
            return number(0) - self.signed_power()
        return self.power()

    def begins_factor(self) -> bool:
        """Whether multiplication is meant though no sign stands here: `2x`, `3\\sqrt{2}`, `2(x+1)`."""
        token = self.peek()
        if self.at_end() or self.is_unit():
            return False
        if token.kind == "command":
            return token.text in ("frac", "sqrt", "binom") or token.text in FUNCTIONS or token.text not in NO_FACTOR
        if token.kind == "word":
            return len(token.text) == 2 or token.text in FUNCTIONS
        return token.kind == "letter" or (token.kind == "sign" and token.text in "({")

    def power(self) -> Quotient:
        base = self.primary()
        while True:
            if self.accept("!"):
                base = _factorial(base)
            elif self.sees("^"):
                self.position += 1
                exponent = self.exponent()
                base = base if exponent is None else base.power(exponent)
            else:
                return base

    def exponent(self) -> Quotient | None:
        """What follows ^; None for a degree sign, which is a unit."""
        if self.accept("circ", "command"):
            return None
        if self.sees("{") and self.peek(1).kind == "command" and self.peek(1).text == "circ" and self.peek(2).text == "}":
            self.position += 3
            return None
        return number(0) - self.primary() if self.accept("-") else self.argument()

    def argument(self) -> Quotient:
        """A braced expression, or the one digit or letter that LaTeX takes without braces."""
        if self.sees("{"):
            return self.braced()
        token = self.peek()
        if token.kind == "number" and len(token.text) > 1 and token.text.isdigit() and self.position and self.latex_argument():
            self.tokens = [*self.tokens[: self.position], *_split_number(token), *self.tokens[self.position + 1 :]]
        return self.primary()

    def latex_argument(self) -> bool:
        """Whether a bare number here is read digit by digit, as after \\frac; `2^10` is meant as 1024."""
        return self.tokens[self.position - 1].kind == "command" or self.tokens[self.position - 1].text not in ("^", "_")

    def braced(self) -> Quotient:
        self.expect("{")
        value = self.sum()
        self.expect("}")
        return value

    def primary(self) -> Quotient:
        self.deeper()
        token = self.next()
        if self.position > len(self.tokens):
            raise UnreadableError("the answer ends too early")
        if token.kind == "number":
            value = self.decimal(token)
        elif token.kind == "letter":
            value = self.named(token.text)
        elif token.kind == "word":
            value = self.function(token.text) if token.text in FUNCTIONS else self.word(token)
        elif token.kind == "command":
            value = self.command(token.text)
        else:
            value = self.bracketed(token)
        self.depth -= 1
        return value

    def bracketed(self, token: Token) -> Quotient:
        closing = {"(": ")", "[": "]", "{": "}", "|": "|"}.get(token.text) if token.kind == "sign" else None
        if closing is None:
            raise UnreadableError(f"{token.text!r} begins no expression")
        value = self.sum()
        self.expect(closing)
        return _absolute(value) if closing == "|" else value

    def decimal(self, token: Token) -> Quotient:
        if len(token.text) > MAX_DIGITS:
            raise UnreadableError("a number of many digits")
        value = Fraction(token.text.removesuffix(".") if token.text != "." else "")
        if "." in token.text and self.accept("overline", "command"):
            return number(value + self.repetend(len(token.text.partition(".")[2])))
        if self.sees("_"):
            return self.based(token)
        exponent = self.peek()
        if exponent.kind == "letter" and exponent.text in "eE" and not exponent.spaced:
            return number(value * self.scientific())
        fraction = self.mixed_part() if token.text.isdigit() else None
        return number(value if fraction is None else value + fraction)

    def repetend(self, digits_before: int) -> Fraction:
        """The value of \\overline{digits} behind so many digits after the point."""
        self.expect("{")
        digits = self.next()
        self.expect("}")
        if not digits.text.isdigit() or len(digits.text) > MAX_DIGITS:
            raise UnreadableError("a repetend that is no digits")
        return Fraction(int(digits.text), (10 ** len(digits.text) - 1) * 10**digits_before)

    def based(self, token: Token) -> Quotient:
        """`1011_2`: digits in a base are kept as they are written, for no base is like another."""
        self.position += 1
        base = self.argument() if self.sees("{") else self.primary()
        return symbol(f"{token.text} in base {base}")

    def scientific(self) -> Fraction:
        """`e-5` behind a number; 1, with nothing read, when the e is a letter of its own."""
        sign = self.peek(1).text if self.peek(1).kind == "sign" and self.peek(1).text in "+-" else ""
        digits = self.peek(2 if sign else 1)
        if digits.kind != "number" or not digits.text.isdigit() or digits.spaced or int(digits.text[:6]) > 1000:
            return Fraction(1)
        self.position += 3 if sign else 2
        return Fraction(10) ** int(sign + digits.text)

    def mixed_part(self) -> Fraction | None:
        """The fraction of a mixed number, `3\\frac{1}{2}` or `3 1/2`; None, with nothing read, when there is none."""
        start = self.position
        if self.accept("frac", "command"):
            parts = [self.plain_argument(), self.plain_argument()]
        elif self.peek().kind == "number" and self.peek().spaced and self.peek(1).text == "/" and self.peek(2).kind == "number":
            parts = [self.peek().text, self.peek(2).text]
            self.position += 3
        else:
            return None
        if all(part.isdigit() and len(part) < MAX_DIGITS for part in parts) and int(parts[1]):
            return Fraction(int(parts[0]), int(parts[1]))
        self.position = start
        return None

    def plain_argument(self) -> str:
        """The digits of `{12}`, or nothing."""
        if not self.sees("{") or self.peek(1).kind != "number" or self.peek(2).text != "}":
            return ""
        self.position += 3
        return self.peek(-2).text

    def named(self, name: str) -> Quotient:
        """A letter with its subscript and primes."""
        if self.accept("_"):
            name = f"{name}_{self.argument()}"
        while self.accept("'"):
            name += "'"
        return symbol(name)

    def word(self, token: Token) -> Quotient:
        """`xy` is x times y, so that `xy^2` squares y alone; a longer word is no expression."""
        if token.text == "sqrt":
            return self.root()
        if token.text in ("pi", "infty", "infinity"):
            return symbol("pi" if token.text == "pi" else "infty")
        if len(token.text) != 2:
            raise UnreadableError(f"the word {token.text}")
        first, second = (replace(token, kind="letter", text=letter) for letter in token.text)
        self.tokens = [*self.tokens[: self.position - 1], first, second, *self.tokens[self.position :]]
        return self.named(first.text)

    def command(self, name: str) -> Quotient:
        if name == "frac":
            return self.argument() / self.argument()
        if name == "sqrt":
            return self.root()
        if name == "binom":
            return _binomial(self.argument(), self.argument())
        if name in FUNCTIONS:
            return self.function(name)
        if name in NO_FACTOR:
            raise UnreadableError(f"\\{name}")
        return self.named(name)

    def root(self) -> Quotient:
        degree = 2
        if self.sees("["):
            inner = self.bracketed(self.next()).rational
            if inner is None or inner.denominator != 1 or not 1 <= inner <= 100:
                raise UnreadableError("a root of no whole degree")
            degree = int(inner)
        return nth_root(self.argument(), degree)

    def function(self, name: str) -> Quotient:
        base = [self.argument()] if self.accept("_") else []
        power = self.exponent() if self.accept("^") else None
        argument = self.bracketed(self.next()) if self.sees("(") or self.sees("{") else self.power()
        value = opaque(name, *base, argument)
        return value if power is None else value.power(power)


def _split_number(token: Token) -> list[Token]:
    return [replace(token, text=token.text[0]), Token("number", token.text[1:])]


def _whole(value: Quotient, largest: int) -> int:
    found = value.rational
    if found is None or found.denominator != 1 or not 0 <= found <= largest:
        raise UnreadableError(f"no whole number up to {largest}")
    return int(found)


def _factorial(value: Quotient) -> Quotient:
    return number(math.factorial(_whole(value, 200)))


def _binomial(top: Quotient, bottom: Quotient) -> Quotient:
    return number(math.comb(_whole(top, 500), _whole(bottom, 500)))


def _absolute(value: Quotient) -> Quotient:
    found = value.rational
    return opaque("abs", value) if found is None else number(abs(found))
