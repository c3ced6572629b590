"""Two plans side by side: what was decided, placed, priced and promised differently.

Both plans are cut into records (a decision by its field, a task by its name, an estimate by its name, ...), and records of the
same key are compared field by field. Nothing of a plan is left out: two plans compare equal only if their digests would.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from miles_plan.ir.plan import Plan, plan_sha256, to_json
from miles_plan.report.units import bytes_text, change_text, estimate_text, number_text, quantity_text, seconds_text

Kind = Literal["added", "removed", "changed"]
Records = dict[str, dict[str, Any]]

SECTIONS = (
    "job",
    "spec",
    "cluster",
    "decisions",
    "groups",
    "estimates",
    "memory",
    "candidates",
    "precision",
    "loops",
    "tasks",
    "edges",
    "transfers",
    "failures",
    "environment",
    "warnings",
)
ESTIMATE = ("low", "mid", "high")
DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")


@dataclass(frozen=True, slots=True)
class Change:
    """One difference. field is `` where a whole record was added or removed; before and after are JSON values."""

    section: str
    key: str
    field: str
    kind: Kind
    before: Any
    after: Any
    unit: str = ""

    @property
    def before_text(self) -> str:
        """The old value as people read it."""
        return value_text(self.before, self.unit, self.field)

    @property
    def after_text(self) -> str:
        """The new value as people read it."""
        return value_text(self.after, self.unit, self.field)

    @property
    def delta(self) -> str:
        """`+12%` where both are numbers, or estimates, whose middles count."""
        before, after = _middle(self.before), _middle(self.after)
        return change_text(before, after) if before is not None and after is not None else ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All differences between two plans, by section."""

    before: str  # digests
    after: str
    changes: tuple[Change, ...]

    @property
    def same(self) -> bool:
        """Whether the plans are one."""
        return not self.changes

    def of(self, section: str) -> list[Change]:
        """The changes of one section."""
        return [change for change in self.changes if change.section == section]

    def count(self, kind: Kind) -> int:
        """How many changes of a kind there are."""
        return sum(change.kind == kind for change in self.changes)


def compare_plans(before: Plan, after: Plan) -> Comparison:
    """What changed from one plan to the other."""
    old, new = records_of(to_json(before)["plan"]), records_of(to_json(after)["plan"])
    changes = [change for section in SECTIONS for change in _section(section, old[section], new[section])]
    digests = plan_sha256(before), plan_sha256(after)
    if not changes and digests[0] != digests[1]:
        changes.append(Change("job", "", "order of rows", "changed", *digests))
    return Comparison(*digests, tuple(changes))


def to_data(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON data."""
    return {
        "before": comparison.before,
        "after": comparison.after,
        "same": comparison.same,
        "changes": [
            {
                "section": change.section,
                "key": change.key,
                "field": change.field,
                "kind": change.kind,
                "before": change.before,
                "after": change.after,
                "delta": change.delta,
            }
            for change in comparison.changes
        ],
    }


def records_of(body: Mapping[str, Any]) -> dict[str, Records]:
    """The JSON body of a plan cut into sections, records and fields."""
    graph, run = body["graph"], body["run"]
    job = {name: body[name] for name in ("name", "tool_version", "spec_sha256", "sources", "imports", "unread_fields")}
    return {
        "job": {"": job | _flat(run) | {"facts": sorted(graph["facts"]), "graph": graph["name"]}},
        "spec": {"": _flat(body["spec"])},
        "cluster": {"": body["cluster"]},
        "decisions": _keyed(body["decisions"], "field"),
        "groups": _keyed([_flat(group) for group in graph["groups"]], "name"),
        "loops": _keyed(graph["loops"], "name"),
        "tasks": _keyed([_flat(_timed(task)) for task in graph["tasks"]], "name"),
        "edges": _keyed([{"edge": _edge_text(edge)} for edge in graph["edges"]], "edge"),
        "memory": _memory(graph["memory"]),
        "estimates": _keyed([_estimate(each) for each in body["estimates"]], "name"),
        "candidates": _keyed(body["candidates"], "train_layout", "rollout_layout", "placement"),
        "precision": _keyed(body["numerics"], "op"),
        "transfers": _keyed(body["transfers"], "pattern"),
        "failures": _keyed(body["failures"], "task"),
        "environment": {"": _pairs(body["environment"])},
        "warnings": _keyed(body["diagnostics"], "code", "message"),
    }


def value_text(value: Any, unit: str, field: str) -> str:
    """A JSON value with the unit that its estimate or its field's name gives it; digests are cut short."""
    if value is None:
        return "-"
    if _is_number(value):
        return _number_text(value, unit, field)
    if isinstance(value, list):
        if len(value) == 2 and isinstance(value[0], str) and _is_number(value[1]):
            return f"{value[0]} {value_text(value[1], unit, field)}"
        return ", ".join(value_text(item, unit, field) for item in value) or "none"
    if isinstance(value, Mapping):
        if set(value) == set(ESTIMATE):
            return estimate_text(float(value["low"]), float(value["mid"]), float(value["high"]), unit)
        return ", ".join(f"{name} {value_text(item, str(value.get('unit', unit)), name)}" for name, item in value.items())
    return DIGEST.sub(r"\1", str(value))


def _number_text(value: float, unit: str, field: str) -> str:
    if unit:
        return quantity_text(float(value), unit)
    if field.endswith("bytes"):
        return bytes_text(value)
    return seconds_text(value) if field.endswith("_s") else number_text(value, 6)


def _section(section: str, old: Records, new: Records) -> Iterator[Change]:
    """Changes of one section, in the order of the old plan, what is new at the end."""
    for key in [*old, *(key for key in new if key not in old)]:
        if key not in new:
            yield Change(section, key, "", "removed", old[key], None)
        elif key not in old:
            yield Change(section, key, "", "added", None, new[key])
        else:
            yield from _fields(section, key, old[key], new[key])


def _fields(section: str, key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for field in dict.fromkeys((*old, *new)):
        before, after = old.get(field), new.get(field)
        if before != after or (field in old) != (field in new):
            kind: Kind = "added" if field not in old else "removed" if field not in new else "changed"
            yield Change(section, key, field, kind, before, after, _unit(section, field, new))


def _keyed(rows: list[dict[str, Any]], *keys: str) -> Records:
    """Rows by the values of `keys`; rows that share them are numbered."""
    records: Records = {}
    for row in rows:
        key = base = ", ".join(str(row.get(name, "")) for name in keys)
        number = 1
        while key in records:
            number += 1
            key = f"{base} ({number})"
        records[key] = {name: value for name, value in row.items() if name not in keys}
    return records


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined with dots; estimates and everything else stay as they are."""
    if not isinstance(value, Mapping) or (path and not value) or set(value) == set(ESTIMATE):
        return {path: value}
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{path}.{name}" if path else str(name))
    return flat


def _pairs(pairs: list[Any]) -> dict[str, Any]:
    """Name-value pairs as a mapping; a name that comes twice keeps all its values."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        found[name] = value if name not in found else f"{found[name]}; {value}"
    return found


def _unit(section: str, field: str, record: Mapping[str, Any]) -> str:
    """The unit of a field whose name does not say it."""
    if section == "estimates" and field in ("expected", "terms"):
        return str(record.get("unit", ""))
    return "s" if section == "tasks" and field == "takes" else ""


def _estimate(row: Mapping[str, Any]) -> dict[str, Any]:
    """An estimate with its interval as one value, so that it changes as one."""
    rest = {name: value for name, value in row.items() if name not in ESTIMATE}
    return {"expected": {end: row[end] for end in ESTIMATE}} | rest


def _timed(task: Mapping[str, Any]) -> dict[str, Any]:
    """A task with its time estimate as one value and its basis beside it."""
    found, estimate = dict(task), task.get("estimate")
    if estimate is not None:
        found["takes"] = {end: estimate[f"{end}_s"] for end in ESTIMATE}
        found["estimate"] = {name: value for name, value in estimate.items() if name not in {f"{end}_s" for end in ESTIMATE}}
    return found


def _memory(timelines: list[dict[str, Any]]) -> Records:
    """A record a place, and one for each of its phases: total, upper end, and every term by owner and name.

    Places are numbered, not named by their GPUs, so that the same job on more GPUs is still compared phase by phase.
    """
    records: Records = {}
    for timeline in timelines:
        place = _free(records, timeline["place"])
        records[place] = {name: value for name, value in timeline.items() if name not in ("place", "phases", "gpus")}
        records[place] |= _flat({"gpus": timeline["gpus"]})
        for phase in timeline["phases"]:
            terms: dict[str, int] = {}
            for term in phase["terms"]:
                terms[_free(terms, f"{term['owner']}.{term['name']} bytes")] = term["size_bytes"]
            total = {"total_bytes": sum(terms.values()), "high_bytes": phase["high_bytes"], "task": phase["task"]}
            records[_free(records, f"{place}, {phase['name']}")] = total | terms
    return records


def _free(taken: Mapping[str, Any], key: str) -> str:
    """`key`, numbered if it is taken."""
    number, free = 1, key
    while free in taken:
        number += 1
        free = f"{key} ({number})"
    return free


def _edge_text(edge: Mapping[str, Any]) -> str:
    distance = f"^{edge['distance']}" if edge["distance"] else ""
    return f"{edge['src']}{distance} -> {edge['dst']} ({edge['carries']})"


def _middle(value: Any) -> float | None:
    """The number that stands for a value in a comparison, if there is one."""
    if isinstance(value, Mapping) and set(value) == set(ESTIMATE):
        return float(value["mid"])
    return float(value) if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
