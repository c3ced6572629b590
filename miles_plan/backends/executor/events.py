"""The event log: what happened, and for every wait who waits, for what, how long it may, and how long it has."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from miles_plan.backends.executor.durable_files import naming

EventKind = Literal[
    "session_started",
    "session_ended",
    "cluster_started",
    "actors_started",
    "task_started",
    "waiting",
    "overdue",
    "task_completed",
    "task_failed",
    "restarting",
    "rolled_back",
    "checkpoint_written",
    "checkpoint_refused",
    "weights_published",
    "weights_acknowledged",
    "weights_released",
    "digest_differs",
    "interrupted",
    "cleaned_up",
    "warning",
]


class EventLog:
    """Appends one JSON line an event: `time` in seconds since the epoch, `event`, and its fields."""

    def __init__(self, path: Path) -> None:
        """Open for appending. OSError names the path."""
        self.path = path
        with naming(path):
            self._file = path.open("a", encoding="utf-8")

    def write(self, event: EventKind, **fields: Any) -> None:
        """One event, visible to readers when this returns."""
        line = json.dumps({"time": round(time.time(), 4), "event": event, **fields}, ensure_ascii=False, default=str)
        with naming(self.path):
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_events(path: Path) -> Iterator[Mapping[str, Any]]:
    """Events in order; a last line that a crash cut short is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                yield event
