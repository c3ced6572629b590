"""A YAML document as a tree whose every key and value knows its place; what layering merges and validation points into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from miles_plan.diagnostics import Location

Plain = None | bool | int | float | str


@dataclass(frozen=True, slots=True)
class ScalarNode:
    """One value. `text` is how it was written, without quotes; `quoted` whether it had them."""

    value: Plain
    text: str
    quoted: bool
    location: Location


@dataclass(frozen=True, slots=True)
class ListNode:
    """A sequence; `location` spans it if it lies on one line, else its first character."""

    items: tuple[Node, ...]
    location: Location


@dataclass(frozen=True, slots=True)
class Entry:
    """A key of a mapping and its value."""

    key: str
    key_location: Location
    value: Node


@dataclass(frozen=True, slots=True)
class MapNode:
    """A mapping; `location` as for lists."""

    entries: Mapping[str, Entry]
    location: Location


Node = ScalarNode | ListNode | MapNode
Path = tuple[str, ...]


def to_data(node: Node) -> object:
    """The tree as plain dicts, lists and scalars."""
    match node:
        case ScalarNode():
            return node.value
        case ListNode():
            return [to_data(item) for item in node.items]
        case MapNode():
            return {key: to_data(entry.value) for key, entry in node.entries.items()}


def from_data(data: object, file: str) -> Node:
    """Plain data as a tree without positions, for callers who have no file; TypeError for anything YAML could not hold."""
    place = Location(file)
    if data is None or isinstance(data, bool | int | float | str):
        return ScalarNode(data, str(data), isinstance(data, str), place)
    if isinstance(data, Mapping):
        if not all(isinstance(key, str) for key in data):
            raise TypeError("keys of a job mapping must be strings")
        return MapNode({key: Entry(key, place, from_data(value, file)) for key, value in data.items()}, place)
    if isinstance(data, Sequence):
        return ListNode(tuple(from_data(item, file) for item in data), place)
    raise TypeError(f"a job mapping cannot hold {type(data).__name__}")


def child(node: Node, step: str) -> Node | None:
    """The value under a key or list index, or None."""
    if isinstance(node, MapNode):
        entry = node.entries.get(step)
        return entry.value if entry else None
    if isinstance(node, ListNode) and step.isascii() and step.isdigit() and len(step) < 9 and int(step) < len(node.items):
        return node.items[int(step)]
    return None


def find(node: Node, path: Path) -> Node | None:
    """The value at `path`, or None."""
    for step in path:
        found = child(node, step)
        if found is None:
            return None
        node = found
    return node


def key_location(node: Node, path: Path) -> Location | None:
    """Where the key at the end of `path` is written; for a list item, where the item is; None if absent."""
    if not path:
        return node.location
    parent = find(node, path[:-1])
    if isinstance(parent, MapNode):
        entry = parent.entries.get(path[-1])
        return entry.key_location if entry else None
    item = child(parent, path[-1]) if parent else None
    return item.location if item else None


def value_location(node: Node, path: Path) -> Location | None:
    """The best place to point at for the value at `path`: itself if it lies on one line, else its key; None if absent."""
    value = find(node, path)
    if value is None:
        return None
    spans_one_line = value.location.line == value.location.end_line and value.location.end_column > value.location.column
    return value.location if spans_one_line or not path else key_location(node, path)
