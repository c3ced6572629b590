r"""What an answer means: numbers and expressions, points and intervals, sets, lists, unions, matrices, equations, words.

This knows what final answers of competition mathematics look like, and no more: the rest is compared as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from miles_plan.rewards.answer_spellings import FUNCTIONS
from miles_plan.rewards.answer_text import Token, tokens_of
from miles_plan.rewards.exact_algebra import Quotient
from miles_plan.rewards.expression_parser import ExpressionParser, UnreadableError

MAX_TOKENS = 600

RELATIONS = {
    "=": "=",
    "<": "<",
    ">": ">",
    "le": "<=",
    "ge": ">=",
    "ne": "!=",
    "in": "in",
    "approx": "=",
    "equiv": "=",
    "to": "->",
}


@dataclass(frozen=True, slots=True, eq=False)
class Percent:
    """A number followed by a percent sign; value is what stands before the sign."""

    value: Quotient


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Several answers in one: points and intervals with their brackets, matrices, ratios; unordered: sets, lists, unions."""

    kind: Literal["sequence", "set", "list", "union", "matrix", "ratio"]
    items: tuple[Meaning, ...]
    brackets: str = ""

    @property
    def ordered(self) -> bool:
        """Whether the order of the items counts."""
        return self.kind in ("sequence", "matrix", "ratio")


@dataclass(frozen=True, slots=True, eq=False)
class Relation:
    """An equation or inequality."""

    sign: str
    left: Meaning
    right: Meaning


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """An answer in words: lower case, single spaces."""

    text: str


Meaning = Quotient | Percent | Group | Relation | Words


def meaning_of(answer: str) -> Meaning:
    """What an answer means. UnreadableError, or an error of the algebra, when that is beyond us."""
    tokens = tokens_of(answer)
    if not tokens or len(tokens) > MAX_TOKENS:
        raise UnreadableError(f"{len(tokens)} tokens")
    if any(token.kind == "command" and token.text == "pm" for token in tokens):
        return Group("list", tuple(_statement(_with_sign(tokens, sign)) for sign in "+-"))
    if _is_prose(tokens):
        return _words(tokens)
    return _statement(tokens)


def _is_prose(tokens: Sequence[Token]) -> bool:
    """Words only, and not just a product of two letters."""
    if not all(token.kind in ("word", "prose") and token.text not in FUNCTIONS for token in tokens):
        return False
    return any(token.kind == "prose" or len(token.text) > 2 for token in tokens) and [token.text for token in tokens] != ["pi"]


def _words(tokens: Sequence[Token]) -> Words:
    return Words(" ".join(token.text.lower() for token in tokens))


def _with_sign(tokens: Sequence[Token], sign: str) -> list[Token]:
    return [Token("sign", sign) if token.kind == "command" and token.text == "pm" else token for token in tokens]


def _statement(tokens: Sequence[Token]) -> Meaning:
    parser = _AnswerParser(tokens)
    found = parser.list()
    if not parser.at_end():
        raise UnreadableError(f"{parser.peek()} is left over")
    return found


class _AnswerParser(ExpressionParser):
    """Several answers in one, around expressions."""

    def list(self) -> Meaning:
        items = [self.relation()]
        while self.separator():
            items.append(self.relation())
        return items[0] if len(items) == 1 else Group("list", tuple(items))

    def separator(self) -> bool:
        found = False
        while self.sees(",") or self.sees(";") or self.peek().text in ("and", "or"):
            self.position += 1
            found = True
        return found and not self.at_end()

    def relation(self) -> Meaning:
        left = self.label() or self.ratio()
        chain: Meaning | None = None
        while (token := self.peek()).text in RELATIONS and not self.at_end():
            self.position += 1
            sign = RELATIONS[token.text]
            if sign in "<>" and self.accept("="):
                sign += "="
            right = self.ratio()
            chain = Relation(sign, left if chain is None else chain, right)
        return left if chain is None else chain

    def label(self) -> Words | None:
        """The words before `=` in `\\text{Area} = 5`; None, with nothing read, when an expression stands there."""
        end = next((place for place in range(self.position, len(self.tokens)) if self.tokens[place].text == "="), self.position)
        label = self.tokens[self.position : end]
        if not label or not _is_prose(label):
            return None
        self.position = end
        return _words(label)

    def ratio(self) -> Meaning:
        items = [self.union()]
        while self.accept(":"):
            items.append(self.union())
        return items[0] if len(items) == 1 else Group("ratio", tuple(items))

    def union(self) -> Meaning:
        items = [self.item()]
        while self.accept("cup", "command"):
            items.append(self.item())
        return items[0] if len(items) == 1 else Group("union", tuple(items))

    def item(self) -> Meaning:
        grouped = self.grouped()
        if grouped is not None:
            return grouped
        found = self.sum()
        if self.accept("%"):
            return Percent(found)
        self.unit()
        return found

    def grouped(self) -> Meaning | None:
        """A set, point, interval or matrix; None, with nothing read, when an expression begins here."""
        if self.accept("emptyset", "command"):
            return Group("set", ())
        if self.accept("{", "command"):
            items = () if self.sees("}", "command") else self.items()
            self.expect("}", "command")
            return Group("set", items)
        if self.sees("begin", "command"):
            return self.matrix()
        return self.sequence() if (self.sees("(") or self.sees("[")) and self.separates() else None

    def sequence(self) -> Meaning:
        """`(a, b)`, `[a, b)` and the like."""
        opening = self.next().text
        items = self.items()
        closing = self.next().text
        if closing not in ("]", ")"):
            raise UnreadableError(f"{opening} is closed by {closing!r}")
        return Group("sequence", items, opening + closing)

    def separates(self) -> bool:
        """Whether the bracket that begins here holds a comma or semicolon of its own, and so more than one item."""
        depth = 0
        for token in self.tokens[self.position :]:
            if token.text in ("(", "[", "{"):
                depth += 1
            elif token.text in (")", "]", "}"):
                depth -= 1
            if depth <= 0:
                return False
            if depth == 1 and token.text in (",", ";"):
                return True
        return False

    def items(self) -> tuple[Meaning, ...]:
        self.deeper()
        items = [self.relation()]
        while self.accept(",") or self.accept(";"):
            items.append(self.relation())
        self.depth -= 1
        return tuple(items)

    def matrix(self) -> Meaning:
        self.expect("begin", "command")
        name = self.environment()
        if self.accept("{"):  # the column format of an array
            while not self.accept("}"):
                if self.at_end():
                    raise UnreadableError("an array without columns")
                self.position += 1
        rows = [[self.relation()]]
        while not self.accept("end", "command"):
            if self.accept("\\", "command"):
                if not self.sees("end", "command"):
                    rows.append([self.relation()])
            else:
                self.expect("&")
                rows[-1].append(self.relation())
        if self.environment() != name:
            raise UnreadableError("an environment that is not closed")
        return Group("matrix", tuple(Group("sequence", tuple(row), "[]") for row in rows))

    def environment(self) -> str:
        self.expect("{")
        name = self.next().text
        self.expect("}")
        if name not in ("pmatrix", "bmatrix", "vmatrix", "matrix", "array", "smallmatrix"):
            raise UnreadableError(f"environment {name}")
        return name

    def unit(self) -> None:
        """Skip a unit behind a value: `cm`, `\\text{ square feet}`, `km/h`, `m^2`, `apples`."""
        start = self.position
        if not self.is_unit():
            return
        more = True
        while self.is_unit() or (more and self.peek().kind == "letter"):
            self.position += 1
            if self.accept("^"):
                self.exponent()
            more = self.accept("/") or self.accept("*")
        if self.position < len(self.tokens) and not (self.sees(",") or self.sees(")") or self.peek().text in ("and", "or")):
            self.position = start
