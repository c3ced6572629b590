"""The folder of one run: where each file lies, and the lock that keeps a second run out of it.

plan.json          the plan that runs, exactly as compiled
run.json           what the first start fixed and a resume repeats: seed, threads of each actor, tool version
journal.sqlite     every instance of a task: started, completed or failed
events.jsonl       what happened and what waits for what, append-only
metrics.jsonl      one line an iteration
timeline.jsonl     when each task ran, as measured, one line an attempt
tensorboard/       the same metrics for TensorBoard
checkpoints/       step-000040/ with its manifest.json, written last
data/              rows that a generator made for this run
final/             the trained policy as a Hugging Face checkpoint
summary.json, report.html, trace.json   written at the end
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles_plan.backends.executor.durable_files import naming


class RunDirectoryError(RuntimeError):
    """The folder cannot be used: it names the path and who or what is in the way."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths below the folder of a run."""

    root: Path

    @property
    def plan(self) -> Path:
        """The plan file."""
        return self.root / "plan.json"

    @property
    def settings(self) -> Path:
        """What the first start fixed."""
        return self.root / "run.json"

    @property
    def journal(self) -> Path:
        """The SQLite journal."""
        return self.root / "journal.sqlite"

    @property
    def events(self) -> Path:
        """The event log."""
        return self.root / "events.jsonl"

    @property
    def metrics(self) -> Path:
        """One JSON line an iteration."""
        return self.root / "metrics.jsonl"

    @property
    def timeline(self) -> Path:
        """Measured start and end of every task."""
        return self.root / "timeline.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.root / "checkpoints"

    @property
    def data(self) -> Path:
        """Rows made for this run."""
        return self.root / "data"

    @property
    def final(self) -> Path:
        """The trained policy."""
        return self.root / "final"

    @property
    def summary(self) -> Path:
        """The figures of the run."""
        return self.root / "summary.json"

    @property
    def logs(self) -> Path:
        """Output of the actors, kept when a run fails."""
        return self.root / "logs"

    def is_fresh(self) -> bool:
        """Whether no run has started here."""
        return not self.plan.exists() and not self.journal.exists()

    def make(self) -> list[Path]:
        """Create the folder and those below it; returns the folders that were not there. OSError names the path."""
        inside = (self.tensorboard, self.checkpoints, self.data)
        made = [folder for folder in (*inside, self.root, *self.root.parents) if not folder.exists()]
        for folder in (self.root, *inside):
            with naming(folder):
                folder.mkdir(parents=True, exist_ok=True)
        return made

    def unmake(self, made: Sequence[Path]) -> None:
        """Remove what `make` made, after a refusal: the lock, rows that were written for it, and folders then empty."""
        for file in (self.root / "lock", *(self.data.iterdir() if self.data in made else ())):
            file.unlink(missing_ok=True)
        for folder in made:  # innermost first
            with contextlib.suppress(OSError):  # others put something there
                folder.rmdir()

    @contextlib.contextmanager
    def locked(self) -> Iterator[dict[str, Any] | None]:
        """Hold the folder for this process. Yields what a dead owner left behind, None after a clean end.

        The lock is the kernel's (`flock`), so it cannot outlive its owner; the content only says who holds it.
        RunDirectoryError names a live owner.
        """
        path = self.root / "lock"
        with naming(path), path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = _read_owner(path)
                who = (
                    f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"
                    if owner
                    else "another process"
                )
                raise RunDirectoryError(f"{self.root} is in use by {who}") from None
            left_behind = _read_owner(path)
            self.write_owner({})
            yield left_behind or None
            path.write_text("", encoding="utf-8")

    def write_owner(self, details: dict[str, Any]) -> None:
        """Say in the lock file who holds it and what must be cleaned up if the owner dies."""
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            **details,
        }
        (self.root / "lock").write_text(json.dumps(owner) + "\n", encoding="utf-8")


def _read_owner(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}
