"""What a plain YAML word means: the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema).

PyYAML follows YAML 1.1, where `no` is false, `010` is 8, `12:30:45` is 45045 and `1e-6` is text. None of that here.
"""

from __future__ import annotations

import re

from miles_plan.spec.tree import Plain

_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF = re.compile(r"[-+]?\.(inf|Inf|INF)")
_WORDS: dict[str, Plain] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_LONGEST_INT = 64  # characters; far beyond 64 bits, and below Python's own limit for int()


def resolve(word: str) -> Plain:
    """The value of an unquoted word. An integer too long for any field becomes an infinite float, which no field accepts."""
    if word in _WORDS:
        return _WORDS[word]
    if _INT.fullmatch(word):
        return int(word) if len(word) <= _LONGEST_INT else float(word)
    if _OCTAL.fullmatch(word) or _HEX.fullmatch(word):
        return int(word, 0) if len(word) <= _LONGEST_INT else float("inf")
    if _FLOAT.fullmatch(word):
        return float(word)
    if _INF.fullmatch(word):
        return float("-inf") if word.startswith("-") else float("inf")
    return word
