"""The journal: every instance of a task with its start, its end, and the digest of what it made, in SQLite.

It answers what is done, what runs, and whether work that was repeated after a crash gave the same result as before.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from miles_plan.backends.executor.dataflow import Instance
from miles_plan.backends.executor.durable_files import naming

Status = Literal["started", "completed", "failed", "undone"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
  id INTEGER PRIMARY KEY, pid INTEGER NOT NULL, started_at REAL NOT NULL, ended_at REAL, ending TEXT
);
CREATE TABLE IF NOT EXISTS instances (
  id INTEGER PRIMARY KEY, session INTEGER NOT NULL, task TEXT NOT NULL, loop TEXT NOT NULL, iteration INTEGER NOT NULL,
  attempt INTEGER NOT NULL, status TEXT NOT NULL, started_at REAL NOT NULL, ended_at REAL,
  digest TEXT, weight_version INTEGER, error TEXT
);
CREATE INDEX IF NOT EXISTS by_instance ON instances (task, iteration, status);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalRow:
    """One run of one instance. Times are seconds since the epoch; status `undone`: a roll-back or resume took it back."""

    id: int
    session: int
    task: str
    loop: str
    iteration: int
    attempt: int
    status: Status
    started_at: float
    ended_at: float | None
    digest: str | None
    weight_version: int | None
    error: str | None


class Journal:
    """Append-only in spirit: a row changes from started to completed or failed, and later perhaps to undone."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open or create. sqlite3.Error for a file that is not a journal."""
        self.path = path
        uri = f"file:{path}?mode={'ro' if read_only else 'rwc'}"
        self._database = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        self._session = 0
        if not read_only:
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.executescript(SCHEMA)

    def begin_session(self, pid: int) -> int:
        """A process starts or resumes the run; returns the session's number, from 1."""
        self._session = self._write("INSERT INTO sessions (pid, started_at) VALUES (?, ?)", pid, time.time())
        return self._session

    def end_session(self, ending: str) -> None:
        """The process is about to end, and how."""
        self._write("UPDATE sessions SET ended_at = ?, ending = ? WHERE id = ?", time.time(), ending, self._session)

    def start(self, instance: Instance, loop: str, attempt: int) -> int:
        """An instance starts; returns its row."""
        return self._write(
            "INSERT INTO instances (session, task, loop, iteration, attempt, status, started_at) "
            "VALUES (?,?,?,?,?,'started',?)",
            self._session,
            instance.task,
            loop,
            instance.iteration,
            attempt,
            time.time(),
        )

    def complete(self, row: int, *, digest: str | None, weight_version: int | None) -> None:
        """The instance is done; what it made has this digest."""
        self._write(
            "UPDATE instances SET status='completed', ended_at=?, digest=?, weight_version=? WHERE id=?",
            time.time(),
            digest,
            weight_version,
            row,
        )

    def fail(self, row: int, error: str) -> None:
        """The instance failed."""
        self._write("UPDATE instances SET status='failed', ended_at=?, error=? WHERE id=?", time.time(), error, row)

    def undo_after(self, done: Mapping[str, int]) -> int:
        """Take back what a checkpoint does not hold: per task, iterations from `done[task]` on. Returns how many there were."""
        undone = 0
        with self._database:
            self._database.execute("BEGIN")
            for task, count in done.items():
                undone += self._database.execute(
                    "UPDATE instances SET status='undone' WHERE task=? AND iteration>=? AND status='completed'", (task, count)
                ).rowcount
                self._database.execute(
                    "UPDATE instances SET status='failed', error='its process ended' WHERE task=? AND status='started'", (task,)
                )
        return undone

    def earlier_digest(self, instance: Instance) -> str | None:
        """What the instance made the last time it completed before it was taken back."""
        row = self._database.execute(
            "SELECT digest FROM instances WHERE task=? AND iteration=? AND status='undone' ORDER BY id DESC LIMIT 1",
            (instance.task, instance.iteration),
        ).fetchone()
        return None if row is None else row[0]

    def rows(self, *, status: Status | None = None) -> Iterator[JournalRow]:
        """All rows in the order they started."""
        where, arguments = ("WHERE status=?", (status,)) if status else ("", ())
        cursor = self._database.execute(
            "SELECT id, session, task, loop, iteration, attempt, status, started_at, ended_at, digest, weight_version, error "
            f"FROM instances {where} ORDER BY id",
            arguments,
        )
        names = [column[0] for column in cursor.description]
        for row in cursor:
            yield JournalRow(**dict(zip(names, row, strict=True)))

    def completed_iterations(self) -> dict[str, int]:
        """Per task, one more than the last iteration completed and not taken back."""
        query = "SELECT task, MAX(iteration) + 1 FROM instances WHERE status='completed' GROUP BY task"
        return dict(self._database.execute(query).fetchall())

    def position(self) -> int:
        """The number of the last row."""
        return int(self._database.execute("SELECT COALESCE(MAX(id), 0) FROM instances").fetchone()[0])

    def sessions(self) -> list[tuple[int, float, float | None, str | None]]:
        """(pid, started_at, ended_at, ending) of each session; no end for one that was killed."""
        return self._database.execute("SELECT pid, started_at, ended_at, ending FROM sessions ORDER BY id").fetchall()

    def seconds_so_far(self) -> float:
        """Seconds of all sessions, a killed one counted to its last sign of life."""
        total = 0.0
        for number, (_, started, ended, _) in enumerate(self.sessions(), start=1):
            query = "SELECT MAX(MAX(started_at), COALESCE(MAX(ended_at), 0)) FROM instances WHERE session=?"
            last = self._database.execute(query, (number,)).fetchone()[0]
            now = time.time() if number == self._session else (last or started)
            total += (ended or now) - started
        return total

    def close(self) -> None:
        """Fold the write-ahead log into the file and let go of it."""
        self._database.close()

    def _write(self, statement: str, *values: object) -> int:
        with naming(self.path):
            try:
                return int(self._database.execute(statement, values).lastrowid or 0)
            except sqlite3.OperationalError as error:
                raise OSError(None, f"cannot write the journal: {error}") from error
