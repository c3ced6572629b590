"""Names come from specs, checkpoints and user code: what a terminal would obey is shown, not obeyed."""

from __future__ import annotations


def printable(value: object) -> str:
    """`value` as one line of text, with control and direction-changing characters written as escapes (`\\x1b`, `\\u202e`)."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def printable_lines(value: object) -> str:
    """As `printable`, but line ends stay: for places that show text of several lines."""
    return "\n".join(printable(line) for line in str(value).split("\n"))
