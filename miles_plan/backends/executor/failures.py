"""Why a run stops: findings with a code, like those about a spec, that also say whether `resume` can continue."""

from __future__ import annotations

from typing import Literal

from miles_plan.diagnostics import Diagnostic, error

Ending = Literal["finished", "failed", "interrupted"]


class RunError(RuntimeError):
    """The run cannot go on. `resumable`: `miles-plan resume` may continue once the cause is gone."""

    def __init__(self, code: str, message: str, *, help: str = "", notes: tuple[str, ...] = (), resumable: bool = True) -> None:
        """A finding of the given code."""
        super().__init__(message)
        self.diagnostic: Diagnostic = error(code, message, help=help, notes=notes)
        self.resumable = resumable


class InterruptedRunError(Exception):
    """Ctrl-C or SIGTERM: the run ended where a checkpoint lets it continue."""
