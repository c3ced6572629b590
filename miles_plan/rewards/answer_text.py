r"""Answers as tokens: LaTeX and plain text brought to one alphabet before they are parsed.

Layout (\left, \,, \displaystyle, dollar signs) goes, spellings of one thing become one (\dfrac, ½, ×, −, π), and words keep the
mark whether they stood in \text{}, where they are prose, or bare, where they may be a product of letters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from miles_plan.rewards.answer_spellings import (
    CHARACTERS,
    COMMANDS,
    COMMANDS_THAT_ARE_SIGNS,
    LAYOUT,
    SUPERSCRIPTS,
    VULGAR_FRACTIONS,
)

Kind = Literal["number", "letter", "word", "prose", "command", "sign"]

_TO_DIGITS = str.maketrans(SUPERSCRIPTS, "0123456789-")
_PROSE = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|operatorname|mathsf)\s*\{([^{}]*)\}")
_TOKEN = re.compile(
    r"(?P<space>\s+|~|\\[,;:! ]|\\quad|\\qquad)"
    r"|(?P<grouped>\d{1,3}(?:(?:\{,\}|\\!,|,\\!)\d{3})+(?:\.\d+)?)"
    r"|(?P<number>(?:\d+(?:\.\d*)?|\.\d+))"
    r"|(?P<prose>\x01[^\x02]*\x02)"
    r"|\\(?P<command>[A-Za-z]+)"
    r"|\\(?P<escaped>[{}%$#&_|\\])"
    r"|(?P<word>[A-Za-z]{2,}(?:'s)?)"
    r"|(?P<letter>[A-Za-z])"
    r"|(?P<sign>.)",
    re.DOTALL,
)
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_BRACKETS = re.compile(r"[(\[]|\\\{")


@dataclass(frozen=True, slots=True)
class Token:
    """One token; spaced: white space stood before it. Prose is lower-case words from inside \\text{}."""

    kind: Kind
    text: str
    spaced: bool = False


def tokens_of(answer: str) -> list[Token]:
    """The tokens of an answer, layout left out."""
    found: list[Token] = []
    spaced = False
    for match in _TOKEN.finditer(_one_alphabet(answer)):
        if match.lastgroup == "space":
            spaced = True
            continue
        for token in _tokens(match, spaced):
            found.append(token)
        spaced = match.lastgroup == "prose"
    while found and found[-1].kind == "sign" and found[-1].text in ".,;":
        found.pop()
    return found


def plain_text(answer: str) -> str:
    """An answer without layout, case and the full stop at its end: what two answers that are no formulas share."""
    return " ".join(f"\\{token.text}" if token.kind == "command" else token.text for token in tokens_of(answer)).casefold()


def _one_alphabet(answer: str) -> str:
    text = _PROSE.sub(lambda match: f"\x01{match.group(1)}\x02", answer.replace("\x01", "").replace("\x02", ""))
    for character, (top, bottom) in VULGAR_FRACTIONS.items():
        text = text.replace(character, rf"\frac{{{top}}}{{{bottom}}}")
    text = re.sub(f"[{SUPERSCRIPTS}]+", lambda match: "^{" + match.group().translate(_TO_DIGITS) + "}", text)
    for character, replacement in CHARACTERS.items():
        text = text.replace(character, replacement)
    text = text.replace(r"\(", "").replace(r"\)", "").replace(r"\[", "").replace(r"\]", "").replace("**", "^")
    # Inside brackets a comma separates: (1,234) is a point.
    return text if _BRACKETS.search(text) else _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)


def _tokens(match: re.Match[str], spaced: bool) -> list[Token]:
    text, kind = match.group(), match.lastgroup
    if kind == "grouped":
        return [Token("number", re.sub(r"[^\d.]", "", text), spaced)]
    if kind == "command":
        return _command(match.group("command"), spaced)
    if kind == "escaped":
        return _escaped(match.group("escaped"), spaced)
    if kind == "prose":
        return [_prose_token(part) for part in re.findall(r"[A-Za-z]+|\d+(?:\.\d+)?|[^\s~A-Za-z\d]", text[1:-1])]
    if kind in ("number", "letter", "word"):
        return [Token("number" if kind == "number" else "letter" if kind == "letter" else "word", text, spaced)]
    return [] if text == "$" else [Token("sign", text, spaced)]


def _escaped(character: str, spaced: bool) -> list[Token]:
    if character in "$_#&":
        return []
    return [Token("sign" if character in "%|" else "command", character, spaced)]  # braces of sets, backslash between rows


def _command(name: str, spaced: bool) -> list[Token]:
    if name in LAYOUT:
        return []
    if name in COMMANDS_THAT_ARE_SIGNS:
        return [Token("sign", COMMANDS_THAT_ARE_SIGNS[name], spaced)]
    return [Token("command", COMMANDS.get(name, name), spaced)]


def _prose_token(part: str) -> Token:
    if part.isdigit() or part.replace(".", "", 1).isdigit():
        return Token("number", part, True)
    if not part.isalpha():
        return Token("sign", part, True)
    # One capital is a name (a point, a choice), as it would be outside \text{}.
    return Token("letter", part, True) if len(part) == 1 and part.isupper() else Token("prose", part.lower(), True)
