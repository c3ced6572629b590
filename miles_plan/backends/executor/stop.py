"""Ctrl-C and SIGTERM: the first asks for a clean stop, the second ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Counts signals. `at_once` is called on the second; it must not return to what was interrupted."""

    def __init__(self, at_once: Callable[[], None]) -> None:
        """No signal has come."""
        self.count = 0
        self._at_once = at_once

    @property
    def requested(self) -> bool:
        """Whether the run is to stop."""
        return self.count > 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.count += 1
        if self.count > 1:
            self._at_once()
            os._exit(INTERRUPTED)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle signals inside; what was there before comes back after. Only the main thread can."""
        before = {number: signal.signal(number, self.handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
