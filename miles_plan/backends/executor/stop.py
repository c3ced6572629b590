"""Ctrl-C and SIGTERM: the first asks for a clean stop, the second ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Counts signals once there is something that heeds the count; before, a signal raises KeyboardInterrupt where it strikes.

    at_once: called on the second signal, before the process ends.
    """

    def __init__(self) -> None:
        """No signal has come, and nobody counts."""
        self.count = 0
        self.at_once: Callable[[], None] | None = None

    @property
    def requested(self) -> bool:
        """Whether the run is to stop."""
        return self.count > 0

    def count_from_now(self, at_once: Callable[[], None]) -> None:
        """The run looks at `requested` from now on. Puts the handlers in place again: `ray.init` has one of its own."""
        self.at_once = at_once
        self._install()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.at_once is None:
            raise KeyboardInterrupt
        self.count += 1
        if self.count > 1:
            self.at_once()
            os._exit(INTERRUPTED)

    def _install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle signals inside; what was there before comes back after. Outside the main thread they stay as they are."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self._install()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
