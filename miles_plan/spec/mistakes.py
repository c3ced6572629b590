"""Wording of what can be wrong with one field: unknown, missing, or a value that does not fit; with the nearest right one."""

from __future__ import annotations

import unicodedata
from typing import Any

from pydantic_core import ErrorDetails

from miles_plan.diagnostics import Diagnostic, Edit, Fix, Location, error, excerpt, nearest
from miles_plan.spec.fields import FieldEntry, all_fields, pattern_of
from miles_plan.spec.foreign_names import FOREIGN_NAMES
from miles_plan.spec.job import JobSpec
from miles_plan.spec.kinds import number_text
from miles_plan.spec.layers import SET_FILE
from miles_plan.spec.origins import Origins
from miles_plan.spec.scalars import resolve
from miles_plan.spec.tree import Node, Path, ScalarNode, find

_RANGE_ERRORS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}
_OUT_OF_RANGE = {*_RANGE_ERRORS, "finite_number", "string_pattern_mismatch", "string_too_long", "string_too_short", "too_long"}


def unknown_key(section: Path, key: str, origins: Origins) -> Diagnostic:
    """A key that the section does not have, with the name that was probably meant."""
    path = ".".join((*section, key))
    names = _names_in(section)
    where = origins.key(path)
    inside = f" in `{'.'.join(section)}`" if section else ""
    free = [name for name in names if find(origins.root, (*section, name)) is None]
    foreign = FOREIGN_NAMES.get(key, "")
    here = nearest(key, free) or nearest(key, names)
    if foreign and foreign != ".".join((*section, here)):
        here = ""
    fix = _fix(f"rename `{key}` to `{here}`", where, here) if here in free else None
    return error(
        "MP120",
        f"unknown key `{excerpt(key)}`{inside}",
        where,
        field=path,
        help=_key_help(key, here, names),
        notes=[note] if (note := _look_alike(key)) else [],
        fix=fix,
    )


def missing_key(section: Path, key: str, origins: Origins) -> Diagnostic:
    """A required key that is absent; the place is the section's own key."""
    path = ".".join((*section, key))
    inside = f" in `{'.'.join(section)}`" if section else ""
    entry = all_fields().get(pattern_of(path))
    help = f"add `{key}`; it must be {entry.kind.phrase}" if entry else f"add `{key}`"
    return error("MP121", f"missing key `{key}`{inside}", origins.key(".".join(section)), field=path, help=help)


def bad_value(path: Path, details: ErrorDetails, origins: Origins) -> Diagnostic:
    """A value of the wrong type, out of range, or none of the choices."""
    dotted = ".".join(path)
    entry = _entry_above(path)
    node = find(origins.root, path)
    where = origins.at(dotted)
    kind, value = details["type"], details["input"]
    if dotted == "version" and kind in _RANGE_ERRORS:
        return error("MP125", f"version {value} of the spec is not supported", where, field=dotted, help="write `version: 1`")
    words = entry.kind.words if entry else ()
    close = nearest(value, (*words, *(entry.kind.known if entry else ()))) if isinstance(value, str) else ""
    only_words = entry is not None and len(entry.kind.forms) == len(words)
    code = _code(kind, value, words, only_words=only_words)
    message = f"`{dotted}` must be {_demand(kind, details, entry)}, got {_as_written(node, value)}"
    if close:
        fix = _fix(f"replace it with `{close}`", where, close) if isinstance(node, ScalarNode) else None
        return error(code, message, where, field=dotted, help=f"did you mean `{close}`?", fix=fix)
    if isinstance(node, ScalarNode) and _is_quoted_number(node, entry):
        fix = _fix("remove the quotes", where, node.text)
        return error(code, message, where, field=dotted, help="write the number without quotes", fix=fix)
    help = "give a value, or remove the key" if value is None else ""
    return error(code, message, where, field=dotted, help=help)


def got(value: Any) -> str:
    """A value with its type, as the end of `must be ..., got ...`."""
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return f"{str(value).lower()} (a truth value)"
        case str():
            return f'"{excerpt(value)}" (text)'
        case int() | float():
            return number_text(value) if abs(value) < 1e18 else f"{float(value):g}"
        case dict():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case _:
            return type(value).__name__


def _as_written(node: Node | None, value: Any) -> str:
    """As `got`, but a number in the user's own digits: 1e400 is read as infinity, and `inf` would puzzle."""
    if isinstance(node, ScalarNode) and not node.quoted and isinstance(value, int | float) and not isinstance(value, bool):
        return excerpt(node.text)
    return got(value)


def _names_in(section: Path) -> tuple[str, ...]:
    if not section:
        return (*JobSpec.__pydantic_fields__, "base")
    entry = all_fields().get(pattern_of(".".join(section)))
    return entry.inner if entry else ()


def _key_help(key: str, here: str, names: tuple[str, ...]) -> str:
    if here:
        return f"did you mean `{here}`?"
    if key in FOREIGN_NAMES:
        return f"here this is `{FOREIGN_NAMES[key]}`"
    elsewhere = [path for path in all_fields() if path.rpartition(".")[2] == key and "*" not in path]
    if elsewhere:
        return f"did you mean `{min(elsewhere, key=lambda path: path.count('.'))}`?"
    return f"the keys are {', '.join(names)}" if names else "remove it"


def _look_alike(key: str) -> str:
    """A note on a letter from another script, which looks like a Latin one and is not."""
    odd = next((character for character in key if not character.isascii()), "")
    return f"the key contains U+{ord(odd):04X} {unicodedata.name(odd, 'unnamed')}" if odd else ""


def _entry_above(path: Path) -> FieldEntry | None:
    """The field at `path`, or the nearest one around it (a value inside `model.architecture` is part of that field)."""
    for length in range(len(path), 0, -1):
        if entry := all_fields().get(pattern_of(".".join(path[:length]))):
            return entry
    return None


def _code(kind: str, value: Any, words: tuple[str, ...], *, only_words: bool) -> str:
    if kind in _OUT_OF_RANGE:
        return "MP123"
    is_choice = isinstance(value, str) and words and (only_words or bool(nearest(value, words)))
    return "MP124" if is_choice else "MP122"


def _demand(kind: str, details: ErrorDetails, entry: FieldEntry | None) -> str:
    if kind in _RANGE_ERRORS:
        name, words = _RANGE_ERRORS[kind]
        return f"{words} {number_text(details['ctx'][name])}"
    if kind == "finite_number":
        return "a finite number"
    if kind == "too_long":
        return f"a list of at most {details['ctx']['max_length']:,} items"
    return entry.kind.phrase if entry else "another type"


def _fix(description: str, where: Location, text: str) -> Fix | None:
    """An edit of a file; an override on the command line has no file to edit."""
    return Fix(description, (Edit(where, text),)) if where.end_column and where.file != SET_FILE else None


def _is_quoted_number(node: ScalarNode, entry: FieldEntry | None) -> bool:
    """Whether a number is wanted and the quotes are all that is wrong."""
    if not node.quoted or entry is None or entry.kind.number is None:
        return False
    number = resolve(node.text)
    return isinstance(number, int if entry.kind.number is int else int | float) and not isinstance(number, bool)
