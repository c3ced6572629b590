"""Findings as JSON data: the stable form for tools, and what every text form is rendered from, so the two cannot disagree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

from miles_plan.diagnostics.diagnostic import Diagnostic, Edit, Severity, by_place
from miles_plan.diagnostics.location import Location

SCHEMA = "miles-plan/diagnostics/1"


class LocationView(TypedDict):
    """A place; the numbers as in `Location`."""

    file: str
    line: int
    column: int
    end_line: int
    end_column: int


class EditView(TypedDict):
    """One edit, and the line it changes before and after."""

    location: LocationView
    replacement: str
    old_line: str
    new_line: str


class FixView(TypedDict):
    """A fix that is safe to apply."""

    description: str
    edits: list[EditView]


class DiagnosticView(TypedDict):
    """One finding. `source_line` is the text of the line named, or null where it is not known."""

    code: str
    severity: Severity
    message: str
    field: str
    location: LocationView | None
    source_line: str | None
    help: str
    notes: list[str]
    fix: FixView | None


class Summary(TypedDict):
    """Findings by severity."""

    errors: int
    warnings: int
    notes: int


class Report(TypedDict):
    """What `check --format json` prints."""

    schema: str
    diagnostics: list[DiagnosticView]
    summary: Summary


def report(diagnostics: Iterable[Diagnostic], sources: Mapping[str, str]) -> Report:
    """The findings in reading order; `sources` maps the file names of their places to text."""
    lines = {file: text.splitlines() for file, text in sources.items()}
    views = [_view(each, lines) for each in by_place(diagnostics)]
    count = {severity: sum(view["severity"] == severity for view in views) for severity in ("error", "warning", "note")}
    summary = Summary(errors=count["error"], warnings=count["warning"], notes=count["note"])
    return Report(schema=SCHEMA, diagnostics=views, summary=summary)


def _view(diagnostic: Diagnostic, lines: Mapping[str, Sequence[str]]) -> DiagnosticView:
    fix = diagnostic.fix
    return DiagnosticView(
        code=diagnostic.code,
        severity=diagnostic.severity,
        message=diagnostic.message,
        field=diagnostic.field,
        location=_location(diagnostic.location) if diagnostic.location else None,
        source_line=_line(diagnostic.location, lines) if diagnostic.location else None,
        help=diagnostic.help,
        notes=list(diagnostic.notes),
        fix=FixView(description=fix.description, edits=[_edit(each, lines) for each in fix.edits]) if fix else None,
    )


def _location(place: Location) -> LocationView:
    return LocationView(
        file=place.file, line=place.line, column=place.column, end_line=place.end_line, end_column=place.end_column
    )


def _line(place: Location, lines: Mapping[str, Sequence[str]]) -> str | None:
    text = lines.get(place.file, ())
    return text[place.line - 1] if 1 <= place.line <= len(text) else None


def _edit(edit: Edit, lines: Mapping[str, Sequence[str]]) -> EditView:
    place, old = edit.location, _line(edit.location, lines) or ""
    new = old[: place.column - 1] + edit.replacement + old[place.end_column - 1 :]
    return EditView(location=_location(place), replacement=edit.replacement, old_line=old, new_line=new)
