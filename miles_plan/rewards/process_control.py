"""What Linux offers to keep processes from outliving their parents, without a dependency; elsewhere the weaker POSIX means.

PR_SET_PDEATHSIG kills a child when the thread that made it dies; PR_SET_CHILD_SUBREAPER makes orphans below a process its
children, so that a grandchild that left its process group can still be found and killed (prctl(2)).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def adopt_orphans() -> None:
    """Orphans below this process become its children."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """SIGKILL this process when its parent (whose id it is) ends, or now if it has ended."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def living_children() -> set[int]:
    """Ids of this process's children that have not ended; where there is no /proc, an empty set."""
    if not _has_children():
        return set()
    try:
        threads = list(Path("/proc/self/task").iterdir())
        children = {int(child) for thread in threads for child in (thread / "children").read_text().split()}
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN, or no /proc
        children = {process for process in _processes() if _state_and_parent(process)[1] == os.getpid()}
    return {child for child in children if _state_and_parent(child)[0] not in "ZX"}


def reap(registered: set[int]) -> dict[int, int]:
    """Collect children that have ended; exit codes (negative: signal) of the registered ones. Kills their groups first."""
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        # Look before collecting: while the zombie is there nobody else can have its id, so the group is surely its own.
        while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            kill_group(found.si_pid)
            _, status = os.waitpid(found.si_pid, 0)
            if found.si_pid in registered:
                ended[found.si_pid] = os.waitstatus_to_exitcode(status)
    return ended


def kill(process: int) -> None:
    """SIGKILL one process if it is there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process, signal.SIGKILL)


def kill_group(leader: int) -> None:
    """SIGKILL a process group; the kernel does it in one go, so a group that keeps forking does not get away."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _processes() -> list[int]:
    try:
        return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    except OSError:
        return []


def _state_and_parent(process: int) -> tuple[str, int]:
    """The process's state letter and its parent; `X` (dead) when it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[1])
    except (OSError, IndexError, ValueError):
        return "X", 0
