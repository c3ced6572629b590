"""The name that was probably meant."""

from __future__ import annotations

from collections.abc import Collection

_LONGEST = 64  # characters; a longer word is no slip of the finger


def nearest(word: str, choices: Collection[str]) -> str:
    """The choice closest to `word`, or nothing if none is close or two are equally close.

    Close is at most one slip in three characters, where a slip is a letter added, left out, replaced, or swapped with its
    neighbour; case and `-` against `_` do not count. Three letters or more also stand for the one choice that they begin.
    """
    if not word or len(word) > _LONGEST:
        return ""
    limit = max(1, len(word) // 3)
    alike = {choice for choice in choices if abs(len(choice) - len(word)) <= limit < len(choice)}
    ranked = sorted((_slips(_folded(word), _folded(choice)), choice) for choice in alike)
    close = [(slips, choice) for slips, choice in ranked if slips <= limit]
    if close:
        return close[0][1] if len(close) == 1 or close[0][0] < close[1][0] else ""
    begun = {choice for choice in choices if len(word) >= 3 and _folded(choice).startswith(_folded(word))}
    return begun.pop() if len(begun) == 1 else ""


def _folded(word: str) -> str:
    return word.strip().lower().replace("-", "_")


def _slips(left: str, right: str) -> int:
    """Optimal string alignment distance (Damerau 1964, with each pair of letters swapped at most once)."""
    before: list[int] = []
    above = list(range(len(right) + 1))
    for i, a in enumerate(left, start=1):
        row = [i]
        for j, b in enumerate(right, start=1):
            cost = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and left[i - 2] == b:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, above = above, row
    return above[-1]
