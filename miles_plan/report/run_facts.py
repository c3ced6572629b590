"""The chief results of a run in a sentence each, the same in terminal and page."""

from __future__ import annotations

from math import fsum

from miles_plan.report.metrics import REWARD, ROUTING, Metric, log_prob_verdict, loops_of, series, total
from miles_plan.report.run_files import Row, RunRecord, is_number
from miles_plan.report.schedule import loop_schedules
from miles_plan.report.start import engine_texts, start_text
from miles_plan.report.units import change_text, number_text, seconds_text

KNOWN_OF_EVENT = frozenset({"time_s", "kind", "owner", "subject"})
QUIET_EVENTS = frozenset(
    {
        "run_started",
        "run_finished",
        "cluster_started",
        "start_step",
        "actors_started",
        "loop_started",
        "task_started",
        "waiting",
        "task_completed",
        "weights_published",
        "weights_acknowledged",
        "weights_released",
        "checkpoint_written",
    }
)
SHOWN_AS_SLICES = frozenset({"task_started", "task_completed", "start_step"})  # a timeline says the same
EDGE_ITERATIONS = 3  # as in summary.json: one iteration's mean reward is too noisy to begin or end with


def run_facts(record: RunRecord) -> list[tuple[str, str]]:
    """(name, sentence) of each result; what is not known is left out."""
    facts = [("state", _state(record))]
    if start := start_text(record):
        facts += [("start", start), *(("", text) for text in engine_texts(record))]
    facts += [("reward", sentence) for loop in loops_of(record) if (sentence := _reward(record, loop))]
    if verdict := log_prob_verdict(record):
        facts.append(("log-probs", f"rollout against trainer: {verdict}"))
    if (mismatches := total(record, ROUTING)) is not None:
        facts.append(("routing", "no mismatch" if mismatches == 0 else f"{mismatches:,} mismatches"))
    if is_number(record.summary.get("restarts")):
        facts.append(("restarts", f"{record.summary['restarts']}"))
    if digest := record.summary.get("final_weights_sha256"):
        facts.append(("weights", str(digest)))
    return facts + [("unreadable", problem) for problem in record.problems]


def _state(record: RunRecord) -> str:
    """Finished or not, after how long; the time of the tasks against what was planned for them."""
    if not is_number(record.summary.get("wall_s")):
        seen_s = max([run.end_s for run in record.runs] + [float(event["time_s"]) for event in record.events], default=0.0)
        last = f", last event: {event_text(record.events[-1])}" if record.events else ""
        return f"not finished; last seen {seconds_text(seen_s)} after its start{last}"
    words = f"finished in {seconds_text(float(record.summary['wall_s']))}"
    if not record.runs:
        return words
    first_s, last_s = record.runs[0].start_s, max(run.end_s for run in record.runs)
    words += f", {seconds_text(first_s)} of it before the first task; the loops took {seconds_text(last_s - first_s)}"
    planned_s = sum(schedule.total_s for schedule in loop_schedules(record.plan))
    if planned_s <= 0:
        return words
    change = change_text(planned_s, last_s - first_s)
    return f"{words}, planned {seconds_text(planned_s)}{f' ({change})' if change else ''}"


def reward_ends(record: RunRecord, loop: str) -> tuple[float, float] | None:
    """Mean reward over the first and over the last EDGE_ITERATIONS iterations of a loop; None for a loop without rewards."""
    values = series(record, loop, Metric(REWARD, "reward")).values
    if not values:
        return None
    first, last = values[:EDGE_ITERATIONS], values[-EDGE_ITERATIONS:]
    return fsum(first) / len(first), fsum(last) / len(last)


def _reward(record: RunRecord, loop: str) -> str:
    ends = reward_ends(record, loop)
    if ends is None:
        return ""
    found = series(record, loop, Metric(REWARD, "reward"))
    best = max(found.values)
    at = found.iterations[found.values.index(best)]
    edges = f"means of {EDGE_ITERATIONS} iterations; best {number_text(best)} in iteration {at}"
    return f"{loop}: from {number_text(ends[0])} to {number_text(ends[1])}, {edges}"


def event_text(event: Row) -> str:
    """`task failed, rollout@23: actor died (signal=9)` of one event: kind, owner, subject, and what else it says."""
    owner = f", {event['owner']}" if event.get("owner") else ""
    subject = f": {event['subject']}" if event.get("subject") else ""
    more = ", ".join(f"{key}={value}" for key, value in event.items() if key not in KNOWN_OF_EVENT and value is not None)
    return f"{str(event['kind']).replace('_', ' ')}{owner}{subject}{f' ({more})' if more else ''}"


def is_quiet(event: Row) -> bool:
    """Whether an event is of the ordinary course; kinds that are not known are not."""
    return event["kind"] in QUIET_EVENTS
