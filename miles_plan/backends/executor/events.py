"""The event log: what happened, and for every wait who waits, for what, how long it may, and how long it has."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from miles_plan.backends.executor.durable_files import naming

EventKind = Literal[
    "run_started",
    "run_resumed",
    "run_finished",
    "run_failed",
    "interrupted",
    "cluster_started",
    "start_step",
    "actors_started",
    "loop_started",
    "task_started",
    "waiting",
    "overdue",
    "task_completed",
    "task_failed",
    "task_retried",
    "actors_rebuilt",
    "rolled_back",
    "weights_published",
    "weights_acknowledged",
    "weights_released",
    "checkpoint_written",
    "checkpoint_loaded",
    "checkpoint_refused",
    "digest_differs",
    "cleaned_up",
    "warning",
]


class EventLog:
    """Appends one JSON line an event.

    time_s: seconds since the run first started; kind; owner: the task instance or part that the event is of; subject: what it
    is about or waits for; then further fields by kind, such as `deadline_s` and `age_s` of a wait.
    """

    def __init__(self, path: Path, *, epoch: float) -> None:
        """Open for appending; `epoch` is when the run first started. OSError names the path."""
        self.path, self.epoch = path, epoch
        with naming(path):
            self._file = path.open("a", encoding="utf-8")

    def write(self, kind: EventKind, owner: str, subject: str, **fields: Any) -> None:
        """One event, visible to readers when this returns."""
        event = {"time_s": round(time.time() - self.epoch, 4), "kind": kind, "owner": owner, "subject": subject, **fields}
        with naming(self.path):
            self._file.write(json.dumps(event, ensure_ascii=False, default=str) + "\n")
            self._file.flush()

    def earlier(self, kind: EventKind) -> list[Mapping[str, Any]]:
        """All events of a kind, of earlier sessions too."""
        return [event for event in read_lines(self.path) if event.get("kind") == kind]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """The records of a JSONL file in order; a line that a crash cut short is left out, a missing file is empty."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record
