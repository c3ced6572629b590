"""The trace of planned against measured, which ui.perfetto.dev opens without an install.

Two processes, `planned` and `measured`; in each a track for the loops, one for the iterations, one a group, and one a GPU
(of a large cluster: one for all GPUs that the same groups hold). Memory and metrics are counters, events are marks, and
arrows follow the edges of the graph. The format is `trace_events`'s.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from miles_plan.ir.group import DeviceGroup, GpuSpan
from miles_plan.ir.plan import Plan, plan_sha256
from miles_plan.ir.tasks import AnyTask
from miles_plan.report.atomic_file import write_whole
from miles_plan.report.cluster_map import gpu_blocks
from miles_plan.report.metrics import NOT_CURVES
from miles_plan.report.run_facts import SHOWN_AS_SLICES, event_text
from miles_plan.report.run_files import RunRecord, is_number, read_run
from miles_plan.report.schedule import PlannedRun, iteration_runs, loop_schedules, runs_in
from miles_plan.report.start import start_steps
from miles_plan.report.task_times import iteration_spans
from miles_plan.report.trace_events import Arrow, Counter, Mark, ProcessTrace, Slice, events_of
from miles_plan.report.units import GIB, estimate_text
from miles_plan.report.wording import device_noun, memory_place

PLANNED, MEASURED = 1, 2
MOST_GPU_TRACKS = 16
ITERATIONS_OF_A_PLAN = 20
ITERATIONS_WITH_ARROWS = 20


def write_trace(source: Path | Plan, path: Path) -> None:
    """Write the trace of a run directory, or of the first iterations of a plan. PlanFileError for a directory without one."""
    trace = plan_trace(source) if isinstance(source, Plan) else run_trace(read_run(source))
    write_whole(path, json.dumps(trace, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n")


def plan_trace(plan: Plan, *, iterations: int = ITERATIONS_OF_A_PLAN) -> dict[str, Any]:
    """The first iterations of each loop as planned."""
    return _trace(plan, _planned(plan, {loop.name: min(loop.iterations, iterations) for loop in plan.graph.loops}))


def run_trace(record: RunRecord) -> dict[str, Any]:
    """Every iteration that ran, planned and measured. Both clocks start at 0 and are never set right: drift shows as drift."""
    counts = {loop.name: max(iteration_spans(record, loop.name), default=-1) + 1 for loop in record.plan.graph.loops}
    return _trace(record.plan, _planned(record.plan, counts), _measured(record))


def _trace(plan: Plan, *processes: ProcessTrace) -> dict[str, Any]:
    events = [event for process in processes for event in events_of(process)]
    about = {"plan": plan.name, "plan_sha256": plan_sha256(plan), "written_by": f"miles-plan {plan.tool_version}"}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def _process(plan: Plan, pid: int, name: str) -> ProcessTrace:
    """A process whose tracks stand in a fixed order: loops, iterations, groups, GPUs."""
    process = ProcessTrace(pid, name)
    groups = plan.graph.groups
    names = ["loops", "iterations", *(_group_track(plan, group) for group in groups)]
    names += [track for group in groups if group.gpus for track in _gpu_tracks(plan, group.gpus)]
    process.tracks.update({track: [] for track in names})
    return process


def _group_track(plan: Plan, group: DeviceGroup) -> str:
    where = f", {device_noun(plan.cluster)}s {group.gpus}" if group.gpus else ""
    return f"{group.name} ({group.engine}{where})"


def _gpu_tracks(plan: Plan, gpus: GpuSpan) -> list[str]:
    """One a GPU, or one a block of equally held GPUs where there are many."""
    noun = device_noun(plan.cluster)
    if plan.cluster.num_gpus <= MOST_GPU_TRACKS:
        return [f"{noun} {gpu}" for gpu in range(gpus.first, gpus.end)]
    return [f"{noun}s {block.gpus}" for block in gpu_blocks(plan) if block.gpus.overlaps(gpus)]


def _add_task(process: ProcessTrace, plan: Plan, task: AnyTask, piece: Slice) -> None:
    """A task's run on the track of its group and on those of its GPUs."""
    if task.group is None:
        process.add("no group", piece)
        return
    group = plan.graph.group(task.group)
    process.add(_group_track(plan, group), piece)
    for track in _gpu_tracks(plan, group.gpus) if group.gpus else ():
        process.add(track, piece)


def _planned(plan: Plan, counts: dict[str, int]) -> ProcessTrace:
    """Iterations from second 0, each with the tasks that run in it, as far apart as the plan has them."""
    process = _process(plan, PLANNED, "planned")
    now_s = 0.0
    for loop, schedule in zip(plan.graph.loops, loop_schedules(plan), strict=True):
        began_s = end_s = now_s
        tasks = sorted(plan.graph.topological(loop.name), key=lambda task: task.start_s or 0.0)
        for iteration in range(counts[loop.name]):
            active = [task for task in tasks if runs_in(task, iteration, loop.iterations)]
            runs = iteration_runs(tasks, active)
            _add_iteration(process, plan, iteration, runs, now_s)
            end_s = now_s + max((run.end_s for run in runs), default=0.0)
            process.add("iterations", _iteration_slice(loop.name, iteration, now_s, end_s))
            now_s = now_s + schedule.iteration_s if schedule.overlaps else end_s
        now_s = end_s
        if counts[loop.name]:
            args = {"iterations": counts[loop.name], "of": loop.iterations}
            process.add("loops", Slice(loop.name, began_s, now_s, "loop", args))
    return process


def _add_iteration(process: ProcessTrace, plan: Plan, iteration: int, runs: list[PlannedRun], now_s: float) -> None:
    """Tasks, memory and arrows of one planned iteration that begins at `now_s`."""
    starts = {}
    for run in runs:
        key = (run.task.loop, iteration, run.task.name)
        args = {"iteration": iteration, "kind": run.task.kind} | _estimate_args(run.task)
        _add_task(process, plan, run.task, Slice(run.task.name, now_s + run.start_s, now_s + run.end_s, "task", args, key))
        starts[run.task.name] = now_s + run.start_s
    for timeline in plan.graph.memory:
        name = f"memory of {memory_place(timeline, plan.cluster)}"
        for phase in timeline.phases:
            if phase.task in starts:
                process.counters.append(Counter(name, starts[phase.task], {"GiB": round(phase.total_bytes / GIB, 4)}))
    _add_arrows(process, plan, runs[0].task.loop if runs else "", iteration)


def _add_arrows(process: ProcessTrace, plan: Plan, loop: str, iteration: int) -> None:
    """One an edge within the iteration; those of later iterations would only be more of the same."""
    if iteration >= ITERATIONS_WITH_ARROWS:
        return
    for edge in plan.graph.edges:
        if edge.distance == 0:
            process.arrows.append(Arrow(edge.carries, (loop, iteration, edge.src), (loop, iteration, edge.dst)))


def _iteration_slice(loop: str, iteration: int, begin_s: float, end_s: float) -> Slice:
    return Slice(f"{loop} {iteration}", begin_s, end_s, "iteration", {"loop": loop, "iteration": iteration})


def _measured(record: RunRecord) -> ProcessTrace:
    """What ran, when it ran; runs of tasks that the plan does not know have a track of their own."""
    plan = record.plan
    process = _process(plan, MEASURED, "measured")
    known = {task.name: task for task in plan.graph.tasks}
    for run in record.runs:
        task = known.get(run.task)
        args = {"iteration": run.iteration, "attempt": run.attempt} | (_estimate_args(task) if task else {})
        piece = Slice(run.task, run.start_s, run.end_s, "task", args, (run.loop, run.iteration, run.task))
        if task is None:
            process.add("not in the plan", piece)
        else:
            _add_task(process, plan, task, piece)
    for step in start_steps(record):
        process.add("start", Slice(step.name, step.start_s, step.end_s, "start", dict(step.parts_s)))
    for loop in plan.graph.loops:
        _add_measured_loop(process, record, loop.name)
    for event in record.events:
        if event["kind"] in SHOWN_AS_SLICES:
            continue
        args = {key: value if is_number(value) else str(value) for key, value in event.items()}
        process.marks.append(Mark(event_text(event), max(0.0, float(event["time_s"])), args))
    return process


def _add_measured_loop(process: ProcessTrace, record: RunRecord, loop: str) -> None:
    """A loop's iterations, its arrows, and its metrics as counters at the end of each iteration."""
    spans = iteration_spans(record, loop)
    for iteration, (begin_s, end_s) in sorted(spans.items()):
        process.add("iterations", _iteration_slice(loop, iteration, begin_s, end_s))
        _add_arrows(process, record.plan, loop, iteration)
    if spans:
        begin_s, end_s = min(begin for begin, _ in spans.values()), max(end for _, end in spans.values())
        process.add("loops", Slice(loop, begin_s, end_s, "loop", {"iterations": len(spans)}))
    for row in record.metrics:
        if row["loop"] == loop and row["iteration"] in spans:
            at_s = spans[row["iteration"]][1]
            values = {key: value for key, value in row.items() if key not in NOT_CURVES and is_number(value)}
            process.counters.append(Counter(loop, at_s, values))


def _estimate_args(task: AnyTask) -> dict[str, Any]:
    estimate = task.estimate
    if estimate is None:
        return {}
    return {"planned": estimate_text(estimate.low_s, estimate.mid_s, estimate.high_s, "s"), "basis": estimate.basis}
