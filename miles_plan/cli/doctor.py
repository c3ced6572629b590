"""`miles-plan doctor`: whether this machine can run a job, point by point."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from miles_plan.cli.console import console
from miles_plan.cli.exit_code import ExitCode

Folder = Annotated[Path, typer.Option("--run-dir", metavar="DIR", help="Where runs would be written.")]
MARKS = {"ok": "ok  ", "warning": "warn", "problem": "FAIL"}


def doctor(run_dir: Folder = Path("runs")) -> None:
    """Look at what running needs: packages, cores, disk, shared memory, loopback, GPUs. Exit code 1 if something is missing."""
    from miles_plan.backends.executor.machine_checks import machine_checks

    out, missing = console(), False
    for check in machine_checks(run_dir):
        out.print(f"{MARKS[check.verdict]}  {check.subject:<18} {check.found}", markup=False, soft_wrap=True)
        if check.verdict != "ok" and check.help:
            out.print(f"      {check.help}", markup=False, soft_wrap=True)
        missing = missing or check.verdict == "problem"
    if missing:
        raise typer.Exit(ExitCode.DIAGNOSTICS)
