r"""The final answer in a worked solution, as text: the last \boxed{}, what follows ####, "the answer is", or the last number.

Every search is linear in the text and looks only at its end, so that no response can keep a verifier busy.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator

SEARCHED_CHARACTERS = 20_000  # at the end of a response; an answer that stands before them was not final
LONGEST_ANSWER = 1_000
MOST_OPEN_BOXES = 16  # that never close, before the search gives up: each is read to the end

_BOXES = (r"\boxed", r"\fbox")
_STATED = re.compile(r"(?i)\banswer\b[ \t*]{0,8}(?:is|:|=|\uff1a)[ \t:*]{0,8}")
_NUMBER = re.compile(r"(?<![\w.])-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?%?")
_SENTENCE_END = re.compile(r"\.(?=\s|$)|\n")


def final_answer(text: str) -> str | None:
    """The answer that a solution ends with, None when there is none or it is too long to be one."""
    end = text[-SEARCHED_CHARACTERS:]
    found = next(_candidates(end), None)
    return found.strip() if found is not None and len(found) <= LONGEST_ANSWER else None


def marked_answer(text: str) -> str | None:
    r"""The answer in \boxed{} or after ####, None when the text has neither: how data sets mark answers inside solutions."""
    found = last_boxed(text)
    return found if found is not None else _after_hashes(text)


def last_boxed(text: str) -> str | None:
    r"""What the last complete \boxed{...} or \fbox{...} holds; `\boxed 5` holds its next word."""
    end = len(text)
    for _ in range(MOST_OPEN_BOXES):
        if (start := max(text.rfind(box, 0, end) for box in _BOXES)) < 0:
            break
        box = next(box for box in _BOXES if text.startswith(box, start))
        rest = text[start + len(box) :].lstrip(" ")
        if rest.startswith("{"):
            content = _braced(rest)
            if content is not None:
                return content
        elif words := rest.split(maxsplit=1):
            return words[0].rstrip("$.,")
        end = start
    return None


def _candidates(text: str) -> Iterator[str]:
    marked = marked_answer(text)
    if marked is not None:
        yield marked
    if (stated := _last_match(_STATED, text)) is not None:
        sentence = _SENTENCE_END.split(text[stated.end() :], maxsplit=1)[0].strip("* ")
        if sentence:
            yield sentence
    if (last := _last_match(_NUMBER, text)) is not None:
        yield last.group()


def _after_hashes(text: str) -> str | None:
    _, marker, rest = text.rpartition("####")
    return rest.strip().split("\n", 1)[0] if marker and rest.strip() else None


def _braced(text: str) -> str | None:
    r"""The content of the brace that `text` begins with, None when it never closes; `\{` and `\}` are no braces."""
    depth, position = 0, 0
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[1:position]
        position += 1
    return None


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)
