from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plan.ir.plan import Estimate, Plan, to_json
from miles_plan.report.compare import Change, compare_plans, records_of, to_data
from tests.report.sample_plans import NAMES, load_plan

KNOWN_BODY = {
    "name", "tool_version", "spec", "spec_sha256", "sources", "cluster", "run", "graph", "decisions", "estimates", "candidates",
    "transfers", "numerics", "failures", "environment", "imports", "unread_fields", "diagnostics",
}  # fmt: skip


def test_a_plan_is_the_same_as_itself(any_plan: Plan) -> None:
    comparison = compare_plans(any_plan, any_plan)
    assert comparison.same
    assert comparison.before == comparison.after


def test_what_was_decided_otherwise_is_listed(embedded_plan: Plan) -> None:
    decisions = list(embedded_plan.decisions)
    decisions[1] = replace(decisions[1], value="tp2", reason="the spec fixes it")
    gone = decisions.pop()
    estimate = replace(embedded_plan.estimates[0], low=1.0, mid=2.49, high=4.0)
    after = replace(embedded_plan, decisions=tuple(decisions), estimates=(estimate, *embedded_plan.estimates[1:]))
    comparison = compare_plans(embedded_plan, after)
    listed = [(change.section, change.key, change.field, change.kind) for change in comparison.changes]
    assert listed == [
        ("decisions", "train.layout", "value", "changed"),
        ("decisions", "train.layout", "reason", "changed"),
        ("decisions", gone.field, "", "removed"),
        ("estimates", "step", "expected", "changed"),
    ]
    step = comparison.of("estimates")[0]
    assert (step.before_text, step.after_text, step.delta) == (
        "1.66 s (1.3\N{EN DASH}2.8)",
        "2.49 s (1\N{EN DASH}4)",
        "+50%",
    )


def test_layouts_tasks_and_memory_are_compared_field_by_field(embedded_plan: Plan) -> None:
    graph = embedded_plan.graph
    train = replace(graph.group("train"), train_layout=replace(graph.group("train").train_layout, tp=2, dp=1, ep=1))  # type: ignore[type-var]
    task = replace(graph.task("rollout"), deadline_s=120.0)
    phase = replace(graph.memory[0].phases[0], high_bytes=2**30)
    memory = (replace(graph.memory[0], phases=(phase, *graph.memory[0].phases[1:])), *graph.memory[1:])
    groups = tuple(train if group.name == "train" else group for group in graph.groups)
    after = replace(embedded_plan, graph=replace(graph.with_replaced(task), groups=groups, memory=memory))
    found = {(c.section, c.key, c.field): (c.before_text, c.after_text) for c in compare_plans(embedded_plan, after).changes}
    assert found == {
        ("groups", "train", "train_layout.dp"): ("2", "1"),
        ("groups", "train", "train_layout.tp"): ("1", "2"),
        ("groups", "train", "train_layout.ep"): ("2", "1"),
        ("tasks", "rollout", "deadline_s"): ("60 s", "120 s"),
        ("memory", "gpu, warm start", "high_bytes"): ("494.1 MiB", "1 GiB"),
    }


def test_another_order_of_rows_is_a_difference(embedded_plan: Plan) -> None:
    after = replace(embedded_plan, decisions=embedded_plan.decisions[::-1])
    assert [change.field for change in compare_plans(embedded_plan, after).changes] == ["order of rows"]


def test_every_part_of_a_plan_is_compared(embedded_plan: Plan) -> None:
    """A part that is added to the plan must be added to the comparison."""
    assert set(to_json(embedded_plan)["plan"]) == KNOWN_BODY


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_leaf_of_a_plan_can_change_unseen(data: st.DataObject) -> None:
    body = to_json(load_plan(data.draw(st.sampled_from(NAMES))))["plan"]
    # The part is drawn first, for most leaves are the graph's.
    part = data.draw(st.sampled_from([name for name, value in body.items() if value]))
    path = data.draw(st.sampled_from([(part, *rest) for rest in _leaves(body[part])]))
    changed = copy.deepcopy(body)
    place: Any = changed
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = _other(place[path[-1]])
    assert records_of(body) != records_of(changed), path


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Any:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(item, (*path, name))
    elif isinstance(value, list) and value:
        for at, item in enumerate(value):
            yield from _leaves(item, (*path, at))
    elif value != []:  # what an empty list would hold is not known here
        yield path


def _other(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return "changed"
    return value + 1 if isinstance(value, int | float) else f"{value}x" if isinstance(value, str) else ["changed"]


def test_json_has_every_change_with_raw_values(embedded_plan: Plan) -> None:
    estimates = (Estimate(name="new", unit="s", low=1, mid=2, high=3, basis="b"), *embedded_plan.estimates)
    found = to_data(compare_plans(embedded_plan, replace(embedded_plan, estimates=estimates, name="other")))
    assert json.loads(json.dumps(found)) == found
    assert not found["same"]
    assert [(each["section"], each["key"], each["kind"]) for each in found["changes"]] == [
        ("job", "", "changed"),
        ("estimates", "new", "added"),
    ]
    assert found["changes"][1]["after"]["expected"] == {"low": 1, "mid": 2, "high": 3}


@pytest.mark.parametrize(
    ("value", "field", "text"),
    [
        (None, "x", "-"),
        (2**30, "total_bytes", "1 GiB"),
        (90.0, "deadline_s", "90 s"),
        ([["rollout", 0.5]], "terms", "rollout 0.5"),
        ("0f" * 32, "sha256", "0f0f0f0f0f0f"),
        ([], "facts", "none"),
        (True, "partial", "True"),
    ],
)
def test_values_read_well(value: Any, field: str, text: str) -> None:
    assert Change("x", "k", field, "changed", value, None).before_text == text
