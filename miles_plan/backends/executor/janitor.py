"""A small process that outlives the driver by a second: when the driver dies, however it dies, nothing of the run stays behind.

Ray's workers end with their driver, but its two agents can linger for minutes after a SIGKILL (seen with Ray 2.60), and a
killed process leaves its shared memory and its temporary folder. The driver holds the write end of a pipe to this process; its
end of file is the driver's death. Every process of the run carries the run's marker in its environment, which is how they are
found: by a mark of ours, never by a name.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

MARKER = "MILES_PLAN_SESSION"
SHARED_MEMORY = Path("/dev/shm")
SEGMENT_PREFIX = "miles-plan-weights-"  # of `weight_transport.shared_memory`, which is not imported here: it loads torch
DISMISSED = b"done\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Belongings:
    """What a session leaves if it dies, besides weights in shared memory: processes with its marker, a temporary folder."""

    marker: str
    temporary: str


def processes_of(marker: str) -> Iterator[int]:
    """Processes of this user that carry the marker, this one left out. Empty where there is no /proc."""
    wanted = f"{MARKER}={marker}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        if pid == os.getpid():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                yield pid
        except OSError:
            continue


def clean_up(belongings: Belongings, *, spare: frozenset[int] = frozenset()) -> list[str]:
    """Kill the session's processes, remove its folder and its segments; returns what was found, for the event log."""
    found = []
    for _ in range(20):  # a dying process can still start another
        alive = [pid for pid in processes_of(belongings.marker) if pid not in spare]
        if not alive:
            break
        for pid in alive:
            found.append(f"process {pid}")
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    found += [f"shared memory {name}" for name in remove_orphaned_segments()]
    if Path(belongings.temporary).exists():
        found.append(f"folder {belongings.temporary}")
        shutil.rmtree(belongings.temporary, ignore_errors=True)
    return found


def remove_orphaned_segments() -> list[str]:
    """Unlink weights in shared memory whose writer is dead: a segment is named after its writer, which holds its lock."""
    removed = []
    for path in SHARED_MEMORY.glob(f"{SEGMENT_PREFIX}*"):
        writer = path.name.removeprefix(SEGMENT_PREFIX).partition("-")[0]
        if writer.isdigit() and not Path(f"/proc/{writer}").exists() and _unlocked(path):
            path.unlink(missing_ok=True)
            removed.append(path.name)
    return sorted(removed)


def _unlocked(path: Path) -> bool:
    """Whether nobody holds the file's lock; a writer in another container can, though its process is not to be seen here."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class Janitor:
    """The driver's handle on the process that watches it."""

    def __init__(self, belongings: Belongings) -> None:
        """Start it, in a session of its own so that Ctrl-C does not reach it."""
        root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(asdict(belongings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={key: value for key, value in os.environ.items() if key != MARKER} | {"PYTHONPATH": path},
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def dismiss(self) -> None:
        """The driver has cleaned up itself: end without doing anything."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(DISMISSED)
            self._process.stdin.close()
        except OSError:
            pass
        self._process.wait()


def watch(pipe: IO[bytes], belongings: Belongings) -> None:
    """Wait for the driver to say it is done or to die; clean up after it if it died."""
    if pipe.readline() != DISMISSED:
        clean_up(belongings)


if __name__ == "__main__":
    watch(sys.stdin.buffer, Belongings(**json.loads(sys.argv[1])))
