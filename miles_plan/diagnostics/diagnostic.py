"""A finding about the user's input, and the exception that carries findings up to the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from miles_plan.diagnostics.codes import explanation
from miles_plan.diagnostics.location import Location

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Edit:
    """Put `replacement` where `location` (start and end known) is."""

    location: Location
    replacement: str


@dataclass(frozen=True, slots=True)
class Fix:
    """A change that is safe to make without asking: it can only turn the mistake into what was meant."""

    description: str
    edits: tuple[Edit, ...]


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One finding: what is wrong, where, and what to do about it.

    `code` is a key of the table in `codes`; `field` the dotted path of the spec field, if it is about one; `help` one line
    that says what to do; `notes` the arithmetic or other places that matter.
    """

    code: str
    message: str
    location: Location | None = None
    severity: Severity = "error"
    field: str = ""
    help: str = ""
    notes: tuple[str, ...] = ()
    fix: Fix | None = None

    def __post_init__(self) -> None:
        """Refuse a code that has no page: `explain` must know every code that is ever shown."""
        explanation(self.code)


def error(
    code: str,
    message: str,
    location: Location | None = None,
    *,
    field: str = "",
    help: str = "",
    notes: Iterable[str] = (),
    fix: Fix | None = None,
) -> Diagnostic:
    """A finding that stops the command."""
    return Diagnostic(code, message, location, "error", field, help, tuple(notes), fix)


def warning(
    code: str,
    message: str,
    location: Location | None = None,
    *,
    field: str = "",
    help: str = "",
    notes: Iterable[str] = (),
    fix: Fix | None = None,
) -> Diagnostic:
    """A finding that the user should see and may leave as it is."""
    return Diagnostic(code, message, location, "warning", field, help, tuple(notes), fix)


def by_place(diagnostics: Iterable[Diagnostic]) -> tuple[Diagnostic, ...]:
    """The findings in reading order: by file, line and column; those without a place come last."""
    nowhere = Location("\uffff")
    return tuple(sorted(diagnostics, key=lambda each: (each.location or nowhere, each.code, each.message)))


@dataclass
class PlanError(Exception):
    """The user's input cannot be used: all findings at once, and the text of the files they point into.

    `sources` maps a file name, as the locations spell it, to its text, so that whoever renders the findings can show the lines.
    """

    diagnostics: tuple[Diagnostic, ...]
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Sort the findings; a PlanError without an error is a bug of the caller."""
        if not any(each.severity == "error" for each in self.diagnostics):
            raise ValueError("PlanError needs at least one diagnostic of severity 'error'")
        self.diagnostics = by_place(self.diagnostics)
        Exception.__init__(self, self.diagnostics, self.sources)

    def __str__(self) -> str:
        """One line a finding, for logs and for pytest; the command line renders the full form."""
        return "\n".join(f"{each.location or '-'}: {each.severity}[{each.code}]: {each.message}" for each in self.diagnostics)
