"""Plans at the edges: nothing in a part, zeros, very long names, mixed clusters. Every form must still be drawn."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from miles_plan.ir.graph import Loop
from miles_plan.ir.memory import MemoryPhase
from miles_plan.ir.plan import Candidate, Plan
from miles_plan.report.compare import compare_plans
from miles_plan.report.html import plan_html
from miles_plan.report.perfetto import plan_trace
from miles_plan.report.terminal import render_difference, render_plan
from tests.report.test_html import assert_sound
from tests.report.test_perfetto import assert_chrome_trace


def without_parts(plan: Plan) -> Plan:
    return replace(
        plan, decisions=(), estimates=(), candidates=(), transfers=(), numerics=(), failures=(), environment=(), sources=()
    )


def without_memory(plan: Plan) -> Plan:
    return replace(plan, graph=replace(plan.graph, memory=()))


def with_empty_memory(plan: Plan) -> Plan:
    empty = replace(plan.graph.memory[0], phases=(), capacity_bytes=0, margin_bytes=0)
    nothing = replace(empty, phases=(MemoryPhase(name="idle", task="train", terms=(), high_bytes=0),))
    return replace(plan, graph=replace(plan.graph, memory=(empty, nothing)))


def without_estimates(plan: Plan) -> Plan:
    return replace(plan, graph=plan.graph.with_replaced(*(replace(t, estimate=None, start_s=None) for t in plan.graph.tasks)))


def with_a_loop_of_nothing(plan: Plan) -> Plan:
    return replace(plan, graph=replace(plan.graph, loops=(*plan.graph.loops, Loop(name="nothing", iterations=3))))


def with_one_candidate(plan: Plan) -> Plan:
    free = Candidate(train_layout="", rollout_layout="", placement="", step_s=0, gpu_hours_per_step=0, headroom_bytes=0)
    return replace(plan, candidates=(free,))


def with_long_names(plan: Plan) -> Plan:
    long = replace(plan.decisions[0], field="f" * 150, value="v" * 150, reason="r" * 300)
    return replace(plan, name="n" * 300, decisions=(long, *plan.decisions[1:]))


def on_a_mixed_cluster(plan: Plan) -> Plan:
    return replace(plan, cluster=replace(plan.cluster, groups=(("h200", 1, 8), ("h100", 2, 4))))


@pytest.mark.parametrize(
    "change",
    [
        without_parts,
        without_memory,
        with_empty_memory,
        without_estimates,
        with_a_loop_of_nothing,
        with_one_candidate,
        with_long_names,
        on_a_mixed_cluster,
    ],
)
def test_every_form_of_an_odd_plan_is_drawn(change: Callable[[Plan], Plan], embedded_plan: Plan) -> None:
    plan = change(embedded_plan)
    file = io.StringIO()
    render_plan(plan, Console(file=file, width=80), full=True)
    render_difference(compare_plans(embedded_plan, plan), Console(file=file, width=80))
    assert max(map(len, file.getvalue().splitlines())) <= 80
    assert_sound(plan_html(plan))
    assert_chrome_trace(plan_trace(plan, iterations=2))
