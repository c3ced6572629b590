"""What every part of a job spec has in common: strict, frozen, and its reads reported to the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr

from miles_plan.spec.ledger import Ledger

_get = object.__getattribute__  # looked up once: planners read specs in their inner loops


@dataclass(frozen=True, slots=True)
class Inert:
    """Put into a field's `Annotated`: no pass or backend reads it, for this reason."""

    reason: str


class Section(BaseModel):
    """A mapping of the spec. Strict: no unknown keys, no conversions, finite numbers, no assignment after loading.

    A field's docstring is its documentation: `explain --field` prints it and the JSON Schema carries it.
    """

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=False,
        protected_namespaces=(),
    )

    _place: tuple[Ledger, str] | None = PrivateAttr(default=None)

    def __getattribute__(self, name: str) -> Any:
        """Report the read of a leaf field to the ledger, if the spec was loaded with one and someone is reading."""
        value = _get(self, name)
        if name[0] == "_":
            return value
        private = _get(self, "__pydantic_private__")  # where pydantic keeps `_place`; None while a model is being built
        place = private["_place"] if private else None
        if place is not None and place[0].reader and name in type(self).__pydantic_fields__ and not _is_inner(value):
            place[0].note(place[1] + name)
        return value

    def __eq__(self, other: object) -> bool:
        """Equal when the fields are: where a spec came from and who read it do not count."""
        return isinstance(other, Section) and type(self) is type(other) and self.__dict__ == other.__dict__


def attach(section: Section, ledger: Ledger, prefix: str = "") -> None:
    """Make `section` and all sections inside it report reads to `ledger` under paths that start with `prefix`."""
    section._place = (ledger, prefix)
    for name, value in section.__dict__.items():
        for path, inner in _inner_sections(f"{prefix}{name}", value):
            attach(inner, ledger, f"{path}.")


def leaves(section: Section, prefix: str = "") -> Iterator[tuple[str, Any, Inert | None]]:
    """Each leaf field below `section` in spec order: its dotted path, its value, and its `Inert` mark if it has one."""
    for name, info in type(section).__pydantic_fields__.items():
        value = section.__dict__[name]
        path = f"{prefix}{name}"
        if not _is_inner(value):
            yield path, value, next((mark for mark in info.metadata if isinstance(mark, Inert)), None)
        for inner_path, inner in _inner_sections(path, value):
            yield from leaves(inner, f"{inner_path}.")


def _is_inner(value: object) -> bool:
    """A section or a list of sections: a place that leaves lie below, not a leaf."""
    return isinstance(value, Section) or (isinstance(value, tuple) and bool(value) and isinstance(value[0], Section))


def _inner_sections(path: str, value: object) -> Iterator[tuple[str, Section]]:
    """The section that a field holds, or those in its list, each with its path."""
    if isinstance(value, Section):
        yield path, value
    elif isinstance(value, tuple):
        yield from ((f"{path}.{index}", each) for index, each in enumerate(value) if isinstance(each, Section))
