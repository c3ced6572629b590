"""The measured timeline: one line for every attempt at a task, which a report lays beside the planned one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from miles_plan.backends.executor.durable_files import naming


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRun:
    """One attempt. Seconds since the run first started; busy_s: of the slowest process that worked on it, waiting left out.

    peak_bytes: the most that a GPU of its processes held meanwhile, whoever held it; 0 on CPUs.
    """

    task: str
    loop: str
    iteration: int
    group: str | None
    start_s: float
    end_s: float
    busy_s: float
    attempt: int
    peak_bytes: int = 0


class TimelineFile:
    """Appends runs of tasks to timeline.jsonl."""

    def __init__(self, path: Path) -> None:
        """Open for appending. OSError names the path."""
        self.path = path
        with naming(path):
            self._file = path.open("a", encoding="utf-8")

    def write(self, run: TaskRun) -> None:
        """One line, visible to readers when this returns."""
        record = {key: round(value, 5) if isinstance(value, float) else value for key, value in asdict(run).items()}
        with naming(self.path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
