"""YAML text -> tree with positions.

Built from PyYAML's event stream, not from its nodes: depth, size and aliases are counted while the document is read, so a
bomb is refused before it is built. Composing first would recurse (RecursionError at some thousand brackets) and accept cycles.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import yaml

from miles_plan.diagnostics import Diagnostic, Location, error
from miles_plan.spec.limits import MAX_DEPTH, MAX_FINDINGS, MAX_NODES
from miles_plan.spec.scalars import resolve
from miles_plan.spec.tree import Entry, ListNode, MapNode, Node, ScalarNode

_Loader: type[yaml.CSafeLoader] | type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class _Open:
    """A list or mapping whose end has not been seen."""

    is_map: bool
    start: _Mark
    anchor: str | None
    items: list[Node] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)
    key: tuple[str, Location] | None = None
    size: int = 1


class _Mark(Protocol):
    """Line and column from 0; libyaml's own marks and PyYAML's are two types."""

    line: int
    column: int


class _Stop(Exception):  # noqa: N818 - control flow inside this file, not an error of its own
    """Reading cannot go on; the finding is already noted."""


@dataclass
class _Reader:
    """State of one document being read. `first_line` and `first_column` place a fragment inside a larger text."""

    file: str
    text: str
    first_line: int = 1
    first_column: int = 1
    findings: list[Diagnostic] = field(default_factory=list)
    stack: list[_Open] = field(default_factory=list)
    anchors: dict[str, tuple[Node, int] | None] = field(default_factory=dict)  # None while the anchored value is open
    root: Node | None = None
    size: int = 0

    def at(self, start: _Mark | None, end: _Mark | None = None) -> Location:
        def place(mark: _Mark) -> tuple[int, int]:
            return self.first_line + mark.line, mark.column + (self.first_column if mark.line == 0 else 1)

        if start is None:
            return Location(self.file)
        return Location(self.file, *place(start), *(place(end) if end else (0, 0)))

    def inside(self, place: Location) -> Location:
        """`place`, or the end of the text if it lies behind it: what is missing at the end of a file is missed one line later."""
        lines = self.text.splitlines() or [""]
        last = self.first_line + len(lines) - 1
        if place.line <= last:
            return place
        return Location(self.file, last, len(lines[-1]) + (self.first_column if len(lines) == 1 else 1))

    def note(self, finding: Diagnostic) -> None:
        self.findings.append(finding)
        if len(self.findings) >= MAX_FINDINGS:
            raise _Stop

    def stop(self, finding: Diagnostic) -> _Stop:
        self.findings.append(finding)
        return _Stop()

    def read(self) -> None:
        loader = _Loader(self.text)
        try:
            while True:
                event: Any = loader.get_event()
                if isinstance(event, yaml.StreamEndEvent):
                    return
                self.take(event)
        except yaml.YAMLError as problem:
            self.findings.append(_syntax_error(problem, self))
        except _Stop:
            pass
        finally:
            loader.dispose()

    def take(self, event: yaml.Event) -> None:
        match event:
            case yaml.DocumentStartEvent():
                self.start_document(event)
            case yaml.AliasEvent():
                self.take_alias(event)
            case yaml.ScalarEvent():
                self.refuse_tag(event)
                self.take_scalar(event)
            case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                self.refuse_tag(event)
                self.open(event)
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                self.close(event)

    def start_document(self, event: yaml.DocumentStartEvent) -> None:
        if event.version or event.tags:
            self.note(_unused_feature("a directive", self.at(event.start_mark), "remove the line that starts with `%`"))
        if self.root is not None:
            where = self.at(event.start_mark, event.end_mark)
            raise self.stop(_unused_feature("a second document", where, "keep one job a file"))

    def refuse_tag(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent) -> None:
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            where = self.at(event.start_mark, event.end_mark)
            self.note(_unused_feature(f"the tag `{_short(tag)}`", where, "write the value without a tag"))

    def take_alias(self, event: yaml.AliasEvent) -> None:
        where, name = self.at(event.start_mark, event.end_mark), str(event.anchor)
        if name not in self.anchors:
            raise self.stop(
                error(
                    "MP113", f"alias `*{_short(name)}` has no anchor before it", where, help=f"define `&{_short(name)}` above"
                )
            )
        target = self.anchors[name]
        if target is None:
            raise self.stop(
                error(
                    "MP113",
                    f"alias `*{_short(name)}` stands inside its own anchor",
                    where,
                    help="the value would contain itself",
                )
            )
        node, size = target
        if self.stack and self.stack[-1].is_map and self.stack[-1].key is None:
            raise self.stop(_unused_feature("an alias as a key", where, "write the key out"))
        self.put(node, size, where)

    def take_scalar(self, event: yaml.ScalarEvent) -> None:
        where = self.at(event.start_mark, event.end_mark)
        parent = self.stack[-1] if self.stack else None
        if parent is not None and parent.is_map and parent.key is None:
            parent.key = (event.value, where)
            parent.size += 1
            self.count(1, where)
            return
        quoted = not event.implicit[0]
        node = ScalarNode(event.value if quoted else resolve(event.value), event.value, quoted, where)
        if event.anchor:
            self.anchors[event.anchor] = (node, 1)
        self.put(node, 1, where)

    def open(self, event: yaml.CollectionStartEvent) -> None:
        where = self.at(event.start_mark)
        if self.stack and self.stack[-1].is_map and self.stack[-1].key is None:
            raise self.stop(_unused_feature("a key that is a list or mapping", where, "write the key as one word"))
        if len(self.stack) >= MAX_DEPTH:
            raise self.stop(error("MP103", f"nested deeper than {MAX_DEPTH} levels", where, help="a job spec needs about five"))
        if event.anchor:
            self.anchors[event.anchor] = None
        assert event.start_mark is not None
        self.stack.append(_Open(isinstance(event, yaml.MappingStartEvent), event.start_mark, event.anchor))

    def close(self, event: yaml.CollectionEndEvent) -> None:
        done = self.stack.pop()
        one_line = event.end_mark is not None and event.end_mark.line == done.start.line
        where = self.at(done.start, event.end_mark if one_line else None)
        node: Node = MapNode(done.entries, where) if done.is_map else ListNode(tuple(done.items), where)
        if done.anchor:
            self.anchors[done.anchor] = (node, done.size)
        self.put(node, 1, where, counted=done.size - 1)

    def put(self, node: Node, size: int, where: Location, counted: int = 0) -> None:
        """Hang `node` under the open parent. `counted` of its values were counted when they were read."""
        self.count(size, where)
        if not self.stack:
            self.root = node
            return
        parent = self.stack[-1]
        parent.size += size + counted
        if not parent.is_map:
            parent.items.append(node)
            return
        assert parent.key is not None  # libyaml gives key and value in turn
        (key, key_place), parent.key = parent.key, None
        if key == "<<":
            self.note(_unused_feature("a merge key", key_place, "use `base:` to share settings between files"))
        elif key in parent.entries:
            first = parent.entries[key].key_location
            self.note(
                error(
                    "MP111",
                    f"duplicate key `{_short(key)}`",
                    key_place,
                    help="keep one of the two",
                    notes=[f"first at {first}"],
                )
            )
        else:
            parent.entries[key] = Entry(key, key_place, node)

    def count(self, size: int, where: Location) -> None:
        self.size += size
        if self.size > MAX_NODES:
            raise self.stop(
                error(
                    "MP103",
                    f"more than {MAX_NODES:,} values once aliases are expanded",
                    where,
                    help="move data into a file of its own and name the file in the spec",
                )
            )


def parse_yaml(text: str, file: str, *, line: int = 1, column: int = 1) -> tuple[Node | None, list[Diagnostic]]:
    """The document in `text`, and what is wrong with it. The tree is None if reading stopped early or the text is empty.

    `file` names the text in locations; `line` and `column` say where in that file the text begins.
    """
    reader = _Reader(file, text, line, column)
    reader.read()
    complete = reader.root is not None and not reader.stack
    return (reader.root if complete else None), reader.findings


def _unused_feature(what: str, where: Location, help: str) -> Diagnostic:
    return error("MP112", f"{what} is not used in specs", where, help=help)


def _short(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:57]}..."


def _syntax_error(problem: yaml.YAMLError, reader: _Reader) -> Diagnostic:
    what = str(getattr(problem, "problem", None) or "cannot be read")
    context, begun = getattr(problem, "context", None), reader.at(getattr(problem, "context_mark", None))
    where = reader.at(getattr(problem, "problem_mark", None) or getattr(problem, "context_mark", None))
    notes = [f"{context} that starts at {begun}"] if context and begun.line and begun.line != where.line else []
    return error("MP110", f"not valid YAML: {what}", reader.inside(where), help=_syntax_help(what), notes=notes)


def _syntax_help(what: str) -> str:
    if "cannot start any token" in what:
        return (
            "indent with spaces, not tabs, and quote text that starts with a special character such as `@`, `%` or a backquote"
        )
    if "expected ',' or" in what or "did not find expected ',' or" in what:
        return "close the bracket, or separate the items with commas"
    if "mapping values are not allowed" in what:
        return "quote text that contains `: `, and start the keys of one mapping in the same column"
    if "end of stream" in what:
        return "a quote or bracket that was opened is not closed"
    if "could not find expected ':'" in what:
        return "write `key: value` with a space after the colon"
    return "look at this place and just before it: brackets, quotes, and keys of one mapping in the same column"
