"""The start of a run in a sentence: what each part added, the parts of engines apart, a resumed run's last start only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from miles_plan.ir.plan import Plan
from miles_plan.report.perfetto import write_trace
from miles_plan.report.run_facts import run_facts
from miles_plan.report.run_files import RunRecord, read_run
from miles_plan.report.start import engine_texts, last_start, start_text
from tests.report.sample_run import RunWriter


def event(time_s: float, kind: str, subject: str, **fields: Any) -> dict[str, Any]:
    return {"time_s": time_s, "kind": kind, "owner": "start", "subject": subject, **fields}


ENGINE = {"imports": 11.2, "early": 20.0, "engine": 14.1, "Capturing batches": 4.0}
EVENTS = [
    event(0.0, "run_started", "run"),
    event(8.0, "cluster_started", "ray", seconds=8.0),
    event(10.0, "start_step", "initial weights", seconds=2.0),
    event(10.0, "start_step", "data sets", seconds=2.0),
    event(12.5, "start_step", "processes and their imports", seconds=4.5),
    event(26.5, "start_step", "@train rank 0: engine", seconds=9.0, parts_s={}),
    event(26.5, "start_step", "@rollout rank 0: engine", seconds=14.0, parts_s=ENGINE),
    event(26.6, "start_step", "engines of @train, @rollout", seconds=14.1),
    event(26.7, "loop_started", "rl"),
    event(90.0, "start_step", "engines of @rollout", seconds=5.0),
]


def record_of(plan: Plan, folder: Path, events: list[dict[str, Any]]) -> RunRecord:
    run = RunWriter(plan).write(folder / "run", rl_iterations=2)
    (run / "events.jsonl").write_text("".join(json.dumps(each) + "\n" for each in events), encoding="utf-8")
    return read_run(run)


def test_a_start_is_told_by_what_each_part_added(embedded_plan: Plan, tmp_path: Path) -> None:
    record = record_of(embedded_plan, tmp_path, EVENTS)
    assert start_text(record) == (
        "26.6 s: 8 s Ray, 2 s initial weights, 2.5 s processes and their imports, 14.1 s engines of @train, @rollout"
    )
    assert engine_texts(record) == [
        "@rollout rank 0: engine 14 s (imports 11.2 s, early 20 s, engine 14.1 s, Capturing batches 4 s)"
    ]
    assert [fact for fact in run_facts(record) if fact[0] == "start"] == [("start", start_text(record))]


def test_a_resumed_run_tells_its_last_start(embedded_plan: Plan, tmp_path: Path) -> None:
    resumed = [
        event(100.0, "run_resumed", "run"),
        event(103.0, "cluster_started", "ray", seconds=3.0),
        event(105.0, "checkpoint_loaded", "step-000003", seconds=1.5),
    ]
    record = record_of(embedded_plan, tmp_path, EVENTS + resumed)
    assert [step.name for step in last_start(record)] == ["Ray", "load step-000003"]
    assert start_text(record) == "5 s: 3 s Ray, 2 s load step-000003"


def test_a_run_that_says_nothing_of_its_start_has_no_such_line(embedded_plan: Plan, tmp_path: Path) -> None:
    record = record_of(embedded_plan, tmp_path, [])
    assert start_text(record) == ""
    assert engine_texts(record) == []
    assert not [fact for fact in run_facts(record) if fact[0] == "start"]


def test_the_trace_has_a_track_of_the_start(embedded_plan: Plan, tmp_path: Path) -> None:
    record = record_of(embedded_plan, tmp_path, EVENTS)
    write_trace(record.path, tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    slices = [each for each in trace["traceEvents"] if each.get("cat") == "start"]
    (engine,) = [each for each in slices if each["name"] == "@rollout rank 0: engine"]
    assert (engine["ts"], engine["dur"]) == (12.5e6, 14e6)
    assert engine["args"] == ENGINE
