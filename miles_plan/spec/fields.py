"""Every field of the spec as data: its path, meaning, kind, default and unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, get_type_hints

from miles_plan.spec.job import JobSpec
from miles_plan.spec.kinds import Kind, kind_of
from miles_plan.spec.section import Section

UNITS: Mapping[str, str] = MappingProxyType(
    {
        "_tokens": "tokens",
        "tokens_per_gpu": "tokens",
        "_s": "seconds",
        "_gib": "GiB (2^30 bytes)",
        "_mib": "MiB (2^20 bytes)",
        "_gbps_per_gpu": "gigabits per second",
        "_steps": "steps",
        "steps": "steps",
        "_gpus": "GPUs",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldEntry:
    """One field. `path` is dotted, with `*` for the index of a list; `default` is None when the field is required."""

    path: str
    meaning: str
    kind: Kind
    required: bool
    default: Any
    inner: tuple[str, ...]

    @property
    def default_text(self) -> str:
        """The default as a spec would have it; a section's is that of its fields."""
        match self.default:
            case Section():
                return "that of its fields"
            case None | ():
                return "absent"
            case bool():
                return str(self.default).lower()
            case _:
                return str(self.default)

    @property
    def unit(self) -> str:
        """The unit, read off the name as the naming rule demands; empty for a pure number or a word."""
        parts = self.path.split(".")
        if len(parts) > 1 and parts[-2] in ("response_tokens", "prompt_tokens") and self.kind.number:
            return "tokens"
        return next((unit for suffix, unit in UNITS.items() if parts[-1].endswith(suffix) and self.kind.number), "")


@cache
def all_fields() -> Mapping[str, FieldEntry]:
    """Every field of the spec by path, in spec order, sections before their fields."""
    return MappingProxyType({entry.path: entry for entry in _walk(JobSpec, "")})


@cache
def fields_of(section: type[Section]) -> Mapping[str, Kind]:
    """The kinds of a section's own fields."""
    hints = get_type_hints(section, include_extras=True)
    return MappingProxyType({name: kind_of(hints[name]) for name in section.__pydantic_fields__})


def pattern_of(path: str) -> str:
    """`cluster.groups.0.gpu` as the table spells it: `cluster.groups.*.gpu`."""
    return ".".join("*" if step.isdigit() else step for step in path.split("."))


def _walk(section: type[Section], prefix: str) -> Iterator[FieldEntry]:
    for name, kind in fields_of(section).items():
        info = section.__pydantic_fields__[name]
        path = f"{prefix}{name}"
        below = f"{path}.*." if kind.many else f"{path}."
        yield FieldEntry(
            path=path,
            meaning=" ".join((info.description or "").split()),
            kind=kind,
            required=info.is_required(),
            default=None if info.is_required() else info.get_default(call_default_factory=True),
            inner=tuple(kind.section.__pydantic_fields__) if kind.section else (),
        )
        if kind.section is not None:
            yield from _walk(kind.section, below)
