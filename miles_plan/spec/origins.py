"""Where each value of a resolved spec comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miles_plan.diagnostics import Location
from miles_plan.spec.layers import SET_FILE
from miles_plan.spec.tree import MapNode, find, key_location, value_location


@dataclass(frozen=True, slots=True)
class Origin:
    """`default`, or written in a `file` or a `--set` override, then with its place."""

    kind: Literal["default", "file", "set"]
    location: Location | None = None

    def __str__(self) -> str:
        """`default`, or `file:line:column`."""
        return "default" if self.location is None else str(self.location)


@dataclass(frozen=True, slots=True)
class Origins:
    """Places of the values in a merged tree, by dotted path (`rollout.temperature`, `cluster.groups.0.gpu`)."""

    root: MapNode
    file: str

    def of(self, path: str) -> Origin:
        """Where the value at `path` was written; `default` if it was not. Any path is answered, known to the spec or not."""
        place = value_location(self.root, _steps(path))
        if place is None:
            return Origin("default")
        return Origin("set" if place.file == SET_FILE else "file", place)

    def at(self, path: str) -> Location:
        """Where a diagnostic about `path` points: to the value, or else the nearest section around it that is written."""
        steps = _steps(path)
        while steps and find(self.root, steps) is None:
            steps = steps[:-1]
        return value_location(self.root, steps) or Location(self.file)

    def key(self, path: str) -> Location:
        """As `at`, but the key instead of the value."""
        return key_location(self.root, _steps(path)) or self.at(path)


def _steps(path: str) -> tuple[str, ...]:
    return tuple(path.split(".")) if path else ()
