"""MP901: an exception that nobody foresaw, told as a finding instead of a traceback."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import miles_plan
from miles_plan.cli.exit_code import ExitCode
from miles_plan.cli.findings import show_findings
from miles_plan.diagnostics import Diagnostic, error

TRACEBACK_VARIABLE = "MILES_PLAN_TRACEBACK"


def internal_error(problem: Exception) -> Diagnostic:
    """The finding: what was raised, and the innermost place in our own code."""
    package = Path(miles_plan.__file__).parent
    frames = [frame for frame in traceback.extract_tb(problem.__traceback__) if Path(frame.filename).is_relative_to(package)]
    where = ""
    if frames:
        last = frames[-1]
        where = f" in miles_plan/{Path(last.filename).relative_to(package).as_posix()}:{last.lineno} ({last.name})"
    text = str(problem).splitlines()
    return error(
        "MP901",
        f"unexpected {type(problem).__name__}{f': {text[0]}' if text else ''}{where}",
        help=f"this is a bug of miles-plan {miles_plan.__version__}: please report it on the project's issue tracker",
        notes=[f"report the spec and the output with {TRACEBACK_VARIABLE}=1 in the environment, which shows the traceback"],
    )


def show_internal_error(problem: Exception) -> ExitCode:
    """Print the finding, and the traceback if the environment asks for it."""
    if os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exception(problem)
    show_findings([internal_error(problem)], {}, stream=sys.stderr)
    return ExitCode.INTERNAL
