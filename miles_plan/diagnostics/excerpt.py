"""Text of the user inside one of our own lines."""

from __future__ import annotations

LONGEST = 60


def excerpt(text: str, longest: int = LONGEST) -> str:
    """`text` cut to `longest` characters, with those that would move the cursor or break the line spelt out."""
    cut = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in cut)
