"""YAML text -> tree with positions.

Built from PyYAML's event stream, not from its nodes: depth, size and aliases are counted while the document is read, so a
bomb is refused before it is built. Composing first would recurse (RecursionError at some thousand brackets) and accept cycles.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import yaml

from miles_plan.diagnostics import Diagnostic, Location, error, excerpt
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
    size: int = 1  # values below it with aliases expanded, itself included
    depth: int = 0  # of the deepest list or mapping inside it


class _Mark(Protocol):
    """Line and column from 0; libyaml's own marks and PyYAML's are two types."""

    line: int
    column: int


class _Stop(Exception):  # noqa: N818 - control flow inside this file, not an error of its own
    """Reading cannot go on; the finding is already noted."""


@dataclass(frozen=True, slots=True)
class _Anchored:
    """A value that aliases may stand for."""

    node: Node
    size: int
    depth: int


@dataclass
class _Reader:
    """State of one document being read. `first_line` and `first_column` place a fragment inside a larger text."""

    file: str
    text: str
    first_line: int = 1
    first_column: int = 1
    findings: list[Diagnostic] = field(default_factory=list)
    stack: list[_Open] = field(default_factory=list)
    anchors: dict[str, _Anchored | None] = field(default_factory=dict)  # None while the anchored value is open
    root: Node | None = None
    budget: int = MAX_NODES

    def at(self, start: _Mark | None, end: _Mark | None = None) -> Location:
        def place(mark: _Mark) -> tuple[int, int]:
            return self.first_line + mark.line, mark.column + (self.first_column if mark.line == 0 else 1)

        if start is None:
            return Location(self.file)
        return Location(self.file, *place(start), *(place(end) if end else (0, 0)))

    def inside(self, place: Location) -> Location:
        """`place`, or the end of the text if it lies behind: what a file lacks at its end is missed one line later."""
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
            self.note(_unused_feature(f"the tag `{excerpt(tag)}`", where, "write the value without a tag"))

    def take_alias(self, event: yaml.AliasEvent) -> None:
        where, name = self.at(event.start_mark, event.end_mark), str(event.anchor)
        if name not in self.anchors:
            raise self.stop(
                error(
                    "MP113", f"alias `*{excerpt(name)}` has no anchor before it", where, help=f"define `&{excerpt(name)}` above"
                )
            )
        target = self.anchors[name]
        if target is None:
            raise self.stop(
                error(
                    "MP113",
                    f"alias `*{excerpt(name)}` stands inside its own anchor",
                    where,
                    help="the value would contain itself",
                )
            )
        if self.stack and self.stack[-1].is_map and self.stack[-1].key is None:
            raise self.stop(_unused_feature("an alias as a key", where, "write the key out"))
        self.check_depth(target.depth, where)
        self.count(target.size, where)
        self.put(target)

    def take_scalar(self, event: yaml.ScalarEvent) -> None:
        where = self.at(event.start_mark, event.end_mark)
        parent = self.stack[-1] if self.stack else None
        if parent is not None and parent.is_map and parent.key is None:
            parent.key = (event.value, where)
            parent.size += 1
            self.count(1, where)
            return
        self.count(1, where)
        quoted = not event.implicit[0]
        done = _Anchored(ScalarNode(event.value if quoted else resolve(event.value), event.value, quoted, where), 1, 0)
        if event.anchor:
            self.anchors[event.anchor] = done
        self.put(done)

    def open(self, event: yaml.CollectionStartEvent) -> None:
        where = self.at(event.start_mark)
        if self.stack and self.stack[-1].is_map and self.stack[-1].key is None:
            raise self.stop(_unused_feature("a key that is a list or mapping", where, "write the key as one word"))
        self.check_depth(1, where)
        self.count(1, where)
        if event.anchor:
            self.anchors[event.anchor] = None
        assert event.start_mark is not None
        self.stack.append(_Open(isinstance(event, yaml.MappingStartEvent), event.start_mark, event.anchor))

    def close(self, event: yaml.CollectionEndEvent) -> None:
        frame = self.stack.pop()
        one_line = event.end_mark is not None and event.end_mark.line == frame.start.line
        where = self.at(frame.start, event.end_mark if one_line else None)
        node: Node = MapNode(frame.entries, where) if frame.is_map else ListNode(tuple(frame.items), where)
        done = _Anchored(node, frame.size, frame.depth + 1)
        if frame.anchor:
            self.anchors[frame.anchor] = done
        self.put(done)

    def put(self, done: _Anchored) -> None:
        """Hang a finished value under the open parent."""
        if not self.stack:
            self.root = done.node
            return
        parent = self.stack[-1]
        parent.size += done.size
        parent.depth = max(parent.depth, done.depth)
        if not parent.is_map:
            parent.items.append(done.node)
            return
        assert parent.key is not None  # libyaml gives key and value in turn
        (key, key_place), parent.key = parent.key, None
        if key == "<<":
            self.note(_unused_feature("a merge key", key_place, "use `base:` to share settings between files"))
        elif key in parent.entries:
            first = parent.entries[key].key_location
            message = f"duplicate key `{excerpt(key)}`"
            self.note(error("MP111", message, key_place, help="keep one of the two", notes=[f"first at {first}"]))
        else:
            parent.entries[key] = Entry(key, key_place, done.node)

    def check_depth(self, more: int, where: Location) -> None:
        if len(self.stack) + more > MAX_DEPTH:
            raise self.stop(error("MP103", f"nested deeper than {MAX_DEPTH} levels", where, help="a job spec needs about five"))

    def count(self, size: int, where: Location) -> None:
        self.budget -= size
        if self.budget < 0:
            message = f"more than {MAX_NODES:,} values once aliases are expanded"
            help = "move data into a file of its own and name the file in the spec"
            raise self.stop(error("MP103", message, where, help=help))


@dataclass(frozen=True, slots=True)
class Parsed:
    """A document read: its tree (None if reading stopped early or the text is empty), findings, and values left to read."""

    root: Node | None
    findings: list[Diagnostic]
    budget: int


def parse_yaml(text: str, file: str, *, line: int = 1, column: int = 1, budget: int = MAX_NODES) -> Parsed:
    """Read the one document in `text`.

    `file` names the text in locations; `line` and `column` say where in that file the text begins; `budget` is how many values
    it may hold once aliases are expanded.
    """
    reader = _Reader(file, text, line, column, budget=budget)
    reader.read()
    complete = reader.root is not None and not reader.stack
    return Parsed(reader.root if complete else None, reader.findings, reader.budget)


def _unused_feature(what: str, where: Location, help: str) -> Diagnostic:
    return error("MP112", f"{what} is not used in specs", where, help=help)


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
