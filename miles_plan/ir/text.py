"""The text form: one task a line, fields that differ from their default, and a parser that gives the same graph back.

    graph "grpo" [logical placed] {
      loop rl iterations=100
      group @train role="train" engine="torch" gpus={first=0 count=2} train_layout={tp=2}
      %train = train_step(samples:%rollout, weights:%sync^1) loss={kind="sft"} loop="rl" group="train"
    }

Scalars are JSON; `{...}` is a nested record, `[...]` a list; `^d` is an edge's distance.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter

from miles_plan.ir.graph import TaskGraph
from miles_plan.ir.tasks import Task

FACT_ORDER = ("logical", "placed", "aligned", "sized", "synced", "priced", "guarded", "scheduled")


def to_text(graph: TaskGraph) -> str:
    """The graph as text, tasks in topological order where there is one."""
    facts = " ".join(fact for fact in FACT_ORDER if fact in graph.facts)
    lines = [f"graph {json.dumps(graph.name)} [{facts}] {{"]
    lines += [f"  loop {loop.name} {_record_fields(loop, skip={'name'})}" for loop in graph.loops]
    lines += [f"  group @{group.name} {_record_fields(group, skip={'name'})}" for group in graph.groups]
    lines += [f"  {_task_line(graph, task)}" for task in graph.tasks]
    lines += [f"  memory {_record_fields(timeline)}" for timeline in graph.memory]
    return "\n".join([*lines, "}", ""])


def _task_line(graph: TaskGraph, task: Task) -> str:
    inputs = ", ".join(
        f"{edge.carries}:%{edge.src}" + (f"^{edge.distance}" if edge.distance else "") for edge in graph.inputs_of(task.name)
    )
    kind = getattr(task, "kind")  # noqa: B009 - every concrete task has it, the base class does not
    rest = _record_fields(task, skip={"name", "kind"})
    return f"%{task.name} = {kind}({inputs}) {rest}".rstrip()


def _record_fields(record: Any, skip: frozenset[str] | set[str] = frozenset()) -> str:
    """`key=value` for every field that has no default or differs from it."""
    parts = []
    for each in fields(record):
        value = getattr(record, each.name)
        if each.name in skip or (each.default is not MISSING and value == each.default):
            continue
        parts.append(f"{each.name}={_value(value)}")
    return " ".join(parts)


def _value(value: Any) -> str:
    if is_dataclass(value) and not isinstance(value, type):
        return "{" + _record_fields(value) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return json.dumps(value)


TOKEN = re.compile(
    r'\s*(?:(?P<string>"(?:[^"\\]|\\.)*")|(?P<number>-?(?:\d+\.?\d*(?:[eE][+-]?\d+)?|Infinity)|NaN)'
    r"|(?P<name>[A-Za-z_][\w.\-]*)|(?P<mark>[{}\[\]()=,:%@^]))"
)


class TextError(ValueError):
    """The text is not a graph: line, column and what was expected there."""


def parse(text: str) -> TaskGraph:
    """The graph that `to_text` printed. TextError says where the text is not one; comments start with `#`."""
    return _Parser(text).graph()


class _Parser:
    """Recursive descent over one token stream; records become dicts that the IR's own types then validate."""

    def __init__(self, text: str) -> None:
        self.text = "\n".join(line if not line.lstrip().startswith("#") else "" for line in text.split("\n"))
        self.tokens = list(self._scan())
        self.index = 0

    def _scan(self) -> Iterator[tuple[str, str, int]]:
        position, end = 0, len(self.text.rstrip())
        while position < end:
            match = TOKEN.match(self.text, position)
            if match is None:
                raise self._error(position, "a token")
            group = match.lastgroup
            assert group is not None
            yield group, match.group(group), match.start(group)
            position = match.end()

    def _error(self, position: int, expected: str) -> TextError:
        line = self.text.count("\n", 0, position) + 1
        column = position - self.text.rfind("\n", 0, position)
        found = self.text[position : position + 20].split("\n")[0]
        return TextError(f"line {line}, column {column}: expected {expected}, found '{found}'")

    def peek(self) -> str:
        return self.tokens[self.index][1] if self.index < len(self.tokens) else ""

    def take(self, expected: str | None = None, kind: str | None = None) -> str:
        if self.index >= len(self.tokens):
            raise self._error(len(self.text), f"'{expected}'" if expected else f"a {kind or 'token'}")
        found_kind, value, position = self.tokens[self.index]
        if (expected is not None and value != expected) or (kind is not None and found_kind != kind):
            raise self._error(position, f"'{expected}'" if expected else f"a {kind}")
        self.index += 1
        return value

    def value(self) -> Any:
        if self.peek() == "{":
            self.take("{")
            record = self.fields()
            self.take("}")
            return record
        if self.peek() == "[":
            return self.items()
        kind, text, position = self.tokens[self.index]
        if kind in ("string", "number") or text in ("true", "false", "null", "NaN", "Infinity"):
            self.index += 1
            return json.loads(text)
        raise self._error(position, "a value")

    def items(self) -> list[Any]:
        self.take("[")
        found = []
        while self.peek() != "]":
            found.append(self.value())
            if self.peek() == ",":
                self.take(",")
        self.take("]")
        return found

    def fields(self) -> dict[str, Any]:
        """`key=value` pairs for as long as they come."""
        found: dict[str, Any] = {}
        while (
            self.index + 1 < len(self.tokens) and self.tokens[self.index][0] == "name" and self.tokens[self.index + 1][1] == "="
        ):
            key = self.take(kind="name")
            self.take("=")
            found[key] = self.value()
        return found

    def inputs(self, dst: str) -> list[dict[str, Any]]:
        self.take("(")
        edges = []
        while self.peek() != ")":
            carries = self.take(kind="name")
            self.take(":")
            self.take("%")
            edge: dict[str, Any] = {"src": self.take(kind="name"), "dst": dst, "carries": carries}
            if self.peek() == "^":
                self.take("^")
                edge["distance"] = int(self.take(kind="number"))
            edges.append(edge)
            if self.peek() == ",":
                self.take(",")
        self.take(")")
        return edges

    def graph(self) -> TaskGraph:
        self.take("graph")
        graph: dict[str, Any] = {"name": json.loads(self.take(kind="string")), "loops": [], "groups": [], "tasks": []}
        graph |= {"edges": [], "memory": [], "facts": []}
        self.take("[")
        while self.peek() != "]":
            graph["facts"].append(self.take(kind="name"))
        self.take("]")
        self.take("{")
        while self.peek() != "}":
            self.line(graph)
        self.take("}")
        return _graph_adapter().validate_python(graph)

    def line(self, graph: dict[str, Any]) -> None:
        """One line of the body: a task, a loop, a group or a memory timeline."""
        word = self.take()
        if word == "%":
            name = self.take(kind="name")
            self.take("=")
            kind = self.take(kind="name")
            graph["edges"] += self.inputs(name)
            graph["tasks"].append({"name": name, "kind": kind, **self.fields()})
        elif word == "loop":
            graph["loops"].append({"name": self.take(kind="name"), **self.fields()})
        elif word == "group":
            self.take("@")
            graph["groups"].append({"name": self.take(kind="name"), **self.fields()})
        elif word == "memory":
            graph["memory"].append(self.fields())
        else:
            raise self._error(self.tokens[self.index - 1][2], "a task, 'loop', 'group' or 'memory'")


@lru_cache(maxsize=1)
def _graph_adapter() -> TypeAdapter[TaskGraph]:
    """Built on first use: it compiles validators for every task kind."""
    return TypeAdapter(TaskGraph)
