"""What the start of a run was made of: Ray, initial weights, processes, engines, one after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from miles_plan.report.run_files import Row, RunRecord, is_number
from miles_plan.report.units import seconds_text

SHOWN_S = 0.01
NAMES = {"cluster_started": "Ray", "start_step": "{}", "checkpoint_loaded": "load {}"}


@dataclass(frozen=True, slots=True)
class StartStep:
    """A part of a start, in seconds since the run began. Parts overlap: each began when what it needed was there.

    parts_s: what an engine says its own start was made of; empty for what is not one engine's.
    """

    name: str
    start_s: float
    end_s: float
    parts_s: Mapping[str, float]
    of_one_engine: bool

    @property
    def took_s(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


def start_steps(record: RunRecord) -> list[StartStep]:
    """The parts of every start of the run (a run that was resumed has several), as they ended."""
    return [_step(event) for event in record.events if event["kind"] in NAMES and is_number(event.get("seconds"))]


def last_start(record: RunRecord) -> list[StartStep]:
    """The parts of the last start, up to its first task."""
    begins = [float(event["time_s"]) for event in record.events if event["kind"] in ("run_started", "run_resumed")]
    ends = [float(event["time_s"]) for event in record.events if event["kind"] == "loop_started"]
    begin_s = max(begins, default=0.0)
    end_s = min((each for each in ends if each >= begin_s), default=float("inf"))
    return [step for step in start_steps(record) if begin_s <= step.end_s <= end_s]


def start_text(record: RunRecord) -> str:
    """`23.1 s: 3.1 s Ray, 0.8 s initial weights, ...`: what each part added to those before it; empty where none is known."""
    steps = [step for step in last_start(record) if not step.of_one_engine]
    if not steps:
        return ""
    begin_s = at_s = min(step.start_s for step in steps)
    words = []
    for step in steps:
        if step.end_s - at_s >= SHOWN_S:
            words.append(f"{seconds_text(step.end_s - at_s)} {step.name}")
        at_s = max(at_s, step.end_s)
    return f"{seconds_text(at_s - begin_s)}: {', '.join(words)}"


def engine_texts(record: RunRecord) -> list[str]:
    """`@rollout rank 0: 31 s (imports 12 s, ...)` of each rank whose engine says what its start was made of."""
    found = []
    for step in last_start(record):
        parts = [f"{name} {seconds_text(seconds)}" for name, seconds in step.parts_s.items()]
        found += [f"{step.name} {seconds_text(step.took_s)} ({', '.join(parts)})"] if parts else []
    return found


def _step(event: Row) -> StartStep:
    end_s, parts = float(event["time_s"]), event.get("parts_s")
    return StartStep(
        name=NAMES.get(event["kind"], "{}").format(event["subject"]),
        start_s=max(0.0, end_s - float(event["seconds"])),
        end_s=end_s,
        parts_s=dict(parts) if isinstance(parts, dict) else {},
        of_one_engine=parts is not None,
    )
