"""Plan files, run directories and specs that commands are given: read or compiled, or refused with a finding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from miles_plan.diagnostics import PlanError, error

if TYPE_CHECKING:
    from miles_plan.ir.plan import Plan
    from miles_plan.report.run_files import RunRecord

PlanOrRun = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file, a run directory, or a job spec to compile.")]
SPEC_SUFFIXES = (".yaml", ".yml")


def plan_of(path: Path) -> Plan:
    """The plan of a plan file or run directory, or the one that a spec compiles to. PlanError says why there is none."""
    from miles_plan.ir.plan import PlanFileError, read_plan

    if path.suffix in SPEC_SUFFIXES and not path.is_dir():
        from miles_plan.cli.compile import compiled_job

        return compiled_job(str(path), [], []).plan
    try:
        return read_plan(path / "plan.json" if path.is_dir() else path)
    except PlanFileError as problem:
        raise PlanError((error("MP402", str(problem)),)) from None


def run_or_plan_of(path: Path) -> RunRecord | Plan:
    """A run directory's record, or the plan that `plan_of` finds."""
    from miles_plan.report.run_files import read_run

    plan = plan_of(path)
    return read_run(path) if path.is_dir() else plan
