"""Merged tree -> JobSpec, or every mistake as a diagnostic at the exact key or value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, cast, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from miles_plan.diagnostics import Diagnostic, Location, error
from miles_plan.spec.fields import all_fields
from miles_plan.spec.job import JobSpec
from miles_plan.spec.limits import MAX_FINDINGS
from miles_plan.spec.mistakes import bad_value, missing_key, unknown_key
from miles_plan.spec.origins import Origins
from miles_plan.spec.rules import UNKNOWN, breaches
from miles_plan.spec.section import Section
from miles_plan.spec.tree import MapNode, Node, Path, child, find, to_data
from miles_plan.spec.types import VALUE_TAG, WORD_TAG


def validate(root: MapNode, file: str) -> JobSpec | list[Diagnostic]:
    """The spec in `root`, or all that is wrong with its fields and rules. `file` is the spec the user named."""
    origins = Origins(root, file)
    try:
        spec = JobSpec.model_validate(to_data(root), context={"rules_apart": True})
    except ValidationError as problem:
        first = problem.errors(include_url=False)[: MAX_FINDINGS + 1]
        found = [_diagnose(details, origins) for details in first]
        return [*_one_a_place(found), *_breaches(origins, _Pieces(root))]
    return list(_breaches(origins, spec.value_at)) or spec


class _Pieces:
    """Values of a spec that is wrong somewhere: each section is validated alone, so that rules still run on the valid ones."""

    def __init__(self, root: MapNode) -> None:
        self._root = root

    def __call__(self, path: str) -> object:
        node = find(self._root, tuple(path.split(".")))
        if node is None:
            return UNKNOWN
        try:
            return _adapter(path).validate_python(to_data(node))
        except ValidationError:
            return UNKNOWN


@cache
def _adapter(path: str) -> TypeAdapter[Any]:
    parent, _, name = path.rpartition(".")
    section = cast(type[Section], all_fields()[parent].kind.section) if parent else JobSpec
    return TypeAdapter(get_type_hints(section, include_extras=True)[name])


def _breaches(origins: Origins, value_at: Callable[[str], object]) -> Iterator[Diagnostic]:
    for breach in breaches(value_at):
        yield error(breach.code, breach.message, origins.at(breach.field), field=breach.field, help=breach.help)


def _diagnose(details: ErrorDetails, origins: Origins) -> Diagnostic:
    match details["type"]:
        case "extra_forbidden":
            *section, key = _known_steps(details, origins)
            return unknown_key(tuple(section), key, origins)
        case "missing":
            *section, key = _known_steps(details, origins)
            return missing_key(tuple(section), key, origins)
        case _:
            return bad_value(_known_steps(details, origins), details, origins)


def _known_steps(details: ErrorDetails, origins: Origins) -> Path:
    """Pydantic's location as a path of the tree: without the names of union branches, and no deeper than the tree goes."""
    at_key = details["type"] in ("missing", "extra_forbidden")
    steps = [str(step) for step in details["loc"] if step not in (WORD_TAG, VALUE_TAG)]
    node: Node = origins.root
    known: list[str] = []
    for step in steps[:-1] if at_key else steps:
        inner = child(node, step)
        if inner is None:
            break
        known.append(step)
        node = inner
    return (*known, steps[-1]) if at_key else tuple(known)


def _one_a_place(found: list[Diagnostic]) -> Iterator[Diagnostic]:
    """The first finding of each place: branches of a union each complain about the same value."""
    seen: set[tuple[Location | None, str]] = set()
    for each in found:
        if (each.location, each.field) not in seen:
            seen.add((each.location, each.field))
            yield each
