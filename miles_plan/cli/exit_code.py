"""What the exit status of a command means; scripts rely on it."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit status of `miles-plan`."""

    FINE = 0
    DIAGNOSTICS = 1
    INTERNAL = 2
    """Wrong usage of the command line, or a bug of ours."""
    PLANS_DIFFER = 3
    RUN_FAILED_CAN_RESUME = 4
    RUN_FAILED_CANNOT_RESUME = 5
    INTERRUPTED = 130
