from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_plan.ir.plan import Plan
from miles_plan.report.perfetto import plan_trace, run_trace, write_trace
from miles_plan.report.run_files import read_run
from miles_plan.report.trace_events import Slice, lanes_of, nanoseconds

REQUIRED = {  # fields of each phase in the Trace Event Format, beside ph, pid and name
    "M": {"args"},
    "X": {"tid", "ts", "dur", "cat"},
    "C": {"ts", "args"},
    "i": {"tid", "ts", "s"},
    "s": {"tid", "ts", "id", "cat"},
    "f": {"tid", "ts", "id", "cat", "bp"},
}
Trace = dict[str, Any]


def assert_chrome_trace(trace: Trace) -> None:
    """The rules of the Chrome trace event format that viewers rely on."""
    assert json.loads(json.dumps(trace, allow_nan=False)) == trace
    assert trace["displayTimeUnit"] in ("ms", "ns")
    events = trace["traceEvents"]
    for event in events:
        assert event["ph"] in REQUIRED, event
        assert REQUIRED[event["ph"]] | {"pid", "name"} <= set(event), event
        assert isinstance(event["name"], str)
        assert all(isinstance(event[key], int) for key in ("pid", "tid") if key in event)
        assert all(isinstance(event[key], int | float) and event[key] >= 0 for key in ("ts", "dur") if key in event)
    assert all(isinstance(value, int | float) for e in events if e["ph"] == "C" for value in e["args"].values())
    assert_named_once(events)
    assert_slices_follow_each_other(events)
    assert_arrows_meet_slices(events)


def assert_named_once(events: list[Trace]) -> None:
    names = [(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"]
    assert len(names) == len(set(names))
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} == set(names)
    assert {e["pid"] for e in events} == {e["pid"] for e in events if e["name"] == "process_name"}


def assert_slices_follow_each_other(events: list[Trace]) -> None:
    """No two slices of one track number overlap, to the nanosecond."""
    tracks = defaultdict(list)
    for event in (e for e in events if e["ph"] == "X"):
        tracks[(event["pid"], event["tid"])].append((round(event["ts"] * 1000), round((event["ts"] + event["dur"]) * 1000)))
    for slices in tracks.values():
        for (_, end), (begin, _) in pairwise(sorted(slices)):
            assert end <= begin


def assert_arrows_meet_slices(events: list[Trace]) -> None:
    """Arrows come in pairs, forwards in time, and both ends lie in a slice."""
    ends: dict[int, dict[str, Trace]] = defaultdict(dict)
    for event in (e for e in events if e["ph"] in "sf"):
        ends[event["id"]][event["ph"]] = event
    slices = [e for e in events if e["ph"] == "X"]
    for pair in list(ends.values())[:200]:
        assert set(pair) == {"s", "f"}
        assert pair["s"]["ts"] <= pair["f"]["ts"]
        for end in pair.values():
            own = [e for e in slices if (e["pid"], e["tid"]) == (end["pid"], end["tid"])]
            assert any(e["ts"] <= end["ts"] <= e["ts"] + e["dur"] for e in own)


def tracks_of(trace: Trace, pid: int) -> list[str]:
    return [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name" and e["pid"] == pid]


def test_the_trace_of_a_plan(any_plan: Plan) -> None:
    assert_chrome_trace(plan_trace(any_plan, iterations=3))


def test_the_trace_of_a_run_has_planned_and_measured(run_dir: Path) -> None:
    trace = run_trace(read_run(run_dir))
    assert_chrome_trace(trace)
    processes = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert processes == {1: "planned", 2: "measured"}
    for pid in processes:
        names = tracks_of(trace, pid)
        assert names[:4] == ["loops", "iterations", "train (torch, ranks 0..1)", "rollout (torch, ranks 0..1)"]
        assert {"rank 0", "rank 1"} <= set(names)


def test_every_measured_attempt_is_there_once_a_track(run_dir: Path) -> None:
    record = read_run(run_dir)
    events = run_trace(record)["traceEvents"]
    train = next(e["tid"] for e in events if e["name"] == "thread_name" and e["pid"] == 2 and "train (" in e["args"]["name"])
    shown = sum(e["ph"] == "X" and e["pid"] == 2 and e["tid"] == train for e in events)
    assert shown == sum(run.group == "train" for run in record.runs)
    attempts = [e["args"]["attempt"] for e in events if e["ph"] == "X" and e["pid"] == 2 and e["name"] == "rollout"]
    assert attempts.count(1) == 3  # on the group and on both ranks
    marks = [e["name"] for e in events if e["ph"] == "i"]
    assert "task failed, rollout@23: actor died: signal 9 (attempt=0)" in marks


def test_a_thousand_gpus_share_a_track(moe_plan: Plan) -> None:
    names = tracks_of(plan_trace(moe_plan, iterations=2), 1)
    assert [name for name in names if name.startswith("GPU")] == ["GPUs 0..1023"]


def test_memory_is_a_counter_in_each_phase(moe_plan: Plan) -> None:
    counters = [e for e in plan_trace(moe_plan, iterations=1)["traceEvents"] if e["ph"] == "C"]
    gpu = [e["args"]["GiB"] for e in counters if "GPU" in e["name"]]
    in_order = sorted(moe_plan.graph.memory[0].phases, key=lambda phase: moe_plan.graph.task(phase.task).start_s or 0)
    assert gpu == pytest.approx([phase.total_bytes / 2**30 for phase in in_order if phase.name != "save"], abs=1e-3)


def test_writing(tmp_path: Path, run_dir: Path, moe_plan: Plan) -> None:
    write_trace(run_dir, tmp_path / "run.json")
    write_trace(moe_plan, tmp_path / "plan.json")
    for name in ("run.json", "plan.json"):
        assert_chrome_trace(json.loads((tmp_path / name).read_text(encoding="utf-8")))


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 10)), max_size=40))
def test_lanes_hold_every_slice_and_no_overlap(times: list[tuple[float, float]]) -> None:
    slices = [Slice(str(at), begin, begin + took, "task", {}) for at, (begin, took) in enumerate(times)]
    lanes = lanes_of(slices)
    assert sorted(piece.name for lane in lanes for piece in lane) == sorted(piece.name for piece in slices)
    for lane in lanes:
        assert all(nanoseconds(one.end_s) <= nanoseconds(two.start_s) for one, two in pairwise(lane))


def test_iterations_that_overlap_begin_at_the_planned_distance(disaggregated_plan: Plan) -> None:
    step = replace(disaggregated_plan.estimates[0], name="step time (rl)", unit="s", low=30.0, mid=40.0, high=50.0)
    trace = plan_trace(replace(disaggregated_plan, estimates=(step,)), iterations=4)
    assert_chrome_trace(trace)
    starts = sorted(e["ts"] for e in trace["traceEvents"] if e.get("cat") == "iteration")
    assert starts == pytest.approx([0, 40e6, 80e6, 120e6])
