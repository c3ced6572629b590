"""The owner's end of an engine process: start it, ask it, notice that it died, and end it with everything it started."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from miles_plan.backends.engine import EngineError
from miles_plan.backends.sglang_engine.engine_process import ABORT, CLOSE, TURN

START_DEADLINE_S = 600.0
_POLL_S = 0.5
_LOG_LINES = 12
_ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt)(: |$)")
# SGLang's bars at their end: "Capturing batches (bs=1): 100%|####| 36/36 [00:04<00:00"
_BAR = re.compile(r"([A-Z][\w -]*?)(?: \([^)]*\))?:\s+100%[^\[\r\n]*\[(?:(\d+):)?(\d+):(\d+)<")


class EngineDiedError(EngineError):
    """The engine's process is gone; its GPU memory is free again."""


class EngineLink:
    """One engine process. Calls block; `abort` may come from another thread. Failures are EngineErrors with the log's end.

    started_s: what its start was made of, in seconds: `imports` (SGLang's, in the engine's own process), `early` (from the
    process's start until its engine had its turn), `engine` (from then until it served), SGLang's own bars in whole seconds.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        *,
        log: Path,
        environment: Mapping[str, str],
        name: str = "sglang",
        module: str = "miles_plan.backends.sglang_engine.engine_process",
        needed: Path | None = None,
    ) -> None:
        """Start the process, which does what needs no GPU; `start` lets the engine go on and waits for it.

        log: where all that it prints goes; module: what it runs; needed: a file that will be there before `start` is called.
        """
        ours, theirs = socket.socketpair()
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = log.stat().st_size if log.exists() else 0
        self._began = time.monotonic()
        self.started_s: dict[str, float] = {}
        self._turn = log.absolute().with_name(f".{log.name}.turn")  # there while the engine starts
        self._turn.unlink(missing_ok=True)
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, **environment, TURN: str(self._turn)},
            )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._connection.send((dict(arguments), None if needed is None else str(needed)))

    @property
    def pid(self) -> int:
        """The process's id; its process group has the same."""
        return self._process.pid

    def start(self, deadline_s: float = START_DEADLINE_S) -> dict[str, Any]:
        """Let the engine have its GPUs and wait until it serves; returns its effective configuration."""
        turn = time.monotonic()
        self._turn.touch()
        info: dict[str, Any]
        info, imports_s = self._answer("start", deadline_s)
        self._turn.unlink()
        self.started_s = {"imports": imports_s, "early": turn - self._began, "engine": time.monotonic() - turn}
        self.started_s |= bars(self._logged())
        return info

    def call(self, method: str, *, deadline_s: float | None = None, **given: Any) -> Any:
        """Ask the engine; a deadline None waits for as long as it lives."""
        if self._process.poll() is not None:
            raise self._died(method)
        try:
            self._connection.send((method, given))
        except OSError:
            raise self._died(method) from None
        return self._answer(method, deadline_s)

    def abort(self) -> None:
        """End every request that runs."""
        with contextlib.suppress(OSError):
            self._connection.send((ABORT, {}))

    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process and all it has started, and wait until they are gone: their GPU memory is free then."""
        with contextlib.suppress(OSError):
            self._connection.send((CLOSE, {}))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)
        self._kill()
        self._connection.close()
        self._turn.unlink(missing_ok=True)

    def _answer(self, method: str, deadline_s: float | None) -> Any:
        ends = None if deadline_s is None else time.monotonic() + deadline_s
        while not self._connection.poll(_POLL_S):
            if self._process.poll() is not None and not self._connection.poll(0):
                raise self._died(method)
            if ends is not None and time.monotonic() > ends:
                self._kill()
                late = f"'{method}' was not answered in {deadline_s:.0f} s; the engine was ended"
                raise EngineError(f"{self.name}: {late}{self._tail()}")
        try:
            done, value = self._connection.recv()
        except (EOFError, OSError):
            raise self._died(method) from None
        if not done:
            if method == "start":
                self._kill()
            raise EngineError(f"{self.name}: '{method}' failed: {value}{self._tail() if method == 'start' else ''}")
        return value

    def _died(self, method: str) -> EngineDiedError:
        self._kill()
        code = self._process.returncode
        how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        what = f"the engine's process {self.pid} ended {how} before it answered '{method}'"
        reason = f": {last}" if (last := last_error(self._logged())) else ""
        return EngineDiedError(f"{self.name}: {what}{reason}{self._tail()}")

    def _kill(self) -> None:
        """The whole process group; waits until none of it is left, so that its memory is free when this returns."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        ends = time.monotonic() + 30.0
        while _group_alive(self._process.pid) and time.monotonic() < ends:
            time.sleep(0.05)

    def _tail(self) -> str:
        return "".join(f"\n    {line}" for line in self._logged()[-_LOG_LINES:])

    def _logged(self) -> list[str]:
        """Lines of this process's own output; a file may hold those of one before it."""
        try:
            with self.log.open("rb") as file:
                file.seek(self._log_start)
                return file.read().decode(errors="replace").splitlines()
        except OSError:
            return []


def last_error(lines: Sequence[str]) -> str:
    """The last line that ends a traceback, where there is one: schedulers die of an exception and their parent of a signal."""
    return next((line for line in reversed(lines) if _ERROR.match(line)), "")


def bars(lines: Sequence[str]) -> dict[str, float]:
    """Seconds that SGLang's progress bars showed at their end, by what they were of."""
    found = (match for line in lines for match in _BAR.finditer(line))
    return {name: 3600.0 * int(h or 0) + 60.0 * int(m) + float(s) for name, h, m, s in (each.groups() for each in found)}


def _group_alive(group: int) -> bool:
    """Whether a process of the group still runs. Zombies do not count: in a container nobody may ever wait for them."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, found = stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[:3]
            if int(found) == group and state not in ("Z", "X"):
                return True
    return False
